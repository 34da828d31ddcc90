"""What a run writes at its end: the exports that the spec names, and why one of them is refused.

As pure as the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..capabilities import Merge
from ..errors import PlanRefused, Problem
from ..machine import this_machine
from ..protocols import Exporter
from ..records import Backend, Export
from ..registry.discovery import registry
from ..spec import ExportSpec, Named, Spec
from .parts import Draft, options_of, record_of

MergeKind = Literal["dense", "requantize"]

ADAPTER = "adapter"
"""The export that is there in every run, before all others."""
MERGES: dict[MergeKind, str] = {"dense": "merged-dense", "requantize": "merged-requantized"}
"""`export.merge` -> the export that it is short for; `auto` is `dense` where that is allowed, of a
run that trains through the quantizer `requantize`."""


@dataclass(frozen=True)
class PlannedExport:
    """One export of a run.

    Attributes:
        required: the spec asks for it, so that the run is refused where it is.
        refusals: why it is not written; empty if it will be.
    """

    record: Export
    exporter: Exporter
    required: bool = True
    refusals: tuple[Problem, ...] = ()

    @property
    def name(self) -> str:
        """The export's name."""
        return self.record.name

    @property
    def folder(self) -> str:
        """The folder that it writes, in that of the run."""
        return self.exporter.folder or self.name

    @property
    def words(self) -> str:
        """What will be written, or that it will not be and which rules are against it."""
        planned = self.exporter.planned or self.name
        if not self.refusals:
            return planned
        rules = ", ".join(problem.rule or problem.what for problem in self.refusals)
        return f"{self.exporter.refused or f'no {planned}'} ({rules})"

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-ready data."""
        return {
            "name": self.name,
            "words": self.words,
            "options": self.exporter.model_dump(mode="json"),
            "refusals": [vars(problem) for problem in self.refusals],
        }


def export_of(name: str, options: Mapping[str, Any]) -> PlannedExport:
    """Return one export by itself. Raises PlanRefused where name or options are wrong."""
    draft = Draft(Spec(), this_machine(), registry())
    found = _export(draft, Named(name=name, **options), required=True)
    if draft.problems or found is None:
        raise PlanRefused(draft.problems)
    return found


def exports_of(draft: Draft) -> tuple[PlannedExport, ...]:
    """Return the exports that the spec names, the adapter first; rules are not looked at yet."""
    auto: MergeKind = "requantize" if draft.spec.train.merge_aware else "dense"
    named = _named(draft.spec.export, auto)
    made = [_export(draft, each, required) for each, required in named]
    found = [_with_options(export, draft.spec.export) for export in made if export is not None]
    draft.problems += [*_same_folder(found), *_of_no_effect(draft.spec.export, found)]
    for export in found:
        draft.problems += as_trained_problems(export.exporter, draft.spec.train.merge_aware)
    return tuple(found)


def _export(draft: Draft, named: Named, required: bool) -> PlannedExport | None:
    record = record_of(draft, Export, named)
    exporter = options_of(draft, record, named, lambda export: export.exporter)
    return PlannedExport(record, exporter, required) if record and exporter else None


def _named(spec: ExportSpec, auto: MergeKind) -> Iterable[tuple[Named, bool]]:
    """Yield what `merge` and `formats` name, and whether it is required."""
    short = None
    if spec.merge != "never":
        short = MERGES[auto if spec.merge == "auto" else spec.merge]
    listed = [named.name for named in spec.formats]
    for name in (ADAPTER, short):
        if name and name not in listed:
            yield Named(name=name), spec.merge != "auto"
    for named in sorted(spec.formats, key=lambda named: named.name != ADAPTER):
        yield named, True


def _with_options(export: PlannedExport, spec: ExportSpec) -> PlannedExport:
    """Return an export with what `export` says of merges that quantize again, where it is one that
    says nothing itself."""
    exporter = export.exporter
    if not _requantizes(exporter):
        return export
    own = exporter.model_fields_set
    general = {name: getattr(spec, name) for name in _OPTIONS if name not in own}
    return replace(export, exporter=exporter.model_copy(update=general))


def _requantizes(exporter: Exporter) -> bool:
    return exporter.merges == Merge.REQUANTIZE and type(exporter).model_fields.keys() >= _OPTIONS


_OPTIONS = {"min_gain", "rounding"}
"""Options of exports that quantize again, which the spec has too, under `export`."""


def _of_no_effect(spec: ExportSpec, found: Sequence[PlannedExport]) -> list[Problem]:
    """Return a problem for each of these options that is set where nothing is quantized again."""
    if any(_requantizes(export.exporter) for export in found):
        return []
    what = "it has no effect: no merged model of this run is quantized again"
    fix = "leave it out, or set export.merge to requantize"
    fields = ExportSpec.model_fields
    changed = (name for name in sorted(_OPTIONS) if getattr(spec, name) != fields[name].default)
    return [Problem(what, fix, where=f"export.{name}") for name in changed]


AS_TRAINED = "dithered"
"""How the weights of a model are rounded that was trained through the quantizer."""


def rounding_as_trained(rounding: str) -> Problem | None:
    """Return why such a model is not rounded in this way; None if it is."""
    if rounding in ("auto", AS_TRAINED):
        return None
    what = f"the adapter is trained with {AS_TRAINED} weights, and {rounding} makes another model"
    return Problem(what, "leave it out", "export.rounding", "merge-aware-rounding")


def as_trained_problems(exporter: Exporter, merge_aware: bool) -> list[Problem]:
    """Return why an export does not round as the model was trained, if it was through the
    quantizer; empty if it does, or rounds nothing."""
    if not merge_aware:
        return []
    problem = rounding_as_trained(getattr(exporter, "rounding", "auto"))
    return [*filter(None, [problem]), *exporter.refusals_of_rounded()]


def _same_folder(found: Sequence[PlannedExport]) -> list[Problem]:
    """Return a problem for each export that would write over an earlier one."""
    problems = []
    for index, export in enumerate(found):
        for other in (e for e in found[:index] if e.folder == export.folder):
            what = f"{other.name} and {export.name} both write {export.folder}/"
            fix = f"write one of them later: quantadapt export RUN {export.name} --output DIR"
            problems.append(Problem(what, fix, where="export"))
    return problems


def refused_where(
    exports: Iterable[PlannedExport], why: Callable[[PlannedExport], Iterable[Problem]]
) -> tuple[PlannedExport, ...]:
    """Return the exports, those that nothing is against yet with what `why` says of them."""
    return tuple(e if e.refusals else replace(e, refusals=tuple(why(e))) for e in exports)


def makes_dense(export: PlannedExport, backend: Backend, merge_aware: bool) -> bool:
    """Say whether the whole model has to be made dense on the way.

    Args:
        merge_aware: whether it is trained through the quantizer, and so keeps its scales.
    """
    merges = export.exporter.merges
    if merges != Merge.REQUANTIZE:
        return merges == Merge.DENSE
    rounding = getattr(export.exporter, "rounding", "nearest")
    whole = ("nearest", "compensated") if backend.calibration else ("compensated",)
    return not merge_aware and rounding in whole
