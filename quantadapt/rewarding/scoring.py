"""Reward functions are called, within a time limit, and what they return is checked."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import RewardError
from .functions import Function

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Scorer:
    """Reward functions with their weights.

    Attributes:
        functions: by what they are called in figures.
        weights: one for each.
        time_limit: seconds that a call may take.
    """

    functions: Mapping[str, Function]
    weights: Sequence[float]
    time_limit: float

    def scores(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
    ) -> Tensor:
        """Return what each function gives each answer, float64 [answers, functions]; NaN where it
        gives None, as it does not apply. They are called as TRL does it.

        Args:
            prompts, completions: texts, or turns.
            ids: the token ids of the answers, as `completion_ids`.
            columns: the other columns of the data, by name, repeated for each answer.

        Raises:
            RewardError: one raised, took too long, or returned something else than numbers.
        """
        import torch

        given = {**columns, "prompts": prompts, "completions": completions, "completion_ids": ids}
        found = [
            _checked(name, _called(name, function, given, self.time_limit), len(prompts))
            for name, function in self.functions.items()
        ]
        return torch.tensor(found, dtype=torch.float64).T

    def totals(self, scores: Tensor) -> Tensor:
        """Return the weighted sums, float64 [answers]; NaN where no function applies."""
        weights = scores.new_tensor(self.weights)
        nothing = scores.isnan().all(1)
        return (scores * weights).nansum(1).masked_fill(nothing, math.nan)


def _called(name: str, function: Function, given: Mapping[str, Any], seconds: float) -> Any:
    """Return what a function returns. Raises RewardError.

    It runs in a thread of its own: one that hangs cannot be ended, but left behind.
    """
    result: list[Any] = []
    failed: list[BaseException] = []

    def call() -> None:
        try:
            result.append(function(**given))
        except BaseException as error:  # sys.exit, too, would end the thread alone
            failed.append(error)

    thread = threading.Thread(target=call, name=f"reward {name}", daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        error = failed[0]
        fix = "mend it; it is called with prompts=, completions=, completion_ids= and the columns"
        fix += " of the data, so let it take **columns"
        what = " ".join(f"the reward function failed with {type(error).__name__}: {error}".split())
        raise RewardError(what, fix=fix, where=name) from error
    if not result:
        what = f"the reward function has not returned after {seconds:g} s"
        raise RewardError(what, fix="make it quicker, or raise reward_timeout", where=name)
    return result[0]


def _checked(name: str, found: Any, count: int) -> list[float]:
    """Return rewards as floats, NaN where there is none. Raises RewardError."""
    fix = f"return a list of {count} numbers, one for each completion, None where it does not apply"
    if hasattr(found, "tolist"):  # of torch or numpy
        found = found.tolist()
    if isinstance(found, str | bytes | Mapping) or not isinstance(found, Sequence):
        kind = "None" if found is None else type(found).__name__
        what = f"the reward function returned {kind}, no list"
        raise RewardError(what, fix=fix, where=name)
    if len(found) != count:
        what = f"the reward function returned {len(found)} rewards for {count} completions"
        raise RewardError(what, fix=fix, where=name)
    return [_number(name, value, fix) for value in found]


def _number(name: str, value: Any, fix: str) -> float:
    if value is None:
        return math.nan
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        what = f"the reward function returned {str(value)[:40]!r}, which is no finite number"
        raise RewardError(what, fix=fix, where=name)
    return number
