"""Successive halving (Jamieson & Talwalkar 2016): all cells are trained a little, the best third of
them three times as long, and so on; what is dropped costs little.

Pure. Runs go on from their checkpoints, so a rung costs the steps that it adds, and the loading,
quantizing and measuring that each process does. The budget decides how many rungs there are: as few
as it allows, for a figure after few steps says less of the figure at the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ETA = 3
"""One in so many is kept, and trained so many times as long."""
FEWEST = 2
"""Steps of the first rung at least; one step is all warm-up."""


@dataclass(frozen=True)
class Cost:
    """What a cell takes, in seconds: `fixed` in each process, and for each optimizer step."""

    fixed: float
    step: float

    def of(self, steps: int) -> float:
        """Return the seconds of a process that trains so many steps."""
        return self.fixed + self.step * steps


def ladder(steps: int, count: int) -> list[int]:
    """Return the steps of `count` rungs, the last being `steps`."""
    return [max(FEWEST, math.ceil(steps / ETA**k)) for k in reversed(range(count))]


def most_rungs(cells: int, steps: int) -> int:
    """Return how many rungs are of use: each drops something, and the first trains at all."""
    by_cells = 1 + int(math.log(max(cells, 1), ETA) + 1e-9)
    by_steps = 1 + int(math.log(max(steps / FEWEST, 1), ETA) + 1e-9)
    return max(1, min(by_cells, by_steps))


def kept_of(cells: int) -> int:
    """Return how many of so many cells the next rung has."""
    return max(1, math.ceil(cells / ETA))


def seconds(cells: int, rungs: Sequence[int], cost: Cost, seeds: int) -> float:
    """Return what the rungs take, for so many cells in the first, each with so many runs."""
    total, done = 0.0, 0
    for rung in rungs:
        total += cells * seeds * cost.of(max(rung - done, 0))
        cells, done = kept_of(cells), rung
    return total


def choose(cells: int, steps: int, cost: Cost, seeds: int, budget: float) -> list[int]:
    """Return the fewest rungs that take at most `budget` seconds; where none do, those that take
    least."""
    found = [ladder(steps, count) for count in range(1, most_rungs(cells, steps) + 1)]
    costs = [seconds(cells, rungs, cost, seeds) for rungs in found]
    fitting = (rungs for rungs, cost in zip(found, costs, strict=True) if cost <= budget)
    return next(fitting, found[costs.index(min(costs))])


def survivors(
    badness: Mapping[str, float], references: Sequence[str], most: int | None = None
) -> list[str]:
    """Return what the next rung has, the best first.

    Args:
        badness: by cell, how bad it is so far.
        references: of these, the best one always goes on, beside the others.
        most: so many at most, as the budget allows no more.
    """
    ranked = sorted(badness, key=lambda label: badness[label])
    count = kept_of(len([label for label in ranked if label not in references]) or 1)
    count = count if most is None else max(1, min(count, most))
    kept = [label for label in ranked if label not in references][:count]
    beside = [label for label in ranked if label in references][:1]
    return [label for label in ranked if label in (*kept, *beside)]
