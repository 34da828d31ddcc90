"""Data before anything is trained: formats and rows of a plan, and examples as they are learnt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..data.looking import Shown
from ..data.report import DataReport
from ..errors import DataError, PlanRefused
from ..planning.planned import Plan
from ..planning.stage import task_for
from ..spec import Spec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def surveyed(plan: Plan) -> DataReport | None:
    """Return formats and rows of the data, as the plan's task reads them; None where that is not to
    be had at once. Raises PlanRefused."""
    try:
        return plan.task.survey(plan.spec.data)
    except DataError as error:
        raise PlanRefused(error.problems) from None


def looked_at(
    spec: Spec, tokenizer: PreTrainedTokenizerBase, limit: int
) -> tuple[list[Shown], DataReport]:
    """Return what is shown of the first `limit` examples, as the spec's objective reads them, and a
    report on all that are read.

    Raises:
        PlanRefused: there is no such objective, or it has no such option.
        DataError: the data cannot be read or used.
    """
    task = task_for(spec)
    if (found := task.look(spec.data, tokenizer, limit)) is not None:
        return found
    made, shown = task.read(spec.data, tokenizer, seed=spec.seed), []
    for number, row in enumerate(made.train.select(range(min(limit, len(made.train))))):
        ids = [*row["input_ids"]]
        mask = [*row.get("completion_mask", [1] * len(ids))]
        shown.append(Shown(f"example {number + 1}", ids, mask, 0))
    return shown, made.report
