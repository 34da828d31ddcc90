"""The export stage: what a tuned model becomes, each export whole or not at all, told in words.

`export` does one export of a plan. `MergedDense` and `MergedRequantized` merge the adapter into its
base, compare the merged model with it and write it; `merge` does that for a live model.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .. import planning
from ..capabilities import Merge
from ..dependencies import in_turn
from ..errors import MergeRefused, ModelError, PluginError, Problem, refuse_unknown
from ..evaluation.held_out import held_out_data
from ..folders.atomic import atomic_folder, refuse_occupied, refuse_overlap
from ..planning.exports import MERGES, MergeKind, PlannedExport, as_trained_problems, export_of
from ..planning.planned import Plan
from ..protocols import Exporter, Figure
from ..quantizing.examples import examples_from
from ..quantizing.state import ModelState, state_of
from ..records import Adapter
from ..registry.blame import blaming, blaming_plugins
from ..showing.quietly import quiet
from .kept import (
    KEPT,
    MERGE_DENSE,
    ROUND_OTHERWISE,
    TAKE_ANY,
    TRAIN_AWARE,
    Requantizing,
    merge_words,
    refuse_little,
    rounding_words,
)
from .loading import load
from .manifest import MANIFEST, MERGED, read_manifest, write_manifest
from .saving import AdapterFolder
from .tuned import Tuned, memory_in_words

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from torch import nn

    from ..quantizing.examples import Calibration


# Exports ------------------------------------------------------------------------------------------


def export(
    planned: PlannedExport, tuned: Tuned, root: Path
) -> tuple[dict[str, Any], Exception | None]:
    """Write one export of a run into the folder `root`.

    Returns:
        What `metrics.json` says of it: state ("written", "refused" or "failed"), folder, words,
        figures by name, refusals; and the error where it failed.
    """
    error, figures, refusals = None, dict[str, Figure](), planned.refusals
    state, words = "refused", planned.exporter.refused or f"no {planned.name}"
    if not refusals:
        try:
            with blaming(planned.record, "exporting"):
                figures = write(planned.exporter, tuned, root / planned.folder, overwrite=True)
            state, words = "written", done_words(planned, figures)
        except MergeRefused as refusal:  # as measured: the run itself has done what it can
            figures, refusals = refusal.figures, refusal.problems
        except Exception as failure:
            error, state, words = failure, "failed", _failed_words(planned, failure, root)
    entry = {
        "state": state,
        "folder": planned.folder,
        "words": words,
        "figures": {name: figure.to_dict() for name, figure in figures.items()},
        "refusals": [vars(problem) for problem in refusals],
    }
    return entry, error


def write(
    exporter: Exporter, tuned: Tuned, final: Path, *, overwrite: bool = False
) -> dict[str, Figure]:
    """Write the folder `final`, whole or not at all, and return figures about it. It gets a
    `quantadapt.json`, which says what it was made from and that it is ours.

    Raises:
        OutputError: `final` is there already, or cannot be written.
        PluginError: what the exporter returned are no figures.
    """
    if isinstance(exporter, AdapterFolder) and final == tuned.saved:
        return dict(exporter.write(tuned, final))  # it is there since it was saved
    refuse_overlap(final, [tuned.saved, tuned.manifest.get("base"), *exporter.reads])
    refuse_occupied(final, overwrite)
    with atomic_folder(final, overwrite=overwrite, needed=exporter.needed(tuned)) as folder:
        figures = _checked(exporter.write(tuned, folder), exporter)
        if not (folder / MANIFEST).exists():
            text = json.dumps(tuned.manifest, indent=2) + "\n"
            (folder / MANIFEST).write_text(text, encoding="utf-8")
        return figures


def _checked(found: Any, exporter: Exporter) -> dict[str, Figure]:
    """Return the figures that an exporter returned. Raises PluginError."""
    where = f"export {type(exporter).__name__}"
    if not isinstance(found, Mapping):
        fix = "return figures by name, or {} where there is nothing to tell"
        raise PluginError(f"it returned {found!r}, not figures by name", fix=fix, where=where)
    for name, figure in found.items():
        if not isinstance(figure, Figure):
            what = f"figure {name!r}: it is {figure!r}, no Figure"
            raise PluginError(what, fix=f"return Figure({figure!r})", where=where)
    return dict(found)


def done_words(
    planned: PlannedExport, figures: Mapping[str, Figure], place: str | Path = ""
) -> str:
    """Say what was written, to `place` or to its folder in a run's, and what is known of it."""
    said = planned.exporter.done(figures)
    found = [f"{name.replace('_', ' ')} {figure}" for name, figure in figures.items()]
    return ", ".join(
        filter(None, [f"written to {place or planned.folder}/", said or ", ".join(found)])
    )


