"""Is each layer sound? Shapes, numbers, gradients, sizes."""

# ruff: noqa: D102 (the names of the tests are sentences)

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from .. import compiling
from .bench import Bench, weight_bytes
from .suite import Suite
from .tensors import assert_equal, assert_within, change, relative

if TYPE_CHECKING:
    from torch import Tensor

    from ..facade import QuantLinear

SIZES = ((256, 64), (320, 96), (96, 40), (100, 60), (72, 3), (33, 7))
"""(in_features, out_features), from convenient to odd."""


_FORWARD = "Where the target quantizes activations, say so with `quantizes_activations = True`"
_SCALE = "dequantized weights are too small or too large on the whole (slope against the original)"
_RESCALE = (
    "A scale fitted by least squares shrinks weights by the square of their error, and all outputs "
    "with them, layer upon layer. Multiply it by (w * w).sum() / (w * v).sum(), with the weights w "
    "of a group and what they become, v"
)


class LayerSuite(Suite):
    """The layers of a backend, one by one."""

    # Layers ------------------------------------------------------------------------------------

    def test_finds_every_linear_layer_but_the_head(self, bench: Bench) -> None:
        from torch import nn

        head = bench.dense.get_output_embeddings()  # type: ignore[operator]
        linear = {n for n, m in bench.dense.named_modules() if type(m) is nn.Linear}
        heads = {n for n, m in bench.dense.named_modules() if m is head}
        found = set(bench.facades())
        assert found == linear - heads, (
            f"other layers are quantized: {sorted(found ^ (linear - heads))}. `quantize` takes "
            f"every linear layer but the head, and `matches` of the target says yes to each"
        )

    def test_metadata_is_right_and_free(self, bench: Bench) -> None:
        for name, facade in bench.facades().items():
            dense = bench.original(name)
            costly = "shape, dtype and device of a weight are read without dequantizing it"
            with patch.object(facade, "dequantize", side_effect=AssertionError(costly)):
                weight = facade.weight
                found = (tuple(weight.shape), weight.dtype, weight.device, weight.requires_grad)
            expected = (tuple(dense.shape), bench.torch_dtype, dense.device, False)
            fix = "`shape` of the target gives (in_features, out_features)"
            assert found == expected, f"{name}: the weight is {found}, not {expected}. {fix}"
            sizes = (facade.out_features, facade.in_features)
            assert sizes == found[0], f"{name}: its sizes are {sizes}, not {found[0]}. {fix}"

    def test_weight_reads_as_the_dequantized_numbers(self, bench: Bench) -> None:
        import torch

        facade = bench.some_facade()
        weight = facade.dequantize()
        shape = (facade.out_features, facade.in_features)
        fix = "`dequantize` of the target returns [out_features, in_features]"
        assert tuple(weight.shape) == shape, f"it is {tuple(weight.shape)}, not {shape}. {fix}"
        same = torch.equal(facade.weight + 0, weight) and torch.equal(facade.weight.data, weight)
        assert same, "the weight changes from one reading to the next. `dequantize` may not"

    def test_dequantized_is_close_to_the_original(self, bench: Bench) -> None:
        if bench.rescales:
            return
        errors, slopes = [], []
        for name, facade in bench.facades().items():
            original = bench.original(name)
            dequantized = facade.dequantize()
            errors.append(relative(dequantized, original))
            slopes.append(_slope(dequantized, original))
        off = max(abs(slope - 1) for slope in slopes)
        bench.note("", dequantize_error=max(errors), dequantize_scale=off, bits=bench.bits())
        what = "dequantized weights differ from the original (relative, worst layer)"
        fix = f"Does `dequantize` undo what `quantize_linear` did? {bench.bits_in_words()}"
        assert_within(max(errors), bench.tolerance.weight.error, what, fix)
        # Codebooks fitted by least squares shrink the weight by the square of their error.
        fitted = max(errors) ** 2 if bench.plan.calibrates else 0.0
        assert_within(off, bench.tolerance.weight.scale + fitted, _SCALE, _RESCALE)

    def test_one_kernel_gives_the_weight_bit_for_bit(self, bench: Bench) -> None:
        """What a backend hands to `compiling.one_kernel`: compiled on CUDA, traced elsewhere; and
        its own kernel, where there is one."""
        facade = next(iter(bench.facades().values()))
        by_hand, none = facade.dequantize(), patch.object(compiling, "_by_hand", lambda *_: None)
        with none:
            expected = facade.dequantize()

        def trace(*args: Any) -> Any:
            return lambda *given: compiling.traced(*args)(*given)[0]

        compile_ = compiling._compile if expected.is_cuda else trace
        with (
            none,
            patch.object(compiling, "_kernels", {}),
            patch.object(compiling, "_active", True),
            patch.object(compiling, "_gains", lambda packed: True),
            patch.object(compiling, "_compile", compile_),
        ):
            found = facade.dequantize()
        fix = "It must depend on nothing but its arguments, and `otherwise` must give the same"
        what = "what `one_kernel` makes of your function differs from the function"
        assert_within(change(found, expected), 0, what, fix)
        what = "what the kernel that `one_kernel` has as `written` makes differs from your function"
        assert_within(change(by_hand, expected), 0, what, "Round where the function rounds")

    # Forward and backward ----------------------------------------------------------------------

    def test_forward_is_that_of_the_dequantized_weight(self, bench: Bench) -> None:
        errors = [
            relative(facade(x), dense_forward(facade, x))
            for facade in bench.facades().values()
            for x in _inputs(bench, facade)
        ]
        bench.note("", forward_error=max(errors))
        what = "the layer's output differs from that of the dequantized weight"
        assert_within(max(errors), bench.tolerance.forward, what, _FORWARD)

    def test_forward_is_the_vendors(self, bench: Bench) -> None:
        import torch

        target: Any = bench.plan.quantizer.target
        errors = []
        for facade in bench.facades().values():
            for x in _inputs(bench, facade):
                with torch.no_grad():
                    errors.append(relative(facade(x), target.forward(facade.vendor, x)))
        bench.note("", vendor_error=max(errors))
        what = "the layer's output differs from that of the target's `forward`"
        assert_within(max(errors), bench.tolerance.vendor, what, _FORWARD)

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
        what = "while it trains, the layer's output is off"
        assert_within(max(errors), bench.tolerance.vendor, what, _FORWARD)

    def test_gradient_of_the_input(self, bench: Bench) -> None:
        import torch

        facade = bench.some_facade()
        x = bench.input_of(facade).requires_grad_()
        y = facade(x)
        generator = torch.Generator().manual_seed(1)
        dy = torch.randn(y.shape, generator=generator).to(y)
        y.backward(dy)  # type: ignore[no-untyped-call]
        fix = "Gradients are those of `dequantize`, which has to give the same weight each time"
        assert x.grad is not None, f"the input gets no gradient. {fix}"
        allowed, what = bench.tolerance.gradient, "the gradient of the input is off"
        assert_within(relative(x.grad, dy @ facade.dequantize()), allowed, what, fix)
        through_dense = bench.input_of(facade).requires_grad_()
        dense_forward(facade, through_dense).backward(dy)  # type: ignore[no-untyped-call]
        assert through_dense.grad is not None
        assert_within(relative(x.grad, through_dense.grad), allowed, what, fix)
        off = relative(x.grad, dy @ bench.original(bench.widest))
        what = "the gradient of the input differs from that of the original weight"
        allowed = 2 * bench.tolerance.weight.error + 1e-5
        assert_within(off, allowed, what, bench.bits_in_words())

    def test_model_differs_from_the_original_as_its_weights_do(self, bench: Bench) -> None:
        bench.note("", logits_error=relative(bench.base_logits, bench.logits(bench.dense)))
        finite = bench.base_logits.isfinite().all()
        assert finite, (
            "logits are not finite. Look for scales of 0, and for overflow in `dequantize`"
        )
        allowed = 3 * (bench.tolerance.weight.error + bench.tolerance.activations)
        what = "logits differ from those of the original model"
        fix = f"Single layers are tested above; is something lost between? {bench.bits_in_words()}"
        assert_within(bench.figures[""]["logits_error"], allowed, what, fix)

    def test_what_is_not_quantized_stays_as_it_is(self, bench: Bench) -> None:
        if bench.rescales:
            return
        dense = dict(bench.dense.named_parameters())
        quantized = tuple(f"{name}." for name in bench.facades())
        left = {n: p for n, p in bench.base.named_parameters() if not n.startswith(quantized)}
        fix = "`quantize` leaves everything but the linear layers as it is, in the compute dtype"
        assert left, f"nothing is left of the model but its linear layers. {fix}"
        for name, parameter in left.items():
            dtypes = (parameter.dtype, dense[name].dtype)
            assert dtypes[0] == dtypes[1], f"{name} is {dtypes[0]}, not {dtypes[1]}. {fix}"
            assert_equal(parameter, dense[name], f"{name} is changed", fix)

    def test_sizes_that_do_not_fit_are_told(self, bench: Bench) -> None:
        """What `misfit` accepts is quantized as well as anything, and what it refuses is not."""
        from ..protocols import LayerwiseQuantizer

        quantizer = bench.plan.quantizer
        if not isinstance(quantizer, LayerwiseQuantizer) or bench.plan.calibrates:
            return
        for in_features, out_features in SIZES:
            error = _quantization_error(bench, quantizer, in_features, out_features)
            misfit = quantizer.misfit(in_features, out_features)
            size = f"{in_features} inputs, {out_features} outputs"
            if misfit is None:
                allowed = 2 * bench.tolerance.weight.error + 1e-5
                what = f"a layer of {size} fails, or its weights differ from the original"
                assert_within(error, allowed, what, "Let `misfit` say why it cannot be quantized")
            elif bench.suite.strict:
                works = error <= bench.tolerance.weight.error
                fix = "Let `misfit` return None for it"
                assert not works, f"a layer of {size} is quantized well, but {misfit!r}. {fix}"

    def test_grid_holds_the_values_that_weights_can_take(self, bench: Bench) -> None:
        import torch

        target: Any = bench.plan.quantizer.target
        for name, facade in bench.facades().items():
            if (grid := target.grid(facade.vendor)) is None:
                continue
            kept = target.dequantize(facade.vendor)
            fix = "`values` of its grid computes as `dequantize` does, in the same dtype"
            assert grid.dtype == kept.dtype, f"{name}: {grid.dtype}, not {kept.dtype}. {fix}"
            assert_equal(grid.nearest(kept), kept, f"{name}: its own weight is off its grid", fix)
            weight = _changed(kept, seed=1).float()
            rounded = grid.nearest(weight)
            fix = "`columns` says which columns of the module are given"
            for columns in (slice(1, 4), slice(5, None)):
                part = grid.nearest(weight[:, columns], columns)
                assert_equal(part, rounded[:, columns], f"{name}: columns are off", fix)
            fix = "`codes` of its grid gives the nearest value"
            off = (rounded.float() - weight).abs()
            for seed in range(2, 6):
                other = (grid.nearest(_changed(weight, seed)).float() - weight).abs()
                slack = torch.finfo(kept.dtype).eps * weight.abs().max()
                nearer = float((off - other).max() - slack)
                assert_within(nearer, 0, f"{name}: a value is not the nearest", fix)

    def test_repack_holds_values_of_the_grid(self, bench: Bench) -> None:
        target: Any = bench.plan.quantizer.target
        for name, facade in bench.facades().items():
            if (grid := target.grid(facade.vendor)) is None:
                continue
            before = target.dequantize(facade.vendor)
            weight = _changed(before, seed=6)
            packed = target.repack(facade.vendor, weight)
            fix = "`repack` packs the codes of the grid, into a module with the same scales"
            what = f"{name}: another weight than the grid's is packed"
            assert target.matches(packed), f"{name}: `matches` says no to what is packed. {fix}"
            assert_equal(target.dequantize(packed), grid.nearest(weight), what, fix)
            again = target.repack(packed, before)
            assert_equal(target.dequantize(again), before, f"{name}: it has other scales", fix)
            what = f"{name}: `repack` has changed the module that it was given"
            assert_equal(target.dequantize(facade.vendor), before, what, fix)

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
        assert abs(declared - found) <= 0.05 * found, (
            f"bits_per_weight declares {declared:.3f} bits, a layer stores {found:.3f}. Count all "
            f"that is stored: codes in the dtype that holds them (4 bits in an int8 take 8, "
            f"whatever an option `bits` says, unless two are packed into one), scales, zero points"
        )


def _inputs(bench: Bench, facade: QuantLinear) -> list[Tensor]:
    """Return several tokens, the same with an axis more, as latent attention has, and one alone,
    for which a vendor may take another kernel. Where activations are rounded, one token is too few
    for their errors to average out."""
    x = bench.input_of(facade)
    several = [x, x.unsqueeze(1)]
    return several if facade.target.quantizes_activations else [*several, x[:1, :1]]


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


def _changed(weight: Tensor, seed: int) -> Tensor:
    """Return a weight that is changed by about half of what it is."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(weight.shape, generator=generator).to(weight)
    return weight + 0.5 * weight.std() * noise


def _slope(found: Tensor, reference: Tensor) -> float:
    """Return the least-squares slope of `found` on `reference`."""
    found, reference = found.double(), reference.double()
    return float((found * reference).sum() / (reference * reference).sum())
