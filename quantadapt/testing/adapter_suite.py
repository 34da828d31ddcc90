"""Does every adapter start, train, come back, and merge as declared?"""

# ruff: noqa: D102 (the names of the tests are sentences)

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest

from .bench import Bench
from .short_training import LEAST_GAIN, STEPS
from .suite import Suite, cells
from .tensors import assert_equal, assert_within, digest, relative

if TYPE_CHECKING:
    from torch import Tensor, nn

_ADALORA = pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")
"""PEFT warns of every AdaLoRA that it loads: its keys name parameters, not modules."""


class AdapterSuite(Suite):
    """The backend under each of the suite's adapters."""

    def test_attaching_changes_nothing(self, bench: Bench, adapter: str) -> None:
        from ..records import Start

        trained = bench.trained(adapter)
        error = relative(trained.start, bench.base_logits)
        bench.note(adapter, start_change=error)
        start = bench.cell_of(adapter)[1].start
        if adapter in bench.suite.rounded and bench.suite.dtype != "float32":
            start = Start.ROUNDING
        what = f"attaching {adapter} changes the logits"
        if start is Start.ZERO:
            fix = "Declare Start.ROUNDING or Start.CHANGED in its record, if it should"
            assert_equal(trained.start, bench.base_logits, what, fix)
        elif start is Start.ROUNDING:  # such methods compute with the weight, without the vendor
            allowed = max(bench.tolerance.attach, bench.tolerance.activations)
            fix = "Declare Start.CHANGED in its record, if it should"
            assert_within(error, allowed, what, fix)
        else:
            least = bench.tolerance.attach if bench.suite.dtype == "float32" else 0.0
            assert error > least, f"{adapter} starts at zero: declare it, Start.ZERO, in its record"

    def test_loss_falls(self, bench: Bench, adapter: str) -> None:
        losses = bench.trained(adapter).losses
        bench.note(adapter, loss_before=losses[0], loss_after=losses[-1])
        shown = ", ".join(f"{loss:.3f}" for loss in losses)
        fix = "Do gradients reach the adapter, through the layers and in it?"
        assert all(loss == loss for loss in losses), f"losses are no numbers: {shown}. {fix}"
        falls = losses[-1] < losses[0] * (1 - LEAST_GAIN)
        assert falls, f"the loss does not fall by {LEAST_GAIN:.0%} in {STEPS} steps: {shown}. {fix}"

    def test_only_adapter_parameters_move(self, bench: Bench, adapter: str) -> None:
        trained = bench.trained(adapter)
        assert trained.moved, "training moves no parameter: does any get a gradient?"
        frozen = sorted((trained.moved | trained.with_gradient) - trained.trainable)
        assert not frozen, f"these move or get gradients though they are frozen: {frozen[:3]}. Why?"
        of_base = sorted(trained.of_base)
        assert not of_base, f"these are the base's, and trainable: {of_base[:3]}. Freeze them"

    def test_base_stays_byte_for_byte(self, bench: Bench, adapter: str) -> None:
        at = bench.trained(adapter).base_at
        assert at["before"], "the base holds no tensors: what does the layer compute with?"
        changed = _differing(at["start"], at["end"])
        fix = "A layer may not change as it runs, nor an adapter write into it"
        assert not changed, f"training changes the base: {changed[:3]}. {fix}"
        if adapter not in bench.suite.rewrites_base:
            changed = _differing(at["before"], at["start"])
            fix = "If that is meant, name it in `rewrites_base` of the suite's class"
            assert not changed, f"attaching {adapter} changes the base: {changed[:3]}. {fix}"

    def test_disabled_adapter_leaves_the_base(self, bench: Bench, adapter: str) -> None:
        model = bench.trained(adapter).model
        with model.disable_adapter():
            logits = bench.logits(model)
        fix = "A layer whose adapter is disabled is its base layer, and comes back when enabled"
        if adapter not in bench.suite.rewrites_base:
            what = f"with {adapter} disabled, the logits differ from those of the base"
            assert_equal(logits, bench.base_logits, what, fix)
        what = f"disabled and enabled again, {adapter} gives other logits: they differ"
        assert_equal(bench.logits(model), bench.trained(adapter).tuned, what, fix)

    def test_save_and_load(self, bench: Bench, adapter: str) -> None:
        from ..exporting.loading import load
        from ..exporting.saving import save

        trained = bench.trained(adapter)
        folder = save(trained.model, bench.folder())
        loaded = load(folder, base=bench.fresh())
        error = relative(bench.logits(loaded), trained.tuned)
        bench.note(adapter, reload_error=error)
        what = f"the logits change by saving and loading {adapter}"
        assert_within(error, bench.reload_tolerance(adapter), what, _RELOADED)

    @_ADALORA
    def test_vanilla_peft_loads_it(self, bench: Bench, adapter: str) -> None:
        from peft import PeftModel

        trained = bench.trained(adapter)
        folder = bench.folder()
        trained.model.save_pretrained(str(folder))
        loaded = PeftModel.from_pretrained(bench.fresh(), str(folder))
        error = relative(bench.logits(loaded), trained.tuned)
        what = f"loaded by PEFT itself, {adapter} gives other logits: they differ"
        # PEFT's own LoRA layers add in another order.
        assert_within(error, bench.tolerance.vendor, what, _RELOADED)

    def test_load_quantizes_the_recorded_base(self, bench: Bench, adapter: str) -> None:
        from ..exporting.loading import load
        from ..exporting.saving import save

        if adapter != bench.adapters_for("attach")[0]:
            return  # once is enough
        trained = bench.trained(adapter)
        loaded = load(save(trained.model, bench.folder()), device=bench.suite.device)
        error = relative(bench.logits(loaded), trained.tuned)
        what = (
            "loaded onto the base that it names, quantized anew, an adapter gives other logits: off"
        )
        fix = "Quantizing one checkpoint twice has to give the same"
        assert_within(error, bench.reload_tolerance(adapter), what, fix)

    def test_adalora_moves_its_budget(self, bench: Bench, adapter: str) -> None:
        if adapter != "adalora":
            return
        trained = bench.trained("adalora")
        config: Any = trained.model.peft_config["default"]
        count = len(bench.facades())
        assert trained.allocated[0] == count * config.init_r
        assert trained.allocated[-1] == count * config.target_r
        kept = [sum(flags) for flags in config.rank_pattern.values()]
        assert sum(kept) == count * config.target_r

    # Merging -----------------------------------------------------------------------------------

    @cells("dense")
    def test_dense_merge(self, bench: Bench, adapter: str) -> None:
        from ..exporting.merging import merged_model
        from ..facade import densify, facades

        trained = bench.trained(adapter)
        before = _tensors(trained.model)
        merged = merged_model(trained.model, "dense")
        logits = bench.logits(merged)
        assert not list(facades(merged)), "a dense merge leaves quantized layers"
        exact = bench.logits(densify(copy.deepcopy(trained.model)))
        bench.note(
            adapter,
            merge_error=relative(logits, trained.tuned),
            merge_error_dense=relative(logits, exact),
        )
        fix = f"Does `merge` of {adapter} do what its forward does? Else declare Merge.NEVER"
        what = "merged, the logits differ from those of the adapter on the dequantized base"
        assert_within(relative(logits, exact), bench.tolerance.vendor, what, fix)
        what = "merged, the logits differ from those of the adapter"
        allowed = bench.tolerance.activations
        assert_within(relative(logits, trained.tuned), allowed, what, fix)
        self._is_as_before(bench, adapter, before)

    @cells("dense")
    def test_merged_model_is_an_ordinary_checkpoint(self, bench: Bench, adapter: str) -> None:
        from transformers import AutoModelForCausalLM

        from ..exporting.merging import merged_model

        merged = merged_model(bench.trained(adapter).model, "dense")
        folder = bench.folder()
        merged.save_pretrained(str(folder))  # type: ignore[operator]
        loaded: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=bench.torch_dtype)
        loaded = loaded.to(bench.suite.device)
        what = "the merged model, saved and loaded by transformers, has other logits: they differ"
        fix = "A merge leaves plain linear layers in the compute dtype"
        assert type(loaded) is type(bench.dense), f"it is a {type(loaded).__name__}. {fix}"
        assert_equal(bench.logits(loaded), bench.logits(merged), what, fix)

    @cells("onto")
    @_ADALORA
    def test_merge_onto_the_unquantized_base(self, bench: Bench, adapter: str) -> None:
        """It is what PEFT makes of the unquantized model and the adapter, in memory in float32."""
        from peft import PeftModel

        from ..exporting.onto import merge_onto
        from ..exporting.saving import save
        from ..loading.reading import from_pretrained

        device, dtype = bench.suite.device, bench.torch_dtype
        folder = bench.folder()
        adapter_folder = save(bench.trained(adapter).model, folder, base=False)
        found = merge_onto(adapter_folder, bench.source, folder, check=False, device=device)
        assert found["layers"] == len(bench.facades())
        tuned: nn.Module = PeftModel.from_pretrained(
            copy.deepcopy(bench.dense).float(),  # type: ignore[arg-type]
            str(adapter_folder),
        )
        device_map = {"": device}
        merged = from_pretrained(str(folder / "merged"), dtype=dtype, device_map=device_map)
        error = relative(bench.logits(merged), bench.logits(tuned))
        bench.note(adapter, onto_error=error)
        what = "merged onto the unquantized base, the logits differ from PEFT's"
        fix = "`merge` of the adapter works on any linear layer; else a rule refuses action `onto`"
        assert_within(error, bench.tolerance.vendor, what, fix)

    @cells("requantize")
    def test_requantized_merge(self, bench: Bench, adapter: str) -> None:
        from ..exporting.merging import merged_model
        from ..facade import facades

        trained = bench.trained(adapter)
        before = _tensors(trained.model)
        dense = merged_model(trained.model, "dense")
        again = merged_model(trained.model, "requantize")
        found = dict(facades(again))
        differing = sorted(found.keys() ^ bench.facades().keys())
        assert not differing, f"quantized again, other layers are quantized: {differing[:3]}"
        errors = [
            relative(facade.dequantize(), _weight(dense, name)) for name, facade in found.items()
        ]
        bench.note(adapter, requantize_error=max(errors))
        what = "merged and quantized again, weights differ from the merged ones"
        fix = f"Does `requantize` take the new weight? {bench.bits_in_words()}"
        assert_within(max(errors), bench.tolerance.weight.merged, what, fix)
        self._is_as_before(bench, adapter, before)

    @cells("requantize")
    def test_requantized_merge_keeps_biases(self, bench: Bench, adapter: str) -> None:
        """Those of the base, trained ones (PEFT's `bias: all`), and what the files hold of them."""
        from ..exporting.merging import merged_model
        from ..facade import facades
        from ..quantizing.state import state_of

        if adapter != bench.adapters_for("requantize")[0] or bench.plan.calibrates:
            return
        model = bench.attach(adapter, copy.deepcopy(bench.biased))
        biased = {_plain(name): facade.bias for name, facade in facades(model)}
        assert biased, "no layer of the suite's model with biases is quantized"
        for bias in biased.values():
            bias.data += 0.25
        merged = merged_model(model, "requantize")
        folder = bench.folder()
        state_of(model).quantizer.save(merged, folder)
        fix = "`requantize` of the target keeps the bias"
        for where, found in (("", merged), (", saved and loaded", _load_base(bench, folder))):
            for name, bias in biased.items():
                kept: Any = found.get_submodule(name).bias
                assert kept is not None, f"the bias of {name} is gone{where}. {fix}"
                what = f"merged and quantized again{where}, the bias of {name} is off"
                assert_equal(kept, bias, what, fix)

    @cells("requantize")
    def test_requantized_merge_is_saved(self, bench: Bench, adapter: str) -> None:
        from ..exporting.merging import merged_model
        from ..quantizing.state import state_of

        if adapter != bench.adapters_for("requantize")[0]:
            return
        model = bench.trained(adapter).model
        state = state_of(model)
        merged = merged_model(model, "requantize")
        folder = bench.folder()
        state.quantizer.save(merged, folder)
        loaded = _load_base(bench, folder)
        what = "merged, quantized again and saved, the model has other logits: they differ"
        fix = "`save` and `load` know what `requantize` makes"
        assert_equal(bench.logits(loaded), bench.logits(merged), what, fix)

    def _is_as_before(self, bench: Bench, adapter: str, before: dict[str, str]) -> None:
        """Merging makes a model of its own."""
        trained = bench.trained(adapter)
        changed = _differing(before, _tensors(trained.model))
        fix = "`merge` writes into its base layer alone, `requantize` into a new one"
        assert not changed, f"merging changed the model that was merged: {changed[:3]}. {fix}"
        what = "merging changed the logits of the model that was merged: they differ"
        assert_equal(bench.logits(trained.model), trained.tuned, what, fix)


_RELOADED = "All that the method trained has to be in the adapter's file, under PEFT's names"


def _load_base(bench: Bench, folder: Any) -> nn.Module:
    """Load a quantized checkpoint into facades."""
    from ..facade import wrap

    quantizer = bench.plan.quantizer
    model = quantizer.load(str(folder), device=bench.suite.device, dtype=bench.torch_dtype)
    skip: tuple[str, ...] = bench.base.quantadapt.skip_modules  # type: ignore[union-attr, assignment]
    return wrap(model, quantizer.target, bench.torch_dtype, skip)


def _plain(name: str) -> str:
    """Return the name of a layer of the base, of a model with an adapter."""
    return name.removeprefix("base_model.model.").removesuffix(".base_layer")


def _differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return sorted({name for name, _ in one.items() ^ other.items()})


def _weight(model: nn.Module, name: str) -> Tensor:
    weight: Any = model.get_submodule(name).weight
    return weight.detach()  # type: ignore[no-any-return]


def _tensors(model: nn.Module) -> dict[str, str]:
    """Return a digest of every tensor of a model, facades included."""
    return {name: digest(value) for name, value in model.state_dict().items()}