def _failed_words(planned: PlannedExport, error: Exception, root: Path) -> str:
    text = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    again = f"the adapter is saved; try again with `quantadapt export {root} {planned.name}`"
    return f"failed: {text}; {again}"


def merge_entry(plan: Plan, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `metrics.json` says under `merge`, the former name of what `exports` holds."""
    if plan.merge == "never":
        refused = [vars(problem) for problem in plan.merge_refusals]
        return {"kind": "refused" if refused else "never", "refusals": refused}
    entry = entries[MERGES[plan.merge]]
    figures = {name: figure["value"] for name, figure in entry["figures"].items()}
    if entry["state"] == "refused":
        return {"kind": "refused", **figures, "refusals": entry["refusals"]}
    return {"kind": plan.merge, **figures}


# Merging ------------------------------------------------------------------------------------------


class _Merged(Exporter):
    """A merged model; what was written is read again and compared with the adapter before the
    folder gets its name."""

    kind: ClassVar[MergeKind]

    @property
    def merges(self) -> Merge:
        return Merge[self.kind.upper()]

    @property
    def folder(self) -> str:
        return MERGED

    @property
    def refused(self) -> str:
        return "no merged model"

    def done(self, figures: Mapping[str, Figure]) -> str:
        return merge_words(figures)

    def needed(self, tuned: Tuned) -> int:
        from .merging import merged_bytes

        return merged_bytes(tuned.model, self.kind)

    def write(self, tuned: Tuned, folder: Path) -> Mapping[str, Figure]:
        from ..loading.processors import save_tokenizer
        from .checking import refuse_other_model, sketches

        _refuse_foreign_class(tuned.model)
        _ = tuned.held_out, tuned.gain  # what is wrong with the data is told before the work
        merged, known = self._merged(tuned)
        state = state_of(merged)
        self._save(merged, state, folder)
        if state.tokenizer is not None:
            save_tokenizer(state.tokenizer, folder)
        write_manifest(folder, state, **known)
        meant, kind = sketches(merged), type(merged)
        del merged  # what is read from the files takes its place
        with memory_in_words():
            loaded = self._loaded(kind, state, folder)
        refuse_other_model(meant, loaded)
        return tuned.compared(loaded, lambda figures: self._refuse_far(figures, state, known))

    @abstractmethod
    def _merged(self, tuned: Tuned) -> tuple[nn.Module, dict[str, Any]]:
        """Return the merged model, and what its `quantadapt.json` says besides."""

    @abstractmethod
    def _save(self, merged: Any, state: ModelState, folder: Path) -> None:
        """Write the merged model."""

    @abstractmethod
    def _loaded(self, kind: type[Any], state: ModelState, folder: Path) -> nn.Module:
        """Return the model that was written, read from its files."""

    @abstractmethod
    def _refuse_far(
        self, figures: dict[str, Figure], state: ModelState, known: Mapping[str, Any]
    ) -> None:
        """Raise ModelError where what was written is not as near to the adapter as it has to be,
        MergeRefused where that is what quantizing costs."""


def _refuse_foreign_class(model: PeftModel) -> None:
    from transformers import PreTrainedModel

    if not isinstance(base := model.get_base_model(), PreTrainedModel):
        what = f"{type(base).__name__} is no model of transformers, so there is no format for it"
        fix = "merge in memory, model.merge_and_unload(), and save its state_dict yourself"
        raise ModelError(what, fix=fix)


class MergedDense(_Merged):
    """The adapter merged into dense weights: a checkpoint that transformers loads."""

    kind = "dense"

    def _merged(self, tuned: Tuned) -> tuple[nn.Module, dict[str, Any]]:
        return tuned.merged("dense"), {}

    def _save(self, merged: Any, state: ModelState, folder: Path) -> None:
        merged.save_pretrained(str(folder))

    def _loaded(self, kind: type[Any], state: ModelState, folder: Path) -> nn.Module:
        from .checking import written_model

        return written_model(kind, folder, dtype=state.dtype, device_map={"": state.device})

    def _refuse_far(
        self, figures: dict[str, Figure], state: ModelState, known: Mapping[str, Any]
    ) -> None:
        from .checking import refuse_far

        target = state.quantizer.target
        error = target.activation_error if target.quantizes_activations else 0
        refuse_far(figures, state.dtype, activations=error)

    @property
    def planned(self) -> str:
        return "dense merged model"


class MergedRequantized(_Merged, Requantizing):
    """The adapter merged, and the weights quantized again as the base was."""

    kind = "requantize"

    def done(self, figures: Mapping[str, Figure]) -> str:
        said = merge_words(figures), rounding_words(figures, self.rounding)
        return ", ".join(filter(None, said))

    def _merged(self, tuned: Tuned) -> tuple[nn.Module, dict[str, Any]]:
        from .rounding import rounded

        found = rounded(tuned, self.rounding, self.min_gain)
        known = {"way": found.way, "kept": found.kept, "left_out": found.left_out}
        return found.model, {"rounding": known}

    def _save(self, merged: Any, state: ModelState, folder: Path) -> None:
        state.quantizer.save(merged, folder)

    def _loaded(self, kind: type[Any], state: ModelState, folder: Path) -> nn.Module:
        return load(folder, device=state.device).eval()

    def _refuse_far(
        self, figures: dict[str, Figure], state: ModelState, known: Mapping[str, Any]
    ) -> None:
        from .checking import refuse_no_number

        refuse_no_number(figures)
        told = known["rounding"]
        for way, kept in told["kept"].items():
            figures[f"{KEPT}{way}"] = Figure(kept, "share", "higher")
        words = rounding_words(figures, told["way"])
        ways = self._ways_out(state.merge_aware)
        refuse_little(figures, self.min_gain, words, told["left_out"], ways)

    def _ways_out(self, merge_aware: bool) -> Sequence[str]:
        before = () if merge_aware else (TRAIN_AWARE, ROUND_OTHERWISE)
        return *before, MERGE_DENSE, TAKE_ANY

    @property
    def planned(self) -> str:
        way = "" if self.rounding == "auto" else f", rounding {self.rounding}"
        return f"merged model, quantized again{way}"


class RequantizedContent(MergedRequantized):
    """The same inside of another export, which has options of its own."""

    def _ways_out(self, merge_aware: bool) -> Sequence[str]:
        before = () if merge_aware else (TRAIN_AWARE, "round in another way, rounding=WAY")
        return *before, "take content=merged or content=adapter", "set a lower min_gain=SHARE"


@in_turn
@blaming_plugins
@quiet
def merge(
    model: PeftModel,
    path: str | Path,
    *,
    kind: MergeKind = "dense",
    data: str | Dataset | None = None,
    calibration: Calibration = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Merge the adapter into its base and write `path/merged`; the folder gets its name only when
    what lies in it, read again, answers held-out tokens as the adapter does.

    `model` itself stays as it is.

    Args:
        model: a base with an adapter.
        path: gets a folder `merged` that transformers loads.
        kind: "dense", or "requantize" to quantize the merged weights as the base was.
        data: held-out data for the check, as for `evaluate`; the demo's if missing.
        calibration: as for `quantize`: what a backend that calibrates is shown when it quantizes
            again; by default what it was shown before, if that happened in this process.
        tokenizer: needed for a live module only.
        overwrite: replace an earlier `merged`.
        options: those of `merged-requantized`, e.g. `min_gain=0.8`.

    Returns:
        kind, kl (nats per token), top1 (share), perplexity_adapter, perplexity_merged; gain (nats
        per token that the adapter takes off the loss of the base), gain_error (its standard error)
        and gain_kept (share), where they are known; of a model that predicts no tokens, such as a
        classifier, kind and error (relative, of its answers).

    Raises:
        MergeRefused: a rule forbids it, or too little of the gain is kept; names the rule, the
        reason and the way out. PlanRefused: an option is wrong.
        OutputError: `path/merged` is there already. ModelError: GPU memory does not suffice, or
        what was written is not what was merged.
    """
    refuse_unknown(kind=(kind, MERGES))
    state = state_of(model)
    adapter = check_merge(state, kind)
    shown = calibration is not None
    tuned = Tuned(
        model,
        data=lambda own: held_out_data(data, tokenizer or own, state.max_length),
        examples=(lambda own: examples_from(calibration, tokenizer or own)) if shown else None,
    )
    exporter = export_of(MERGES[kind], options).exporter
    found = [*exporter.refusals(state.cell, state.backend, adapter)]
    if found := [*found, *as_trained_problems(exporter, state.merge_aware)]:
        raise MergeRefused(found)
    final = Path(path).expanduser() / exporter.folder
    figures = write(exporter, tuned, final, overwrite=overwrite)
    known = {"rounding": read_manifest(final)["rounding"]["way"]} if kind == "requantize" else {}
    return {"kind": kind, **known, **{name: figure.value for name, figure in figures.items()}}


def check_merge(state: ModelState, kind: MergeKind) -> Adapter:
    """Return the adapter to merge. Raises MergeRefused where a rule forbids this merge."""
    if state.adapter is None:
        raise MergeRefused([Problem("there is no adapter to merge", "attach and train one first")])
    if found := planning.merge_refusals(state.cell, state.backend, state.adapter, kind):
        raise MergeRefused(found)
    return state.adapter
