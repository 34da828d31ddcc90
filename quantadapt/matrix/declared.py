"""The compatibility matrix: what is declared for each cell.

Declared cells come from the planner's own functions, so the matrix cannot say anything else than
a run would. What was verified is kept apart, in `results`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import ValidationError

from ..capabilities import Merge
from ..errors import Problem, ProblemsError
from ..planning.refusals import attach_refusals, make_cell, merge_refusals
from ..planning.stage import plan
from ..records import Adapter, Backend
from ..spec import Spec

MergeWord = Literal["requantize", "dense", "never"]

MAIN = ("lora", "dora", "vera", "adalora", "ia3")
"""The adapters that every table begins with, and that are verified unless told otherwise."""

MEANING = {
    **{merge.name.lower(): f"trains; merge: {merge.words}" for merge in reversed(Merge)},
    "refused": "refused before any work starts",
}


@dataclass(frozen=True)
class DeclaredCell:
    """What backend and adapter declare about their combination.

    Attributes:
        refusals: why it cannot be attached; empty if it can.
        merge: the most that may become of it; None where it is refused.
        merge_refusals: why `merge` is not more.
        experts: whether the backend quantizes stacks of experts, too.
    """

    backend: str
    adapter: str
    refusals: tuple[Problem, ...] = ()
    merge: MergeWord | None = None
    merge_refusals: tuple[Problem, ...] = ()
    experts: bool = False

    @property
    def word(self) -> str:
        """One of the keys of MEANING."""
        return self.merge or "refused"

    @property
    def rules(self) -> tuple[str, ...]:
        """The ids of the rules behind the word, without repetition."""
        found = self.refusals or self.merge_refusals
        return tuple(dict.fromkeys(problem.rule for problem in found if problem.rule))

    def to_dict(self) -> dict[str, Any]:
        """Return the cell as JSON-ready data."""
        return {
            "backend": self.backend,
            "adapter": self.adapter,
            "declared": self.word,
            "rules": list(self.rules),
            "experts": self.experts,
            "refusals": [vars(problem) for problem in self.refusals],
            "merge_refusals": [vars(problem) for problem in self.merge_refusals],
        }


def backend_title(name: str, options: Mapping[str, Any]) -> str:
    """Return a backend with the options that differ from its defaults: "hqq (bits=3)"."""
    given = ", ".join(f"{option}={value}" for option, value in options.items())
    return f"{name} ({given})" if given else name


def main_first(adapters: Iterable[Adapter]) -> list[Adapter]:
    """Return the adapters, the MAIN ones first and in that order."""
    place = {name: index for index, name in enumerate(MAIN)}
    return sorted(adapters, key=lambda adapter: place.get(adapter.name, len(MAIN)))


def preferred_dtype(device: str) -> str:
    """Return the compute dtype that results on `device` are for, unless told otherwise."""
    return "bfloat16" if device.startswith("cuda") else "float32"


def dtype_for(backend: Backend, device: str, dtype: str | None = None) -> str:
    """Return `dtype`, or if it is None or "auto" the preferred one, or the backend's first."""
    if dtype not in (None, "auto"):
        return str(dtype)
    preferred = preferred_dtype(device)
    return preferred if preferred in backend.dtypes else backend.dtypes[0]


def declared(
    backends: Iterable[Backend],
    adapters: Iterable[Adapter],
    *,
    device: str = "cpu",
    dtype: str | None = None,
) -> list[DeclaredCell]:
    """Return a cell for each combination, backend by backend; `dtype` None is `dtype_for`."""
    adapters = list(adapters)
    return [
        declared_cell(backend, adapter, device=device, dtype=dtype_for(backend, device, dtype))
        for backend in backends
        for adapter in adapters
    ]


def declared_cell(
    backend: Backend,
    adapter: Adapter,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    options: Mapping[str, Any] | None = None,
) -> DeclaredCell:
    """Return what is declared for one combination, with the defaults of both.

    Args:
        options: of the backend, where they are not its defaults.
    """
    found = _declared_cell(backend, adapter, device, dtype, options or {})
    return replace(found, experts=backend.quantizes_experts(options))


def _declared_cell(
    backend: Backend, adapter: Adapter, device: str, dtype: str, options: Mapping[str, Any]
) -> DeclaredCell:
    where = f"{backend.name} x {adapter.name}"
    found = _machine_refusals(backend, device, dtype, where)
    try:
        quantizer = backend.quantizer(**options)
    except ValidationError as error:
        for detail in error.errors():
            what = f"{backend.name} cannot have {detail['loc'][0]}: {detail['msg']}"
            if detail["type"] == "missing":
                what = f"{backend.name} has no default for {detail['loc'][0]}"
            found.append(Problem(what, where=where))
        return DeclaredCell(backend.name, adapter.name, tuple(found))
    cell = make_cell(backend, quantizer, adapter, adapter.defaults, device, dtype)
    found += attach_refusals(cell, backend, adapter)
    if found:
        return DeclaredCell(backend.name, adapter.name, tuple(found))
    requantize = merge_refusals(cell, backend, adapter, "requantize")
    if not requantize:
        return DeclaredCell(backend.name, adapter.name, merge="requantize")
    dense = merge_refusals(cell, backend, adapter, "dense")
    merge: MergeWord = "never" if dense else "dense"
    return DeclaredCell(
        backend.name, adapter.name, merge=merge, merge_refusals=tuple(dense or requantize)
    )


def _machine_refusals(backend: Backend, device: str, dtype: str, where: str) -> list[Problem]:
    found = []
    kind = device.partition(":")[0]
    if kind not in backend.devices:
        fix = f"use device: {', '.join(backend.devices)}"
        found.append(Problem(f"{backend.name} does not run on {kind}", fix, where, "device"))
    if dtype not in backend.dtypes:
        fix = f"use dtype: {', '.join(backend.dtypes)}"
        found.append(Problem(f"{backend.name} does not compute in {dtype}", fix, where, "dtype"))
    return found


def obstacles(
    backend: Backend, options: Mapping[str, Any], device: str, dtype: str
) -> list[Problem]:
    """Return why `backend` cannot be verified here: mistakes, and what is missing, but no rules."""
    try:
        spec = Spec(
            backend={"name": backend.name, **options},
            device=device,
            dtype=dtype,
            export={"merge": "never"},
        )
        plan(spec, check_output=False)
    except ProblemsError as error:
        return [problem for problem in error.problems if not problem.rule]
    return []


def without_defaults(backend: Backend, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that differ from the backend's defaults."""
    fields = backend.quantizer.model_fields
    return {
        name: value
        for name, value in sorted(options.items())
        if name not in fields or fields[name].default != value
    }


def footnotes(cells: Iterable[DeclaredCell]) -> dict[str, Problem]:
    """Return rule id -> the problem that it names, in the order of first use."""
    found: dict[str, Problem] = {}
    for cell in cells:
        for problem in cell.refusals or cell.merge_refusals:
            found.setdefault(problem.rule or problem.what, problem)
    return found
