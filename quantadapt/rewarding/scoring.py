"""Reward functions are called, within a time limit, and what they return is checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import RewardError
from ..inputs.patience import TooLate
from .functions import Function, limited

if TYPE_CHECKING:
    from torch import Tensor

_LARGEST = 3e38
"""A step computes in float32."""


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
    """Return what a function returns. Raises RewardError."""
    values = {key: [*value] for key, value in given.items()}  # which it may change
    try:
        return limited(partial(_with_gradients, function, values), seconds, f"reward {name}")
    except TooLate:
        what = f"the reward function has not returned after {seconds:g} s"
        fix = "make it quicker, or raise reward_timeout"
        raise RewardError(what, fix=fix, where=name) from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit, too, ends no run
        fix = "mend it; it is called with prompts=, completions=, completion_ids= and the columns"
        fix += " of the data, so let it take **columns"
        what = " ".join(f"the reward function failed with {type(error).__name__}: {error}".split())
        raise RewardError(what, fix=fix, where=name) from error


def _with_gradients(function: Function, values: Mapping[str, Any]) -> Any:
    """What it sets of gradients is its own."""
    import torch

    with torch.enable_grad():
        return function(**values)


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
    if not abs(number) <= _LARGEST:
        kind = "the text " if isinstance(value, str) else ""
        what = f"the reward function returned {kind}{str(value)[:40]!r}, which is no finite number"
        what += " of 32 bits" if math.isfinite(number) else ""
        raise RewardError(what, fix=fix, where=name)
    return number
