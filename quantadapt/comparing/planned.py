"""What the cells of a grid come to, before anything starts: which are refused and why, what becomes
of a merge, and the memory that is predicted."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import PlanRefused, Problem
from ..memory.cards import GIB
from ..planning.planned import Plan
from ..planning.stage import plan
from ..spec import ExportSpec, Spec
from .grid import Cell, Comparison

NEW = ".new"
"""A folder that is not there: cells are planned as runs that begin."""

MERGES: tuple[Mapping[str, Any], ...] = (
    {"merge": "requantize", "rounding": "dithered", "min_gain": 0.0},
    {"merge": "requantize", "min_gain": 0.0},
    {"merge": "dense"},
    {"merge": "never"},
)
"""What is merged to measure what that keeps: the first that a cell allows."""


@dataclass(frozen=True)
class PlannedCell:
    """A cell, and what its runs will do.

    Attributes:
        plan: of a run of it; None where it is refused.
        refusals: why it is; empty if it will be run.
    """

    cell: Cell
    plan: Plan | None = None
    refusals: tuple[Problem, ...] = ()

    @property
    def memory_gib(self) -> float | None:
        """The GPU memory that training is predicted to take, in GiB; None on a CPU."""
        memory = self.plan.memory if self.plan else None
        return memory.cards[0].needed / GIB if memory and memory.cards else None

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-ready data."""
        return {
            "cell": self.cell.label,
            "reference": self.cell.reference,
            "memory_gib": self.memory_gib,
            "merge": self.plan.merge if self.plan else None,
            "refusals": [vars(problem) for problem in self.refusals],
        }

    @property
    def reason(self) -> str:
        """Why it is refused, in one sentence."""
        return reason(self.refusals)


def reason(problems: tuple[Problem, ...] | list[Problem]) -> str:
    """Return what is wrong first, and the way out, in one line."""
    if not problems:
        return ""
    first, more = problems[0], len(problems) - 1
    text = "; ".join(filter(None, (first.what, first.fix)))
    text = " ".join(text.split())
    return f"{text} (and {more} more)" if more else text


def plan_cells(comparison: Comparison, output: Path) -> list[PlannedCell]:
    """Plan each cell. Raises PlanRefused where no cell but references can be run."""
    first = {run.cell.label: run.spec for run in reversed(comparison.runs)}
    found = [planned(cell, first[cell.label], output) for cell in comparison.cells]
    if all(each.refusals for each in found if not each.cell.reference):
        raise PlanRefused([*dict.fromkeys(p for each in found for p in each.refusals)])
    return found


def planned(cell: Cell, spec: Spec, output: Path) -> PlannedCell:
    """Plan one cell, with the first of `MERGES` that it allows where the user left that open."""
    mine = [spec.export]
    if measures_a_merge(spec):
        mine = [spec.export.model_copy(update=dict(values)) for values in MERGES]
    without = mine[-1]  # what is wrong with it is wrong with the cell, and not with a merge
    try:
        made = plan(_to(output, spec, without))
    except PlanRefused as error:
        return PlannedCell(cell, refusals=error.problems)
    for export in mine[:-1]:
        with suppress(PlanRefused):
            return PlannedCell(cell, plan(_to(output, spec, export)))
    return PlannedCell(cell, made)


def _to(output: Path, spec: Spec, export: ExportSpec) -> Spec:
    return spec.model_copy(update={"export": export, "output": str(output / "runs" / NEW)})


def measures_a_merge(spec: Spec) -> bool:
    """Say whether a merge is made only to be measured, as the user says nothing of it."""
    return not spec.export.model_fields_set & {"merge", "rounding", "min_gain"}


def spec_of(made: Plan, seed: int, output: Path, *, unquantized: bool) -> Spec:
    """Return the spec of a run: that of its cell's plan, with its own seed and folder.

    Args:
        unquantized: also measure the base before it is quantized; one run does it for all.
    """
    evaluate = made.spec.evaluate.model_copy(update={"unquantized": unquantized})
    own: dict[str, Any] = {"seed": seed, "output": str(output), "evaluate": evaluate}
    own |= {"overwrite": False, "trust_remote_code": False}
    return made.spec.model_copy(update=own)
