"""The data of a plan before anything is loaded: formats and rows, where they are at hand."""

from __future__ import annotations

from ..data.report import DataReport
from ..errors import DataError, PlanRefused
from ..planning.stage import Plan


def surveyed(plan: Plan) -> DataReport | None:
    """Return formats and rows of the data, as the plan's task reads them; None where that is not to
    be had at once. Raises PlanRefused."""
    try:
        return plan.task.survey(plan.spec.data)
    except DataError as error:
        raise PlanRefused(error.problems) from None
