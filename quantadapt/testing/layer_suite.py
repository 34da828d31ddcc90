"""Is each layer sound? Shapes, numbers, gradients, sizes."""

# ruff: noqa: D102 (the names of the tests are sentences)

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from .. import compiling
from .bench import Bench, weight_bytes
from .suite import Suite
from .tensors import change, relative

if TYPE_CHECKING:
    from torch import Tensor

    from ..facade import QuantLinear

SIZES = ((256, 64), (320, 96), (96, 40), (100, 60), (72, 3), (33, 7))
"""(in_features, out_features), from convenient to odd."""


class LayerSuite(Suite):
    """The layers of a backend, one by one."""

    # Layers ------------------------------------------------------------------------------------

    def test_finds_every_linear_layer_but_the_head(self, bench: Bench) -> None:
        from torch import nn

        head = bench.dense.get_output_embeddings()  # type: ignore[operator]
        linear = {n for n, m in bench.dense.named_modules() if type(m) is nn.Linear}
        heads = {n for n, m in bench.dense.named_modules() if m is head}
        assert set(bench.facades()) == linear - heads

    def test_metadata_is_right_and_free(self, bench: Bench) -> None:
        for name, facade in bench.facades().items():
            dense = bench.original(name)
            with patch.object(facade, "dequantize", side_effect=AssertionError("dequantized")):
                weight = facade.weight
                found = (tuple(weight.shape), weight.dtype, weight.device, weight.requires_grad)
            expected = (tuple(dense.shape), bench.torch_dtype, dense.device, False)
            assert found == expected, name
            assert (facade.out_features, facade.in_features) == found[0], name

    def test_weight_reads_as_the_dequantized_numbers(self, bench: Bench) -> None:
        import torch

        facade = bench.some_facade()
        weight = facade.dequantize()
        assert tuple(weight.shape) == (facade.out_features, facade.in_features)
        assert torch.equal(facade.weight + 0, weight)
        assert torch.equal(facade.weight.data, weight)

    def test_dequantized_is_close_to_the_original(self, bench: Bench) -> None:
        if bench.rescales:
            return
        errors, slopes = [], []
        for name, facade in bench.facades().items():
            original = bench.original(name)
            dequantized = facade.dequantize()
            assert dequantized.shape == original.shape, name
            errors.append(relative(dequantized, original))
            slopes.append(_slope(dequantized, original))
        off = max(abs(slope - 1) for slope in slopes)
        bench.note("", dequantize_error=max(errors), dequantize_scale=off, bits=bench.bits())
        assert max(errors) <= bench.tolerance.weight.error
        # Codebooks fitted by least squares shrink the weight by the square of their error.
        fitted = max(errors) ** 2 if bench.record.calibration else 0.0
        assert off <= bench.tolerance.weight.scale + fitted

    def test_one_kernel_gives_the_weight_bit_for_bit(self, bench: Bench) -> None:
        """What a backend hands to `compiling.one_kernel`: compiled on CUDA, traced elsewhere."""
        facade = next(iter(bench.facades().values()))
        expected = facade.dequantize()

        def trace(*args: Any) -> Any:
            return lambda *given: compiling.traced(*args)(*given)[0]

        compile_ = compiling._compile if expected.is_cuda else trace
        with (
            patch.object(compiling, "_kernels", {}),
            patch.object(compiling, "_active", True),
            patch.object(compiling, "_gains", lambda packed: True),
            patch.object(compiling, "_compile", compile_),
        ):
            assert change(facade.dequantize(), expected) == 0.0

    # Forward and backward ----------------------------------------------------------------------

    def test_forward_is_that_of_the_dequantized_weight(self, bench: Bench) -> None:
        errors = [
            relative(facade(x), dense_forward(facade, x))
            for facade in bench.facades().values()
            for x in _inputs(bench, facade)
        ]
        bench.note("", forward_error=max(errors))
        assert max(errors) <= bench.tolerance.forward

    def test_forward_is_the_vendors(self, bench: Bench) -> None:
        import torch

        target: Any = bench.plan.quantizer.target
        errors = []
        for facade in bench.facades().values():
            for x in _inputs(bench, facade):
                with torch.no_grad():
                    errors.append(relative(facade(x), target.forward(facade.vendor, x)))
        bench.note("", vendor_error=max(errors))
        assert max(errors) <= bench.tolerance.vendor

    def test_forward_in_training(self, bench: Bench) -> None:
        """Of the dequantized weight, or the vendor's where that rounds activations then, too."""
        import torch

        errors = []
        for facade in bench.facades().values():
            x, before = bench.input_of(facade), facade.training
            facade.train()
            with torch.no_grad():
                expected = dense_forward(facade, x)
                if facade.rounds_activations:
                    expected = facade.target.forward(facade.vendor, x)
                errors.append(relative(facade(x), expected))
            facade.train(before)
        assert max(errors) <= bench.tolerance.vendor

    def test_gradient_of_the_input(self, bench: Bench) -> None:
        import torch

        facade = bench.some_facade()
        x = bench.input_of(facade).requires_grad_()
        y = facade(x)
        generator = torch.Generator().manual_seed(1)
        dy = torch.randn(y.shape, generator=generator).to(y)
        y.backward(dy)  # type: ignore[no-untyped-call]
        assert x.grad is not None
        weight = facade.dequantize()
        assert relative(x.grad, dy @ weight) <= bench.tolerance.gradient
        through_dense = bench.input_of(facade).requires_grad_()
        dense_forward(facade, through_dense).backward(dy)  # type: ignore[no-untyped-call]
        assert through_dense.grad is not None
        assert relative(x.grad, through_dense.grad) <= bench.tolerance.gradient
        original = bench.original(bench.widest)
        assert relative(x.grad, dy @ original) <= 2 * bench.tolerance.weight.error + 1e-5

    def test_model_differs_from_the_original_as_its_weights_do(self, bench: Bench) -> None:
        bench.note("", logits_error=relative(bench.base_logits, bench.logits(bench.dense)))
        assert bench.base_logits.isfinite().all()
        low = bench.tolerance.weight.error + bench.tolerance.activations
        assert bench.figures[""]["logits_error"] <= 3 * low

    def test_what_is_not_quantized_stays_as_it_is(self, bench: Bench) -> None:
        if bench.rescales:
            return
        dense = dict(bench.dense.named_parameters())
        quantized = tuple(f"{name}." for name in bench.facades())
        left = {n: p for n, p in bench.base.named_parameters() if not n.startswith(quantized)}
        assert left
        for name, parameter in left.items():
            assert parameter.dtype == dense[name].dtype, name
            assert change(parameter, dense[name]) == 0, name

    def test_sizes_that_do_not_fit_are_told(self, bench: Bench) -> None:
        """What `misfit` accepts is quantized as well as anything, and what it refuses is not."""
        from ..protocols import LayerwiseQuantizer

        quantizer = bench.plan.quantizer
        if not isinstance(quantizer, LayerwiseQuantizer) or bench.record.calibration:
            return
        for in_features, out_features in SIZES:
            error = _quantization_error(bench, quantizer, in_features, out_features)
            misfit = quantizer.misfit(in_features, out_features)
            size = f"{in_features} inputs, {out_features} outputs"
            if misfit is None:
                assert error <= 2 * bench.tolerance.weight.error + 1e-5, size
            elif bench.suite.strict:
                assert error > bench.tolerance.weight.error, f"{size}: fits, but {misfit!r}"

    def test_bits_per_weight_are_those_of_a_layer(self, bench: Bench) -> None:
        """What is declared, and plans predict memory from, counts all that a layer holds."""
        facade = bench.some_facade()
        size = facade.in_features, facade.out_features
        declared = bench.plan.quantizer.bits_per_weight(
            *size, device=bench.suite.device, dtype=bench.suite.dtype
        )
        if declared is None:
            return
        found = 8 * weight_bytes(facade) / (size[0] * size[1])
        assert abs(declared - found) <= 0.05 * found, f"{declared:.3f} declared, {found:.3f} found"


