"""What the table says: which rows nothing beats, whether a difference is more than chance, and what
to take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import variance

from ..folders.metrics import SHARE, duration, unit_behind, with_unit
from ..reporting.words import mebibytes, short
from .grid import Options
from .results import Quality, Row, Stat, Table

COSTS = {"size": "size_mib", "memory": "memory_gib", "time": "seconds"}
"""What may be small -> the number of a row that tells it."""
SMALLEST = {"size": "smallest", "memory": "one with the least memory", "time": "fastest"}


def front(rows: Sequence[Row], quality: Quality, cost: str) -> list[Row]:
    """Return the rows of which none is both better and cheaper, the cheapest first."""
    able = [row for row in rows if cost in row.numbers and quality.name in row.after]
    able.sort(key=lambda row: (row.numbers[cost].mean, quality.sign * row.after[quality.name].mean))
    found: list[Row] = []
    for row in able:
        last = found[-1].after[quality.name].mean if found else math.inf * quality.sign
        if quality.sign * row.after[quality.name].mean < quality.sign * last:
            found.append(row)
    return found


@dataclass(frozen=True)
class Noise:
    """How much runs of one cell differ by their seeds alone.

    Attributes:
        deviation: of one run, on the scale of `Quality.scaled`, pooled over all cells.
        freedom: degrees of freedom that it comes from.
    """

    deviation: float
    freedom: int

    def of(self, first: Stat, second: Stat) -> float:
        """Return how far the means of two cells may be apart by chance, in 19 of 20 cases."""
        count = 1 / len(first.values) + 1 / len(second.values)
        return student(self.freedom) * self.deviation * math.sqrt(count)


def noise_of(rows: Sequence[Row], quality: Quality) -> Noise | None:
    """Return the noise; None where no cell has two seeds."""
    groups = [row.after[quality.name].values for row in rows if quality.name in row.after]
    groups = [values for values in groups if len(values) > 1]
    freedom = sum(len(values) - 1 for values in groups)
    if not freedom:
        return None
    scaled = [[quality.scaled(value) for value in values] for values in groups]
    total = sum(variance(values) * (len(values) - 1) for values in scaled)
    return Noise(math.sqrt(total / freedom), freedom)


def student(freedom: int) -> float:
    """Return Student's t of so many degrees of freedom that is not passed in 19 of 20 cases, on
    either side; within 0.01."""
    exact = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
    return exact.get(freedom) or 1.960 + 2.372 / freedom + 2.823 / freedom**2 + 2.6 / freedom**3


@dataclass(frozen=True)
class Verdict:
    """What to take.

    Attributes:
        row: None where there is nothing to recommend.
        words: sentences that say what it is based on.
        tied: cells that cannot be told apart from the best, itself among them.
    """

    row: Row | None
    words: str
    tied: tuple[str, ...] = ()


def verdict(table: Table, options: Options) -> Verdict:
    """Return what to take: of what is near the best, that which costs least."""
    quality, rows = table.quality, table.candidates()
    if quality is None or not rows:
        return Verdict(None, "No run has ended with figures yet: there is nothing to recommend.")
    cost = COSTS[options.prefer]
    best = rows[0]
    near = [r for r in rows if _worse(quality, r, best) <= options.within + 1e-12]
    priced = [row for row in near if cost in row.numbers] or near
    taken = min(priced, key=lambda row: row.numbers[cost].mean if cost in row.numbers else 0.0)
    noise = noise_of(rows, quality)
    tied = _tied(quality, rows, best, noise)
    words = [_taken_words(quality, taken, best, len(near), len(rows), options, cost)]
    words += [_noise_words(quality, taken, best, noise, tied, len(rows))]
    words += [_error_words(quality, best), _reference_words(table, quality, taken)]
    if coming := [row for row in table.rows if row.state in ("waiting", "running", "interrupted")]:
        words.append(f"{len(coming)} more are not done yet.")
    if taken.state != "finished":
        words.insert(0, f"No run was trained whole; this is after {taken.steps} steps.")
    words += [f"Look at it first, though: {taken.warnings[0]}." if taken.warnings else ""]
    return Verdict(taken, " ".join(filter(None, words)), tuple(row.label for row in tied))


def _worse(quality: Quality, row: Row, best: Row) -> float:
    return quality.worse(row.after[quality.name].mean, best.after[quality.name].mean)


def _tied(quality: Quality, rows: Sequence[Row], best: Row, noise: Noise | None) -> list[Row]:
    """Return the rows that differ from the best by no more than chance."""
    if noise is None:
        return [best]
    top = best.after[quality.name]
    at = _scaled(quality, top)
    return [
        row
        for row in rows
        if row is best
        or abs(_scaled(quality, row.after[quality.name]) - at)
        <= noise.of(top, row.after[quality.name])
    ]


def _scaled(quality: Quality, stat: Stat) -> float:
    return sum(map(quality.scaled, stat.values)) / len(stat.values)


def stat_words(quality: Quality, stat: Stat) -> str:
    """Return a figure with its spread: `1.884 ± 0.012`."""
    if stat.spread is None:
        return with_unit(stat.mean, quality.unit, _four_digits)
    if quality.unit == SHARE:
        return f"{100 * stat.mean:.1f} ± {100 * stat.spread:.1f}%"
    places = min(max(1 - math.floor(math.log10(stat.spread)), 0), 6) if stat.spread else 4
    return unit_behind(f"{stat.mean:,.{places}f} ± {stat.spread:.{places}f}", quality.unit)


def _four_digits(value: float) -> str:
    return f"{value:#.4g}".rstrip(".") if 1e-3 <= abs(value) < 1e4 else short(value)


def cost_words(cost: str, value: float) -> str:
    """Return a number of a row with its unit."""
    if cost.endswith("_mib"):
        return mebibytes(value)
    if cost.endswith("memory_gib"):
        return mebibytes(1024 * value)
    return duration(value) if cost.endswith("seconds") else short(value)


def _taken_words(
    quality: Quality,
    taken: Row,
    best: Row,
    near: int,
    count: int,
    options: Options,
    cost: str,
) -> str:
    figure = f"{quality.name} {stat_words(quality, taken.after[quality.name])}"
    price = f", {cost_words(cost, taken.numbers[cost].mean)}" if cost in taken.numbers else ""
    head = f"Take {taken.label}: {figure}{price}."
    if count == 1:
        return f"{head} No other was measured to the end."
    what = SMALLEST[options.prefer]
    margin = _amount(quality, options.within)
    if taken is best:
        beside = f"nothing within {margin} of it is {_cheaper(options.prefer)}"
        return f"{head} It has the best {quality.name} of {count}, and {beside}."
    top = f"{best.label} has {stat_words(quality, best.after[quality.name])}"
    if cost in best.numbers:
        top += f" and takes {cost_words(cost, best.numbers[cost].mean)}"
    return f"{head} It is the {what} of the {near} within {margin} of the best; {top}."


def _amount(quality: Quality, difference: float) -> str:
    """Return by how much a figure is worse, see `Quality.worse`."""
    amount = f"{100 * difference:.2g}"
    return f"{amount} points" if quality.unit == SHARE else f"{amount}%"


def _cheaper(prefer: str) -> str:
    return {"size": "smaller", "memory": "smaller in memory", "time": "faster"}[prefer]


def _noise_words(
    quality: Quality,
    taken: Row,
    best: Row,
    noise: Noise | None,
    tied: Sequence[Row],
    count: int,
) -> str:
    if noise is None:
        many = "With one seed each, nobody can tell"
        return f"{many} which differences are chance: --seeds 3 shows that."
    seeds = min(len(row.after[quality.name].values) for row in (taken, best))
    over = f"over {seeds} seeds each"
    if len(tied) == count > 1:
        return f"All {count} differ by no more than chance, {over}: any of them is as good."
    if len(tied) > 1:
        others = len(tied) - 1
        word = "another is" if others == 1 else f"{others} others are"
        sure = "" if taken in tied else "; what you take is worse than the best by more than that"
        return f"Within the noise, {over}, {word} as good as the best{sure}."
    return f"The best is better than all others by more than chance, {over}."


def _error_words(quality: Quality, best: Row) -> str:
    """Say how far figures of two models may be apart by what they happened to be asked."""
    error = best.errors.get(quality.name)
    if error is None:
        return ""
    apart = 1.96 * math.sqrt(2) * error.mean
    value = f"{100 * apart:.2g} points" if quality.unit == SHARE else f"{apart:.2g}"
    return f"Asked other questions, two models as good as each other may be {value} apart."


def _reference_words(table: Table, quality: Quality, taken: Row) -> str:
    """Compare with the adapter on the dense base."""
    dense = [row for row in table.judged() if row.reference]
    if not dense or taken in dense:
        return ""
    worse = _worse(quality, taken, dense[0])
    name, way = dense[0].label, "better" if worse > 0 else "worse"
    if abs(worse) < 0.0005:
        return f"{name}, on the dense base, is as good."
    return f"{name}, on the dense base, is {_amount(quality, abs(worse))} {way}."
