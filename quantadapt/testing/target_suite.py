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
from .tensors import assert_equal, assert_within, digest, plain_tensors, relative

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..facade import QuantLinear


_SAVING = "`save` writes all tensors of a layer, of which `load_linear` (or `load`) makes the same"


class TargetSuite(LayerSuite):
    """The backend without any adapter."""

    # Biases, precision, memory savers ----------------------------------------------------------

    def test_biases_are_kept(self, bench: Bench) -> None:
        import torch

        dense = dict(biased(bench).named_parameters())
        for name, facade in _facades(bench.biased).items():
            fix = "Take the bias of the linear layer over"
            assert facade.bias is not None, f"{name} has lost its bias. {fix}"
            bias, original = facade.bias.detach(), dense[f"{name}.bias"]
            if not bench.rescales:
                assert_equal(bias.to(original), original, f"the bias of {name} is changed", fix)
            x = bench.input_of(facade)
            what = f"with a bias, the output of {name} is off"
            off = relative(facade(x), dense_forward(facade, x))
            assert_within(off, bench.tolerance.forward, what, fix)
            zero = torch.zeros_like(x)
            what = f"for inputs of 0, the output of {name} is not its bias: it differs"
            assert_within(relative(facade(zero)[0, 0], bias), bench.tolerance.vendor, what, fix)

    def test_skipped_modules_stay_dense(self, bench: Bench) -> None:
        from torch import nn

        left = bench.facades().keys() - _facades(bench.biased).keys()
        wanted = {n for n in bench.facades() if n.endswith(f".{bench.skipped}")}
        fix = "`quantize` leaves the layers alone that `skip_modules` names"
        assert left == wanted, f"left dense: {sorted(left)}, not {sorted(wanted)}. {fix}"
        for name in left:
            linear = bench.biased.get_submodule(name)
            assert isinstance(linear, nn.Linear), f"{name} is a {type(linear).__name__}. {fix}"
            if not bench.rescales:
                assert_equal(linear.weight, bench.original(name), f"{name} is changed", fix)

    def test_biases_are_saved(self, bench: Bench) -> None:
        from ..exporting.loading import load
        from ..exporting.saving import save

        folder = save(bench.biased, bench.folder() / "biased")
        loaded = load(folder, device=bench.suite.device)
        found, expected = bench.logits(loaded), bench.logits(bench.biased)
        what = "with biases and a skipped layer, the logits change by saving and loading"
        assert_equal(found, expected, what, _SAVING)

    def test_the_vendors_forward_adds_the_bias(self, bench: Bench) -> None:
        import torch

        for facade in _facades(copy.deepcopy(bench.biased)).values():
            x = bench.input_of(facade)
            with torch.no_grad():
                y = facade.target.forward(facade.vendor, x)
            what = "the target's `forward` of a layer with a bias is off"
            fix = "It adds the bias"
            assert_within(relative(y, dense_forward(facade, x)), bench.tolerance.forward, what, fix)

    def test_bfloat16(self, bench: Bench) -> None:
        import torch

        from ..planning.stage import plan

        if "bfloat16" not in bench.record.dtypes:
            return
        model = bench.quantize(plan(bench.spec(model=bench.source, dtype="bfloat16")))
        for name, facade in _facades(model).items():
            x = bench.input_of(facade).bfloat16()
            y = facade(x)
            found = {facade.weight.dtype, facade.dequantize().dtype, y.dtype}
            fix = "Outputs have the dtype of the inputs; or leave bfloat16 out of `dtypes`"
            assert found == {torch.bfloat16}, f"{name} computes in {found}. {fix}"
            error, allowed = relative(y, dense_forward(facade, x)), bench.tolerance.low_precision
            assert_within(error, allowed, f"in bfloat16, the output of {name} is off", fix)
            if not bench.rescales:
                error = relative(facade.dequantize(), bench.original(name))
                allowed += bench.tolerance.weight.error
                assert_within(error, allowed, f"in bfloat16, the weight of {name} is off", fix)
        found = model(input_ids=bench.ids).logits.dtype
        fix = "What stays dense gets the compute dtype"
        assert found == torch.bfloat16, f"the logits are {found}, not bfloat16. {fix}"

    def test_autocast(self, bench: Bench) -> None:
        import torch

        facade = bench.some_facade()
        x = bench.input_of(facade).requires_grad_()
        expected = facade(x.detach())
        with torch.autocast(bench.ids.device.type, dtype=torch.bfloat16):
            y = facade(x)
        y.float().sum().backward()
        fix = "`forward` and `dequantize` of the target have to work under torch.autocast"
        assert y.dtype == torch.bfloat16, f"under autocast the output is {y.dtype}. {fix}"
        allowed, what = bench.tolerance.low_precision, "under autocast the output is off"
        assert_within(relative(y, expected), allowed, what, fix)
        assert x.grad is not None, f"under autocast the input gets no gradient. {fix}"
        assert x.grad.dtype == x.dtype, f"under autocast the gradient is {x.grad.dtype}. {fix}"
        column_sums = facade.dequantize().float().sum(0).expand_as(x)
        what = "under autocast the gradient of the input is off"
        assert_within(relative(x.grad, column_sums), allowed, what, fix)

    @pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
    def test_gradient_checkpointing(self, bench: Bench, reentrant: bool) -> None:
        plain = _loss_and_gradients(bench, None)
        saved = _loss_and_gradients(bench, reentrant)
        fix = "A layer that runs twice has to give the same: it may not change as it runs"
        differing = sorted(saved.keys() ^ plain.keys())
        assert not differing, (
            f"only with or without checkpointing get a gradient: {differing}. {fix}"
        )
        assert len(plain) > 1, f"no parameter gets a gradient. {fix}"
        for name, value in plain.items():
            what = f"with gradient checkpointing, the gradient of {name} is off"
            assert_within(relative(saved[name], value), bench.tolerance.gradient, what, fix)

    # Copies, names, wrapping -------------------------------------------------------------------

    def test_deepcopy_is_equal_and_apart(self, bench: Bench) -> None:
        model = bench.fresh()
        fix = "`copy.deepcopy` of a layer copies all its tensors and nothing else"
        assert_equal(bench.logits(model), bench.base_logits, "a copy has other logits", fix)
        before = {n: digest(f.dequantize()) for n, f in bench.facades().items()}
        for facade in _facades(model).values():
            for tensor in (*facade.parameters(), *facade.buffers()):
                _scribble(tensor)
        after = {n: digest(f.dequantize()) for n, f in bench.facades().items()}
        assert after == before, f"a copy shares tensors with its original. {fix}"

    def test_state_dict_has_the_vendors_keys(self, bench: Bench) -> None:
        through_facades = bench.base.state_dict()
        native = bench.vendor_model().state_dict()
        # In whatever order: neural-compressor's depends on the hashes of strings.
        fix = "A layer's `state_dict` is the same each time, and leaves the layer as it is"
        differing = sorted(through_facades.keys() ^ native.keys())
        assert not differing, f"these keys come and go: {differing}. {fix}"
        for key, value in native.items():
            assert digest(through_facades[key]) == digest(value), f"{key} has changed. {fix}"

    def test_unwrap_and_wrap_again(self, bench: Bench) -> None:
        from ..facade import wrap

        target = bench.plan.quantizer.target
        model = bench.vendor_model()
        assert not _facades(model)
        missed = set(bench.facades()) - {n for n, m in model.named_modules() if target.matches(m)}
        assert not missed, f"`matches` of the target says no to {sorted(missed)}, which it made"
        # On some CPUs bitsandbytes evaluates in bfloat16; layer by layer the test above is strict.
        vendor_logits = bench.logits(model)
        what = "the model computes otherwise with your layers alone: its logits differ"
        fix = "The layer's own forward, too, is that of the dequantized weight"
        error = relative(vendor_logits, bench.base_logits)
        assert_within(error, bench.tolerance.low_precision, what, fix)
        model = bench.vendor_model()  # a vendor's forward may have changed the one above
        wrap(model, target, bench.torch_dtype, bench.base.quantadapt.skip_modules)  # type: ignore[union-attr, arg-type]
        assert set(_facades(model)) == set(bench.facades())
        what = "wrapped a second time, the model has other logits: they differ"
        assert_equal(bench.logits(model), bench.base_logits, what, "Layers keep no state outside")

    # Where models come from and go to ----------------------------------------------------------

    def test_live_module_is_quantized_as_from_disk(self, bench: Bench) -> None:
        model = bench.quantize(bench.plan, copy.deepcopy(bench.dense))
        fix = "`quantize` does the same to a module as to a checkpoint, at one dtype and device"
        differing = sorted(_facades(model).keys() ^ bench.facades().keys())
        assert not differing, f"of a live module other layers are quantized: {differing}. {fix}"
        what = "a live module and its checkpoint are quantized differently: logits differ"
        assert_equal(bench.logits(model), bench.base_logits, what, fix)

    def test_live_quantized_model_is_adopted(self, bench: Bench) -> None:
        model = bench.quantize(bench.plan, bench.vendor_model())
        what = "a live model that is quantized already has other logits: they differ"
        fix = "`from_model` says that it is yours, and `quantize` is not asked"
        assert_equal(bench.logits(model), bench.base_logits, what, fix)
        _assert_options(bench, model)

    def test_save_and_load_give_equal_logits(self, bench: Bench) -> None:
        from ..exporting.loading import load
        from ..exporting.saving import save

        folder = save(bench.base, bench.folder() / "saved")
        what = "saving changes the model: its logits differ afterwards"
        fix = "`save` leaves the layers as they are"
        assert_equal(bench.logits(bench.base), bench.base_logits, what, fix)
        loaded = load(folder, device=bench.suite.device)
        what = "the logits change by saving and loading"
        assert_equal(bench.logits(loaded), bench.base_logits, what, _SAVING)
        _assert_options(bench, loaded)
        found = _quantization(save(loaded, bench.folder() / "again")), _quantization(folder)
        fix = "`from_checkpoint` reads back all that `quantization_config` says"
        assert found[0] == found[1], f"saved again, config.json says {found}. {fix}"

    def test_saved_checkpoint_is_adopted(self, bench: Bench) -> None:
        from ..exporting.saving import save
        from ..stages import quantize

        folder = save(bench.base, bench.folder() / "saved")
        spec = bench.suite
        model = quantize(str(folder), spec.backend, device=spec.device, dtype=spec.dtype)
        what = "a checkpoint that is quantized already has other logits: they differ"
        assert_equal(bench.logits(model), bench.base_logits, what, _SAVING)
        _assert_options(bench, model)

    def test_other_models_are_not_adopted(self, bench: Bench) -> None:
        quantizer = type(bench.plan.quantizer)
        adopted = quantizer.from_checkpoint({"quant_method": "another backend's"})
        assert adopted is None, (
            "`from_checkpoint` takes what another backend wrote. Return None for it"
        )
        adopted = quantizer.from_model(bench.dense)
        assert adopted is None, (
            "`from_model` takes a model that is not quantized. Return None for it"
        )

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
        what = "a dequantized weight that is quantized again is off"
        fix = "Its largest value gives the scale that it had; or declare Merge.DENSE"
        assert_within(error, bench.tolerance.weight.again, what, fix)
        fix = (
            "`requantize` of the target makes a layer with the options and the bias of the old one"
        )
        same = weight_bytes(facade) == pytest.approx(size, rel=0.01)
        assert same, f"a layer that is quantized again has another size. {fix}"
        assert facade.bias is not None, f"quantized again, a layer has no bias. {fix}"
        assert_equal(facade.bias, bias, "quantized again, the bias is off", fix)
        other = weight.flip(0)
        facade.requantize(other)
        what = "quantized again with another weight, a layer is off"
        error = relative(facade.dequantize(), other)
        assert_within(error, bench.tolerance.weight.merged, what, fix)


def _facades(model: nn.Module) -> dict[str, QuantLinear]:
    from ..facade import linear_facades

    return dict(linear_facades(model))


def _assert_options(bench: Bench, model: nn.Module) -> None:
    """The quantizer that a model is known by has the options that it was made with."""
    from ..quantizing.state import state_of

    found = state_of(model).quantizer
    fix = "`quantization_config` says all options, `from_checkpoint` and `from_model` read them"
    for name, value in bench.suite.options.items():
        known = getattr(found, name)
        assert known == value, f"the option {name} is {value!r}, and then {known!r}. {fix}"


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
