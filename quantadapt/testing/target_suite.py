"""Is the base sound? Layers, numbers, gradients, precision, copies and checkpoints."""

# ruff: noqa: D102 (the names of the tests are sentences)

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest

from .. import compiling
from .bench import Bench, Suite, change, digest, relative

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..facade import QuantLinear


SIZES = ((256, 64), (320, 96), (96, 40), (100, 60), (72, 3), (33, 7))
"""(in_features, out_features), from convenient to odd."""


class TargetSuite(Suite):
    """The backend without any adapter."""

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
            patch.object(compiling, "_pays", lambda packed: True),
            patch.object(compiling, "_compile", compile_),
        ):
            assert change(facade.dequantize(), expected) == 0.0

    # Forward and backward ----------------------------------------------------------------------

    def test_forward_is_that_of_the_dequantized_weight(self, bench: Bench) -> None:
        errors = []
        for facade in bench.facades().values():
            x = bench.input_of(facade)
            errors.append(relative(facade(x), _linear(facade, x)))
        bench.note("", forward_error=max(errors))
        assert max(errors) <= bench.tolerance.forward

    def test_forward_is_the_vendors(self, bench: Bench) -> None:
        import torch

        target: Any = bench.plan.quantizer.target
        errors = []
        for facade in bench.facades().values():
            x = bench.input_of(facade)
            with torch.no_grad():
                errors.append(relative(facade(x), target.forward(facade.vendor, x)))
        bench.note("", vendor_error=max(errors))
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
        _linear(facade, through_dense).backward(dy)  # type: ignore[no-untyped-call]
        assert through_dense.grad is not None
        assert relative(x.grad, through_dense.grad) <= bench.tolerance.gradient
        original = bench.original(bench.widest)
        assert relative(x.grad, dy @ original) <= 2 * bench.tolerance.weight.error + 1e-5

    def test_model_differs_from_the_original_as_its_weights_do(self, bench: Bench) -> None:
        bench.note("", logits_error=relative(bench.base_logits, bench.logits(bench.dense)))
        assert bench.base_logits.isfinite().all()
        low = bench.tolerance.weight.error + bench.tolerance.activations
        assert bench.figures[""]["logits_error"] <= 3 * low

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
        from ..saving import size_mib

        facade = bench.some_facade()
        size = facade.in_features, facade.out_features
        declared = bench.plan.quantizer.bits_per_weight(
            *size, device=bench.suite.device, dtype=bench.suite.dtype
        )
        if declared is None:
            return
        bias = 0 if facade.bias is None else facade.bias.nbytes
        found = 8 * (size_mib(facade) * 2**20 - bias) / (size[0] * size[1])
        assert abs(declared - found) <= 0.05 * found, f"{declared:.3f} declared, {found:.3f} found"

    # Biases, precision, memory savers ----------------------------------------------------------

    def test_biases_are_kept(self, bench: Bench) -> None:
        import torch

        from ..saving import load, save

        dense = _biased(bench)
        biases = {n: p.detach().clone() for n, p in dense.named_parameters() if "bias" in n}
        model = bench.quantize(bench.plan, dense)
        facades = _facades(model)
        assert biases
        for name, bias in biases.items():
            facade = facades[name.removesuffix(".bias")]
            assert facade.bias is not None
            if not bench.rescales:
                assert torch.equal(facade.bias.detach().to(bias), bias), name
            bias = facade.bias.detach()
            x = bench.input_of(facade)
            assert relative(facade(x), _linear(facade, x)) <= bench.tolerance.forward
            zero = torch.zeros_like(x)
            assert relative(facade(zero)[0, 0], bias) <= bench.tolerance.vendor
        folder = save(model, bench.folder() / "biased")
        _copy_tokenizer(bench, folder)
        reloaded = load(folder, device=bench.suite.device)
        assert change(bench.logits(reloaded), bench.logits(model)) == 0

    def test_bfloat16(self, bench: Bench) -> None:
        import torch

        from ..planning import plan

        if "bfloat16" not in bench.record.dtypes:
            return
        model = bench.quantize(plan(bench.spec(model=bench.source, dtype="bfloat16")))
        for name, facade in _facades(model).items():
            assert facade.weight.dtype == facade.dequantize().dtype == torch.bfloat16
            x = bench.input_of(facade).bfloat16()
            y = facade(x)
            assert y.dtype == torch.bfloat16
            error = relative(y, _linear(facade, x))
            assert error <= bench.tolerance.low_precision, name
        assert model(input_ids=bench.ids).logits.dtype == torch.bfloat16

    def test_autocast(self, bench: Bench) -> None:
        import torch

        facade = bench.some_facade()
        x = bench.input_of(facade).requires_grad_()
        expected = facade(x.detach())
        with torch.autocast(bench.ids.device.type, dtype=torch.bfloat16):
            y = facade(x)
        y.float().sum().backward()
        assert y.dtype == torch.bfloat16
        assert relative(y, expected) <= bench.tolerance.low_precision
        assert x.grad is not None
        assert x.grad.dtype == x.dtype
        column_sums = facade.dequantize().float().sum(0).expand_as(x)
        assert relative(x.grad, column_sums) <= bench.tolerance.low_precision

    @pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
    def test_gradient_checkpointing(self, bench: Bench, reentrant: bool) -> None:
        plain = _loss_and_gradients(bench, None)
        saved = _loss_and_gradients(bench, reentrant)
        assert saved.keys() == plain.keys()
        assert len(plain) > 1
        for name, value in plain.items():
            assert relative(saved[name], value) <= bench.tolerance.gradient, name

    # Copies, names, wrapping -------------------------------------------------------------------

    def test_deepcopy_is_equal_and_apart(self, bench: Bench) -> None:
        model = bench.fresh()
        assert change(bench.logits(model), bench.base_logits) == 0
        before = {n: digest(f.dequantize()) for n, f in bench.facades().items()}
        for facade in _facades(model).values():
            for tensor in (*facade.parameters(), *facade.buffers()):
                _scribble(tensor)
        assert {n: digest(f.dequantize()) for n, f in bench.facades().items()} == before

    def test_state_dict_has_the_vendors_keys(self, bench: Bench) -> None:
        through_facades = bench.base.state_dict()
        native = bench.vendor_model().state_dict()
        # In whatever order: neural-compressor's depends on the hashes of strings.
        assert sorted(through_facades) == sorted(native)
        for key, value in native.items():
            assert digest(through_facades[key]) == digest(value), key

    def test_unwrap_and_wrap_again(self, bench: Bench) -> None:
        from ..facade import wrap

        target = bench.plan.quantizer.target
        model = bench.vendor_model()
        assert not _facades(model)
        names = {n for n, m in model.named_modules() if target.matches(m)}
        assert names >= set(bench.facades())
        # On some CPUs bitsandbytes evaluates in bfloat16; layer by layer the test above is strict.
        vendor_logits = bench.logits(model)
        assert relative(vendor_logits, bench.base_logits) <= bench.tolerance.low_precision
        model = bench.vendor_model()  # a vendor's forward may have changed the one above
        wrap(model, target, bench.torch_dtype, bench.base.quantadapt.skip_modules)  # type: ignore[union-attr, arg-type]
        assert set(_facades(model)) == set(bench.facades())
        assert change(bench.logits(model), bench.base_logits) == 0

    # Where models come from and go to ----------------------------------------------------------

    def test_live_module_is_quantized_as_from_disk(self, bench: Bench) -> None:

        model = bench.quantize(bench.plan, copy.deepcopy(bench.dense))
        assert set(_facades(model)) == set(bench.facades())
        assert change(bench.logits(model), bench.base_logits) == 0

    def test_live_quantized_model_is_adopted(self, bench: Bench) -> None:
        from ..state import state_of

        model = bench.quantize(bench.plan, bench.vendor_model())
        assert change(bench.logits(model), bench.base_logits) == 0
        found = state_of(model).quantizer
        for name, value in bench.suite.options.items():
            assert getattr(found, name) == value, name

    def test_save_and_load_give_equal_logits(self, bench: Bench) -> None:
        from ..saving import load, save
        from ..state import state_of

        folder = save(bench.base, bench.folder() / "saved")
        assert change(bench.logits(bench.base), bench.base_logits) == 0, "saving changed the model"
        loaded = load(folder, device=bench.suite.device)
        assert change(bench.logits(loaded), bench.base_logits) == 0
        found = state_of(loaded).quantizer
        for name, value in bench.suite.options.items():
            assert getattr(found, name) == value, name
        again = save(loaded, bench.folder() / "again")
        assert _quantization(again) == _quantization(folder)

    def test_saved_checkpoint_is_adopted(self, bench: Bench) -> None:
        from ..saving import save
        from ..stages import quantize

        folder = save(bench.base, bench.folder() / "saved")
        spec = bench.suite
        model = quantize(str(folder), spec.backend, device=spec.device, dtype=spec.dtype)
        assert change(bench.logits(model), bench.base_logits) == 0

    def test_requantizing_the_dequantized_weight(self, bench: Bench) -> None:
        from ..capabilities import Merge

        if bench.record.merge < Merge.REQUANTIZE:
            return
        facade = bench.some_facade()
        weight = facade.dequantize().clone()
        bias = facade.bias
        facade.requantize(weight)
        error = relative(facade.dequantize(), weight)
        bench.note("", idempotence_error=error)
        assert error <= bench.tolerance.weight.again
        assert (facade.bias is None) == (bias is None)


