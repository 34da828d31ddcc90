"""The plots of a comparison: quality against what it costs, and along each axis of numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..folders.metrics import direction, told_apart
from ..reporting.html import Html, capital, el, section
from ..reporting.scatter import Axis, Point, mark, scatter
from ..reporting.words import TIMES, percent, short
from .grid import in_words
from .results import Quality, Row, Table
from .verdict import COSTS, cost_words, front, stat_words

_COSTS = {
    "size": ("Size of base and adapter", "quantized base and adapter, on disk"),
    "memory": ("Memory of training", "peak memory"),
    "time": ("Time", "machine time of a run"),
}


def pareto(table: Table, prefer: str) -> Html:
    """Plot quality against each cost, the preferred one first and large."""
    quality, rows = table.quality, table.judged()
    if quality is None or len(rows) < 2:
        return Html()
    names = [prefer, *(name for name in COSTS if name != prefer)]
    plots = [_plot(rows, quality, name, small=name != prefer) for name in names]
    small = [
        el("div", el("h3", _COSTS[name][0]), plot)
        for name, plot in zip(names[1:], plots[1:], strict=True)
        if plot
    ]
    note = "Point at a mark to see more. Ringed: nothing is both better and cheaper."
    if any(row.after[quality.name].spread for row in rows):
        note += " Bars: standard deviation over the seeds."
    if len({pair(row) for row in rows}) < len(rows):
        note += " Of each backend with each adapter, the best setting is shown."
    beside = el("div", *small, class_="pair") if small else Html()
    title = f"{capital(quality.name)} against {_COSTS[prefer][0].lower()}"
    parts = (el("p", note, class_="note"), _legend(rows), plots[0], beside)
    return section(title, *parts, name="pareto")


def _plot(rows: Sequence[Row], quality: Quality, name: str, *, small: bool) -> Html:
    cost = COSTS[name]
    ranked = [row for row in rows if cost in row.numbers]
    best = list({pair(row): row for row in reversed(ranked)}.values())
    at_front = [row.label for row in front(best, quality, cost)]
    colours, shapes = _numbers(rows, "backend"), _numbers(rows, "adapter")
    unit, size = _unit(cost, [row.numbers[cost].mean for row in best])
    points = [
        Point(
            x=row.numbers[cost].mean / size,
            y=row.after[quality.name].mean,
            label=pair(row),
            facts=_facts(row, quality),
            spread=row.after[quality.name].spread,
            colour=colours[_part(row, "backend")],
            shape=shapes[_part(row, "adapter")],
            front=row.label in at_front,
        )
        for row in best
    ]
    y = _axis(quality, [point.y for point in points])
    title = f"{capital(quality.name)} by {name}"
    return scatter(
        title, points, Axis(f"{_COSTS[name][1]}, {unit} →", "{:,g}".format), y, small=small
    )


def _unit(cost: str, values: Sequence[float]) -> tuple[str, float]:
    """Return the unit to show values in, and how many of their own it is."""
    most = max(values, default=0.0)
    if cost == "seconds":
        units = (("hours", 3600.0), ("minutes", 60.0))
        return next((unit for unit in units if most >= 2 * unit[1]), ("seconds", 1.0))
    own = 1.0 if cost == "memory_gib" else 1024.0
    return ("GiB", own) if most >= own else ("MiB", own / 1024)


def pair(row: Row) -> str:
    """Return backend and adapter, with their options."""
    return (row.cell.pair if row.cell else row.label).replace(" x ", f" {TIMES} ")


def _axis(quality: Quality, values: Sequence[float]) -> Axis:
    """Return the axis of a figure, without the room that few values far off would take."""
    above, _ = told_apart(quality.unit)
    title = ", ".join(filter(None, (quality.name, above, direction(quality.better))))
    words: Callable[[float], str] = short
    if quality.unit == "share":
        words = lambda value: f"{100 * value:.3g}%"  # noqa: E731
    return Axis(title, words, quality.better == "higher", _worst(quality, values))


def _worst(quality: Quality, values: Sequence[float]) -> float | None:
    """Return from where on values are far off: four times as far from the best as three of four."""
    ranked = sorted(values, key=lambda value: quality.sign * value)
    if len(ranked) < 5:
        return None
    best, most = ranked[0], ranked[3 * len(ranked) // 4]
    edge = best + 3 * (most - best)
    return edge if quality.sign * (ranked[-1] - edge) > 0 and most != best else None


def _part(row: Row, kind: str) -> str:
    """Return the name of a row's backend or adapter."""
    value = row.cell.settings[kind] if row.cell else ""
    return str(value.get("name")) if isinstance(value, Mapping) else str(value)


