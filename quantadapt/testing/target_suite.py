"""Is the base sound? Its layers, and the model: precision, copies and checkpoints."""

# ruff: noqa: D102 (the names of the tests are sentences)

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import pytest

from .bench import Bench, weight_bytes
from .layer_suite import LayerSuite, dense_forward
from .small_demo import biased
from .tensors import change, digest, plain_tensors, relative

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..facade import QuantLinear


class TargetSuite(LayerSuite):
    """The backend without any adapter."""

    # Biases, precision, memory savers ----------------------------------------------------------

    def test_biases_are_kept(self, bench: Bench) -> None:
        import torch

        dense = dict(biased(bench).named_parameters())
        for name, facade in _facades(bench.biased).items():
            assert facade.bias is not None, name
            bias, original = facade.bias.detach(), dense[f"{name}.bias"]
            if not bench.rescales:
                assert torch.equal(bias.to(original), original), name
            x = bench.input_of(facade)
            assert relative(facade(x), dense_forward(facade, x)) <= bench.tolerance.forward
            zero = torch.zeros_like(x)
            assert relative(facade(zero)[0, 0], bias) <= bench.tolerance.vendor

    def test_skipped_modules_stay_dense(self, bench: Bench) -> None:
        from torch import nn

        left = bench.facades().keys() - _facades(bench.biased).keys()
        assert left == {n for n in bench.facades() if n.endswith(f".{bench.skipped}")}
        for name in left:
            linear = bench.biased.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            if not bench.rescales:
                assert change(linear.weight, bench.original(name)) == 0

    def test_biases_are_saved(self, bench: Bench) -> None:
        from ..exporting.saving import load, save

        folder = save(bench.biased, bench.folder() / "biased")
        loaded = load(folder, device=bench.suite.device)
        assert change(bench.logits(loaded), bench.logits(bench.biased)) == 0

    def test_the_vendors_forward_adds_the_bias(self, bench: Bench) -> None:
        import torch

        for facade in _facades(copy.deepcopy(bench.biased)).values():
            x = bench.input_of(facade)
            with torch.no_grad():
                y = facade.target.forward(facade.vendor, x)
            assert relative(y, dense_forward(facade, x)) <= bench.tolerance.forward

    def test_bfloat16(self, bench: Bench) -> None:
        import torch

        from ..planning.stage import plan

        if "bfloat16" not in bench.record.dtypes:
            return
        model = bench.quantize(plan(bench.spec(model=bench.source, dtype="bfloat16")))
        for name, facade in _facades(model).items():
            assert facade.weight.dtype == facade.dequantize().dtype == torch.bfloat16
            x = bench.input_of(facade).bfloat16()
            y = facade(x)
            assert y.dtype == torch.bfloat16
            error = relative(y, dense_forward(facade, x))
            assert error <= bench.tolerance.low_precision, name
            if not bench.rescales:
                error = relative(facade.dequantize(), bench.original(name))
                allowed = bench.tolerance.weight.error + bench.tolerance.low_precision
                assert error <= allowed, name
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
        model = bench.quantize(bench.plan, bench.vendor_model())
        assert change(bench.logits(model), bench.base_logits) == 0
        _assert_options(bench, model)

    def test_save_and_load_give_equal_logits(self, bench: Bench) -> None:
        from ..exporting.saving import load, save

        folder = save(bench.base, bench.folder() / "saved")
        assert change(bench.logits(bench.base), bench.base_logits) == 0, "saving changed the model"
        loaded = load(folder, device=bench.suite.device)
        assert change(bench.logits(loaded), bench.base_logits) == 0
        _assert_options(bench, loaded)
        again = save(loaded, bench.folder() / "again")
        assert _quantization(again) == _quantization(folder)

    def test_saved_checkpoint_is_adopted(self, bench: Bench) -> None:
        from ..exporting.saving import save
        from ..stages import quantize

        folder = save(bench.base, bench.folder() / "saved")
        spec = bench.suite
        model = quantize(str(folder), spec.backend, device=spec.device, dtype=spec.dtype)
        assert change(bench.logits(model), bench.base_logits) == 0
        _assert_options(bench, model)

    def test_other_models_are_not_adopted(self, bench: Bench) -> None:
        quantizer = type(bench.plan.quantizer)
        assert quantizer.from_checkpoint({"quant_method": "another backend's"}) is None
        assert quantizer.from_model(bench.dense) is None

    def test_requantizing_the_dequantized_weight(self, bench: Bench) -> None:
        from ..capabilities import Merge

        if bench.record.merge < Merge.REQUANTIZE:
            return
        facade = copy.deepcopy(list(_facades(bench.biased).values())[-1])
        weight, bias = facade.dequantize().clone(), facade.bias.detach().clone()
        size = weight_bytes(facade)
        facade.requantize(weight)
        error = relative(facade.dequantize(), weight)
        bench.note("", idempotence_error=error)
        assert error <= bench.tolerance.weight.again
        assert weight_bytes(facade) == pytest.approx(size, rel=0.01), "other options"
        assert facade.bias is not None
        assert change(facade.bias, bias) == 0
        other = weight.flip(0)
        facade.requantize(other)
        assert relative(facade.dequantize(), other) <= bench.tolerance.weight.merged


def _facades(model: nn.Module) -> dict[str, QuantLinear]:
    from ..facade import facades

    return dict(facades(model))


def _assert_options(bench: Bench, model: nn.Module) -> None:
    """The quantizer that a model is known by has the options that it was made with."""
    from ..quantizing.state import state_of

    found = state_of(model).quantizer
    for name, value in bench.suite.options.items():
        assert getattr(found, name) == value, name


def _scribble(tensor: Tensor) -> None:
    """Overwrite the bytes of a tensor, through any subclass."""
    for part in plain_tensors(tensor):
        part.detach().zero_()


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
