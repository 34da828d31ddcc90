"""The compatibility matrix: what is declared for each cell, and, kept apart, what was verified.

Declared cells come from the planner's own functions, so the matrix cannot say anything else than
a run would. Verified results are read from a file that the conformance suite wrote:

    {"generated": {"date": "...", "device": "...", "versions": {"torch": "..."}},
     "cells": [{"backend": "hqq", "adapter": "lora", "verified": "passed", "merge_error": 1e-7}]}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError

from .errors import DataError, Problem
from .planning import attach_refusals, make_cell, merge_refusals
from .records import Adapter, Backend

MergeWord = Literal["requantize", "dense", "never"]
Outcome = Literal["passed", "refused", "failed", "not run"]

BUNDLED = Path(__file__).with_name("matrix.json")
"""The verified results that come with this version, if any do."""

MEANING = {
    "requantize": "trains; merges into dense weights, or quantized again",
    "dense": "trains; merges into dense weights",
    "never": "trains; the adapter stays beside the base",
    "refused": "refused before any work starts",
}


@dataclass(frozen=True)
class DeclaredCell:
    """What backend and adapter declare about their combination, with default options.

    Attributes:
        refusals: why it cannot be attached; empty if it can.
        merge: the most that may become of it; None where it is refused.
        merge_refusals: why `merge` is not more.
    """

    backend: str
    adapter: str
    refusals: tuple[Problem, ...] = ()
    merge: MergeWord | None = None
    merge_refusals: tuple[Problem, ...] = ()

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
            "refusals": [vars(problem) for problem in self.refusals],
            "merge_refusals": [vars(problem) for problem in self.merge_refusals],
        }


@dataclass(frozen=True)
class VerifiedCell:
    """What a test of one cell found; `merge_error` is relative, null where nothing was merged."""

    backend: str
    adapter: str
    verified: Outcome
    merge_error: float | None = None
    detail: str = ""

    def text(self) -> str:
        """Return the outcome and the merge error."""
        error = "" if self.merge_error is None else f" {self.merge_error:.0e}"
        return f"{self.verified}{error}"


@dataclass(frozen=True)
class Verified:
    """One file of verified results: where and with what they were found, and the cells."""

    generated: Mapping[str, Any]
    cells: tuple[VerifiedCell, ...]
    source: str = ""

    @property
    def origin(self) -> str:
        """Say where and with which versions, in one line."""
        facts = dict(self.generated)
        versions = facts.pop("versions", None) or {}
        if python := facts.pop("python", None):
            versions = {"python": python, **versions}
        parts = [str(value) for value in facts.values() if value]
        parts += [f"{name} {version}" for name, version in versions.items() if version]
        return ", ".join(parts) or "unknown"

    def to_dict(self) -> dict[str, Any]:
        """Return it in the format of the file."""
        return {"generated": dict(self.generated), "cells": [vars(cell) for cell in self.cells]}


def declared(
    backends: Iterable[Backend],
    adapters: Iterable[Adapter],
    *,
    device: str = "cpu",
    dtype: str = "float32",
) -> list[DeclaredCell]:
    """Return a cell for each combination, backend by backend."""
    adapters = list(adapters)
    return [
        declared_cell(backend, adapter, device=device, dtype=dtype)
        for backend in backends
        for adapter in adapters
    ]


def declared_cell(
    backend: Backend, adapter: Adapter, *, device: str = "cpu", dtype: str = "float32"
) -> DeclaredCell:
    """Return what is declared for one combination, with the defaults of both."""
    where = f"{backend.name} x {adapter.name}"
    found = _machine_refusals(backend, device, dtype, where)
    try:
        quantizer = backend.quantizer()
    except ValidationError as error:  # an option without a default
        missing = ", ".join(str(detail["loc"][0]) for detail in error.errors())
        found.append(Problem(f"{backend.name} has no default for {missing}", where=where))
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


def read_verified(path: str | Path) -> Verified:
    """Read a file of verified results. Raises DataError where it is none."""
    fix = "write it with the conformance suite of quantadapt.testing"
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read it: {error.strerror}", fix=fix, where=str(path)) from None
    except ValueError as error:
        raise DataError(f"not valid JSON: {error}", fix=fix, where=str(path)) from None
    try:
        cells = tuple(_verified_cell(cell) for cell in values["cells"])
        return Verified(dict(values.get("generated", {})), cells, str(path))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"not a file of verified results: {error!r}"
        raise DataError(what, fix=fix, where=str(path)) from None


def _verified_cell(values: Mapping[str, Any]) -> VerifiedCell:
    outcome = values["verified"]
    if outcome not in get_args(Outcome):
        raise ValueError(f"verified is {outcome!r}")
    error = values.get("merge_error")
    return VerifiedCell(
        str(values["backend"]),
        str(values["adapter"]),
        outcome,
        None if error is None else float(error),
        str(values.get("detail", "")),
    )


def bundled() -> list[Verified]:
    """Return the verified results that come with this version."""
    return [read_verified(BUNDLED)] if BUNDLED.exists() else []


def to_json(cells: Sequence[DeclaredCell], verified: Sequence[Verified]) -> dict[str, Any]:
    """Return both parts as JSON-ready data."""
    return {
        "declared": [cell.to_dict() for cell in cells],
        "verified": [part.to_dict() for part in verified],
    }


def to_markdown(cells: Sequence[DeclaredCell], verified: Sequence[Verified]) -> str:
    """Return both parts as Markdown, for `docs/` and the README."""
    parts = ["### Declared", "", *_declared_table(cells), "", *_legend(cells)]
    for part in verified:
        parts += ["", "### Verified", "", f"On {part.origin}.", "", *_verified_table(part)]
    if not verified:
        parts += ["", "### Verified", "", "No results at hand."]
    return "\n".join(parts) + "\n"


def footnotes(cells: Iterable[DeclaredCell]) -> dict[str, Problem]:
    """Return rule id -> the problem that it names, in the order of first use."""
    found: dict[str, Problem] = {}
    for cell in cells:
        for problem in cell.refusals or cell.merge_refusals:
            found.setdefault(problem.rule or problem.what, problem)
    return found


def grid(cells: Sequence[DeclaredCell | VerifiedCell]) -> tuple[list[str], list[str]]:
    """Return the names of the backends and of the adapters, in order of appearance."""
    backends = dict.fromkeys(cell.backend for cell in cells)
    return list(backends), list(dict.fromkeys(cell.adapter for cell in cells))


def _declared_table(cells: Sequence[DeclaredCell]) -> list[str]:
    notes = list(footnotes(cells))
    words = {}
    for cell in cells:
        marks = [str(notes.index(rule) + 1) for rule in cell.rules]
        words[cell.backend, cell.adapter] = " ".join([cell.word, *(f"[{m}]" for m in marks)])
    return _markdown(*grid(cells), words)


def _verified_table(part: Verified) -> list[str]:
    words = {(cell.backend, cell.adapter): cell.text() for cell in part.cells}
    return _markdown(*grid(part.cells), words)


def _markdown(
    backends: list[str], adapters: list[str], words: Mapping[tuple[str, str], str]
) -> list[str]:
    head = f"| adapter | {' | '.join(backends)} |"
    lines = [head, "|" + " --- |" * (len(backends) + 1)]
    for adapter in adapters:
        row = [words.get((backend, adapter), "") for backend in backends]
        lines.append(f"| {adapter} | {' | '.join(row)} |")
    return lines


def _legend(cells: Sequence[DeclaredCell]) -> list[str]:
    used = {cell.word for cell in cells}
    lines = [f"- `{word}`: {text}" for word, text in MEANING.items() if word in used]
    for index, (rule, problem) in enumerate(footnotes(cells).items(), 1):
        way_out = f" Instead: {problem.fix}." if problem.fix else ""
        lines.append(f"- [{index}] `{rule}`: {problem.what}.{way_out}")
    return lines
