"""Does every adapter start, train, come back, and merge as declared?"""

# ruff: noqa: D102 (the names of the tests are sentences)

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from .bench import Bench
from .short_training import LEAST_GAIN
from .suite import Suite, cells
from .tensors import change, digest, relative

if TYPE_CHECKING:
    from torch import Tensor, nn


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
        if start is Start.ZERO:
            assert change(trained.start, bench.base_logits) == 0
        elif start is Start.ROUNDING:  # such methods compute with the weight, without the vendor
            assert error <= max(bench.tolerance.attach, bench.tolerance.activations)
        else:
            least = bench.tolerance.attach if bench.suite.dtype == "float32" else 0.0
            assert error > least, "it starts at zero: declare it"

    def test_loss_falls(self, bench: Bench, adapter: str) -> None:
        losses = bench.trained(adapter).losses
        bench.note(adapter, loss_before=losses[0], loss_after=losses[-1])
        assert all(loss == loss for loss in losses)
        assert losses[-1] < losses[0] * (1 - LEAST_GAIN)

    def test_only_adapter_parameters_move(self, bench: Bench, adapter: str) -> None:
        trained = bench.trained(adapter)
        assert trained.moved
        assert trained.moved <= trained.trainable
        assert trained.with_gradient <= trained.trainable
        assert not trained.of_base

    def test_base_stays_byte_for_byte(self, bench: Bench, adapter: str) -> None:
        at = bench.trained(adapter).base_at
        assert at["before"]
        assert at["end"] == at["start"]
        if adapter not in bench.suite.rewrites_base:
            assert at["start"] == at["before"]

    def test_disabled_adapter_leaves_the_base(self, bench: Bench, adapter: str) -> None:
        model = bench.trained(adapter).model
        with model.disable_adapter():
            logits = bench.logits(model)
        if adapter not in bench.suite.rewrites_base:
            assert change(logits, bench.base_logits) == 0
        assert change(bench.logits(model), bench.trained(adapter).tuned) == 0

    def test_save_and_load(self, bench: Bench, adapter: str) -> None:
        from ..exporting.saving import load, save

        trained = bench.trained(adapter)
        folder = save(trained.model, bench.folder())
        loaded = load(folder, base=bench.fresh())
        error = relative(bench.logits(loaded), trained.tuned)
        bench.note(adapter, reload_error=error)
        assert error <= bench.reload_tolerance(adapter)

    def test_vanilla_peft_loads_it(self, bench: Bench, adapter: str) -> None:
        from peft import PeftModel

        trained = bench.trained(adapter)
        folder = bench.folder()
        trained.model.save_pretrained(str(folder))
        loaded = PeftModel.from_pretrained(bench.fresh(), str(folder))
        error = relative(bench.logits(loaded), trained.tuned)
        assert error <= bench.tolerance.vendor  # PEFT's own LoRA layers add in another order

    def test_load_quantizes_the_recorded_base(self, bench: Bench, adapter: str) -> None:
        from ..exporting.saving import load, save

        if adapter != bench.adapters_for("attach")[0]:
            return  # once is enough
        trained = bench.trained(adapter)
        loaded = load(save(trained.model, bench.folder()), device=bench.suite.device)
        error = relative(bench.logits(loaded), trained.tuned)
        assert error <= bench.reload_tolerance(adapter)

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
        assert not list(facades(merged))
        exact = bench.logits(densify(copy.deepcopy(trained.model)))
        bench.note(
            adapter,
            merge_error=relative(logits, trained.tuned),
            merge_error_dense=relative(logits, exact),
        )
        assert relative(logits, exact) <= bench.tolerance.vendor
        assert relative(logits, trained.tuned) <= bench.tolerance.activations
        assert _tensors(trained.model) == before, "merging changed the model that was merged"
        assert change(bench.logits(trained.model), trained.tuned) == 0

    @cells("dense")
    def test_merged_model_is_an_ordinary_checkpoint(self, bench: Bench, adapter: str) -> None:
        from transformers import AutoModelForCausalLM

        from ..exporting.merging import merged_model

        merged = merged_model(bench.trained(adapter).model, "dense")
        folder = bench.folder()
        merged.save_pretrained(str(folder))  # type: ignore[operator]
        loaded: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=bench.torch_dtype)
        loaded = loaded.to(bench.suite.device)
        assert type(loaded) is type(bench.dense)
        assert change(bench.logits(loaded), bench.logits(merged)) == 0

    @cells("onto")
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
        assert error <= bench.tolerance.vendor

    @cells("requantize")
    def test_requantized_merge(self, bench: Bench, adapter: str) -> None:
        from ..exporting.merging import merged_model
        from ..facade import facades

        trained = bench.trained(adapter)
        before = _tensors(trained.model)
        dense = merged_model(trained.model, "dense")
        again = merged_model(trained.model, "requantize")
        found = dict(facades(again))
        assert set(found) == set(bench.facades())
        errors = [
            relative(facade.dequantize(), _weight(dense, name)) for name, facade in found.items()
        ]
        bench.note(adapter, requantize_error=max(errors))
        assert max(errors) <= bench.tolerance.weight.merged
        assert _tensors(trained.model) == before, "merging changed the model that was merged"
        assert change(bench.logits(trained.model), trained.tuned) == 0

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
        assert change(bench.logits(loaded), bench.logits(merged)) == 0


def _load_base(bench: Bench, folder: Any) -> nn.Module:
    """Load a quantized checkpoint into facades."""
    from ..facade import wrap

    quantizer = bench.plan.quantizer
    model = quantizer.load(str(folder), device=bench.suite.device, dtype=bench.torch_dtype)
    skip: tuple[str, ...] = bench.base.quantadapt.skip_modules  # type: ignore[union-attr, assignment]
    return wrap(model, quantizer.target, bench.torch_dtype, skip)


def _weight(model: nn.Module, name: str) -> Tensor:
    weight: Any = model.get_submodule(name).weight
    return weight.detach()  # type: ignore[no-any-return]


def _tensors(model: nn.Module) -> dict[str, str]:
    """Return a digest of every tensor of a model, facades included."""
    return {name: digest(value) for name, value in model.state_dict().items()}
