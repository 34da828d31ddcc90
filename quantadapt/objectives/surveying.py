"""The data of a plan before anything is loaded: formats and rows, where they are at hand."""

from __future__ import annotations

from ..data.reading import survey
from ..data.report import DataReport
from ..errors import DataError, PlanRefused
from ..planning.stage import Plan
from .sft import SFT


def surveyed(plan: Plan) -> DataReport | None:
    """Return formats and rows of the data where they are at hand; None where the objective reads
    them in a way of its own, too. Raises PlanRefused."""
    if type(plan.task).read is not SFT.read:
        return None
    try:
        return survey(plan.spec.data)
    except DataError as error:
        raise PlanRefused(error.problems) from None