def _inputs(bench: Bench, facade: QuantLinear) -> list[Tensor]:
    """Return several tokens, and one alone, for which a vendor may take another kernel. Where
    activations are rounded, one token is too few for their errors to average out."""
    x = bench.input_of(facade)
    return [x] if facade.target.quantizes_activations else [x, x[:1, :1]]


def dense_forward(facade: QuantLinear, x: Tensor) -> Tensor:
    """Return what an ordinary linear layer with the dequantized weight would."""
    from torch.nn.functional import linear

    weight = facade.dequantize()
    bias = None if facade.bias is None else facade.bias.detach().to(weight)
    return linear(x.to(weight.dtype), weight, bias)


def _quantization_error(bench: Bench, quantizer: Any, in_features: int, out_features: int) -> float:
    """Return the relative error of a random layer of that size; inf where it cannot be done."""
    import torch
    from torch import nn

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator).to(bench.torch_dtype)
    linear = nn.Linear(in_features, out_features, bias=False)
    linear.weight = nn.Parameter(weight.to(bench.suite.device), False)
    try:
        found = quantizer.target.dequantize(quantizer.quantize_linear(linear))
    except Exception:
        return float("inf")
    return relative(found.cpu(), weight) if found.shape == weight.shape else float("inf")


def _slope(found: Tensor, reference: Tensor) -> float:
    """Return the least-squares slope of `found` on `reference`."""
    found, reference = found.double(), reference.double()
    return float((found * reference).sum() / (reference * reference).sum())