def _numbers(rows: Sequence[Row], kind: str) -> dict[str, int]:
    names = dict.fromkeys(_part(row, kind) for row in rows if row.cell)
    return {name: index for index, name in enumerate(sorted(names))}


def _legend(rows: Sequence[Row]) -> Html:
    colours, shapes = _numbers(rows, "backend"), _numbers(rows, "adapter")
    items = [(0, colour, name) for name, colour in colours.items()] if len(colours) > 1 else []
    items += [(shape, 8, name) for name, shape in shapes.items()] if len(shapes) > 1 else []
    drawn = [
        el(
            "li",
            el("svg", mark(shape, 7, 7, 5, f"mark c{min(colour, 8)}"), viewBox="0 0 14 14",
               aria_hidden="true"),
            name,
        )
        for shape, colour, name in items
    ]  # fmt: skip
    return el("ul", *drawn, class_="legend") if drawn else Html()


def _facts(row: Row, quality: Quality) -> list[str]:
    """Return what is told of a point: its other settings, figures and costs."""
    facts = [row.cell.rest] if row.cell and row.cell.rest else []
    facts.append(f"{quality.name} {stat_words(quality, row.after[quality.name])}")
    names = {"size_mib": "size", "memory_gib": "memory", "seconds": "time"}
    facts += [
        f"{word} {cost_words(cost, row.numbers[cost].mean)}"
        for cost, word in names.items()
        if cost in row.numbers
    ]
    if "gain_kept" in row.numbers:
        facts.append(f"a merge keeps {percent(row.numbers['gain_kept'].mean)} of the gain")
    return facts


def sweeps(table: Table, grid: Mapping[str, Sequence[Any]]) -> Html:
    """Plot quality against each axis of numbers that has several."""
    quality, rows = table.quality, table.judged()
    parts: list[Html] = []
    for key, values in grid.items():
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        if key == "seed" or len(numbers) < 2 or len(numbers) < len(values) or quality is None:
            continue
        marks = (_numbers(rows, "backend"), _numbers(rows, "adapter"))
        points = [
            _swept(row, key, quality, *marks)
            for row in rows
            if row.cell and key in row.cell.settings
        ]
        if len({point.x for point in points}) > 1:
            x = Axis(f"{key} →", "{:g}".format)
            title = f"{capital(quality.name)} by {key}"
            y = _axis(quality, [point.y for point in points])
            note = el("p", "A line is all that is else the same.", class_="note")
            parts.append(section(title, note, scatter(title, points, x, y)))
    return Html("".join(parts))


def _swept(
    row: Row, key: str, quality: Quality, colours: Mapping[str, int], shapes: Mapping[str, int]
) -> Point:
    assert row.cell is not None
    others = {k: v for k, v in row.cell.settings.items() if k != key}
    stat = row.after[quality.name]
    group = str(sorted(others.items(), key=str))
    return Point(
        x=float(row.cell.settings[key]),
        y=stat.mean,
        label=", ".join(filter(None, in_words(others))).replace(" x ", f" {TIMES} "),
        facts=_facts(row, quality),
        spread=stat.spread,
        colour=colours[_part(row, "backend")],
        shape=shapes[_part(row, "adapter")],
        group=group,
    )