def _facades(model: nn.Module) -> dict[str, QuantLinear]:
    from ..facade import facades

    return dict(facades(model))


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


def _linear(facade: QuantLinear, x: Tensor) -> Tensor:
    """Return what an ordinary linear layer with the dequantized weight would."""
    from torch.nn.functional import linear

    weight = facade.dequantize()
    bias = None if facade.bias is None else facade.bias.detach().to(weight)
    return linear(x.to(weight.dtype), weight, bias)


def _slope(found: Tensor, reference: Tensor) -> float:
    """Return the least-squares slope of `found` on `reference`."""
    found, reference = found.double(), reference.double()
    return float((found * reference).sum() / (reference * reference).sum())


def _scribble(tensor: Tensor) -> None:
    """Overwrite the bytes of a tensor, through any subclass."""
    from .bench import plain_tensors

    for part in plain_tensors(tensor):
        part.detach().zero_()


def _biased(bench: Bench) -> nn.Module:
    """Return the dense model with random biases in every linear layer but the head."""
    import torch

    from ..loading import from_pretrained

    config = copy.deepcopy(bench.dense.config)
    config.attention_bias = config.mlp_bias = True  # type: ignore[union-attr]
    folder, device_map = bench.folder(), {"": bench.suite.device}
    made = type(bench.dense)(config)
    made.load_state_dict(bench.dense.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in made.named_parameters():
        if name.endswith(".bias"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    made.save_pretrained(str(folder))  # type: ignore[operator]
    return from_pretrained(str(folder), dtype=bench.torch_dtype, device_map=device_map).eval()


def _copy_tokenizer(bench: Bench, folder: Any) -> None:
    import shutil
    from pathlib import Path

    for file in Path(bench.source).glob("*token*.json"):
        shutil.copy(file, folder)


def _loss_and_gradients(bench: Bench, reentrant: bool | None) -> dict[str, Tensor]:
    """Return the loss and every gradient of a LoRA model, with or without checkpointing."""
    import torch

    model = bench.attach("lora", r=4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # at its zero start the gradients of lora_A vanish
            generator = torch.Generator().manual_seed(3)
            values = torch.randn(parameter.shape, generator=generator) / 10
            parameter.data.copy_(values)
    if reentrant is not None:
        options = {"use_reentrant": reentrant}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.enable_input_require_grads()
    model.train()
    loss = model(input_ids=bench.ids, labels=bench.ids).loss
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def _quantization(folder: Any) -> Any:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config.get("quantization_config")
