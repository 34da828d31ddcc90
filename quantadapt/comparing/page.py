"""The page of a comparison: what to take, the plots, the table, and what was left out.

One file, no scripts, no network, light and dark; everything goes through `el`, which escapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..folders.metrics import direction, duration, told_apart
from ..inputs.plain_yaml import to_yaml
from ..reporting.html import (
    Child,
    Html,
    capital,
    details,
    document,
    el,
    facts_table,
    section,
    styles,
)
from ..reporting.scatter import Axis, Point, mark, scatter
from ..reporting.words import TIMES, count, short
from .folder import Journal
from .grid import Comparison
from .results import Quality, Row, Stat, Table
from .verdict import COSTS, Verdict, cost_words, front, stat_words

_COSTS = {
    "size": ("Size of base and adapter", "quantized base and adapter, on disk"),
    "memory": ("Memory of training", "peak memory"),
    "time": ("Time", "machine time of a run"),
}


@dataclass(frozen=True)
class Shown:
    """All that the page is made of."""

    journal: Journal
    comparison: Comparison
    table: Table
    verdict: Verdict
    command: str = ""


def render(shown: Shown) -> str:
    """Return the whole page."""
    style = styles("compare.css")
    parts = [made for make in SECTIONS if (made := make(shown))]
    version = shown.journal.version
    footer = el("footer", el("p", f"Made by quantadapt {version}. Runs are in runs/ beside it."))
    taken = shown.verdict.row
    title = f"quantadapt compare: {taken.label if taken else shown.journal.state}"
    return document(title, el("main", _header(shown), *parts), footer, style=style)


def _header(shown: Shown) -> Html:
    journal, taken, quality = shown.journal, shown.verdict.row, shown.table.quality
    eyebrow = el(
        "p",
        el("span", "quantadapt compare", class_="brand"),
        el("span", journal.state, class_=f"state {journal.state}"),
        el("time", f"{journal.started[:16].replace('T', ' ')} UTC", datetime=journal.started),
        el("span", f"{len(shown.table.rows)} rows, {_hours(journal.seconds)} of runs"),
        class_="eyebrow",
    )
    if taken is None or quality is None:
        title = el("h1", "Nothing to recommend yet")
    else:
        result = f"{quality.name} {stat_words(quality, taken.after[quality.name])}"
        cost = COSTS[shown.comparison.options.prefer]
        if cost in taken.numbers:
            result += f", {cost_words(cost, taken.numbers[cost].mean)}"
        title = el("h1", _name(taken), el("span", result, class_="result"))
    warnings = [
        el("p", el("strong", "Warning: "), capital(text), class_="warning", role="alert")
        for text in shown.table.remarks
    ]
    return el("header", eyebrow, title, el("p", shown.verdict.words, class_="lede"), *warnings)


def _name(row: Row) -> str:
    return row.label.replace(" x ", f" {TIMES} ")


def _hours(seconds: float) -> str:
    return duration(seconds) if seconds < 36_000 else f"{seconds / 3600:.1f} h"


# The plots ----------------------------------------------------------------------------------------


def _pareto(shown: Shown) -> Html:
    """Plot quality against each cost, the one that was asked for first and large."""
    quality, rows = shown.table.quality, shown.table.judged()
    if quality is None or len(rows) < 2:
        return Html()
    prefer = shown.comparison.options.prefer
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
    if len({_pair(row) for row in rows}) < len(rows):
        note += " Of each backend with each adapter, the best setting is shown."
    pair = el("div", *small, class_="pair") if small else Html()
    title = f"{capital(quality.name)} against {_COSTS[prefer][0].lower()}"
    parts = (el("p", note, class_="note"), _legend(rows), plots[0], pair)
    return section(title, *parts, name="pareto")


def _plot(rows: Sequence[Row], quality: Quality, name: str, *, small: bool) -> Html:
    cost = COSTS[name]
    ranked = [row for row in rows if cost in row.numbers]
    best = list({_pair(row): row for row in reversed(ranked)}.values())
    at_front = [row.label for row in front(best, quality, cost)]
    colours, shapes = _numbers(rows, "backend"), _numbers(rows, "adapter")
    unit, size = _unit(cost, [row.numbers[cost].mean for row in best])
    points = [
        Point(
            x=row.numbers[cost].mean / size,
            y=row.after[quality.name].mean,
            label=_pair(row),
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


def _pair(row: Row) -> str:
    """Return backend and adapter, with their options."""
    return (row.cell.pair if row.cell else row.label).replace(" x ", f" {TIMES} ")


def _axis(quality: Quality, values: Sequence[float]) -> Axis:
    """Return the axis of a figure, without the room that few values far off would take."""
    above, _ = told_apart(quality.unit)
    title = ", ".join(filter(None, (quality.name, above, direction(quality.better))))
    words: Callable[[float], str] = short
    if quality.unit == "share":
        words = lambda value: f"{100 * value:.3g} %"  # noqa: E731
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
        facts.append(f"a merge keeps {_percent(row.numbers['gain_kept'].mean)} of the gain")
    return facts


def _sweeps(shown: Shown) -> Html:
    """Plot quality against each axis of numbers that has several."""
    quality, rows = shown.table.quality, shown.table.judged()
    parts: list[Html] = []
    for key, values in shown.comparison.grid.items():
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
        label=_pair(row),
        facts=_facts(row, quality),
        spread=stat.spread,
        colour=colours[_part(row, "backend")],
        shape=shapes[_part(row, "adapter")],
        group=group,
    )


# The table ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Column:
    head: str
    below: str
    cell: Callable[[Row], str]
    best: Callable[[Row], float | None] = lambda row: None
    """What is to be small, to mark the best."""


def _table(shown: Shown) -> Html:
    table = shown.table
    columns = [c for c in _columns(table) if any(c.cell(row) for row in table.rows)]
    judged = table.judged()
    best = {c.head + c.below: _least(c, judged) for c in columns}
    head = el(
        "tr",
        el("th", "", scope="col"),
        *[el("th", c.head, el("small", c.below) if c.below else "", scope="col") for c in columns],
    )
    taken = shown.verdict.row.label if shown.verdict.row else ""
    lines = []
    for row in table.rows:
        if not (row.before or row.after):
            continue  # told below
        cells = []
        for column in columns:
            value = column.best(row)
            top = row in judged and value is not None and value == best[column.head + column.below]
            cells.append(el("td", column.cell(row), **({"class_": "best"} if top else {})))
        faint = row.reference or row.state not in ("finished", "base")
        kind = "taken" if row.label == taken else "faint" if faint else ""
        lines.append(el("tr", _head(row), *cells, class_=kind))
    body = el("table", el("thead", head), el("tbody", *lines), class_="rows")
    note = "Quantized: before training. Blue figures are the best of their column."
    seeds = len(shown.comparison.grid["seed"])
    note += f" Means over {seeds} seeds." if seeds > 1 else ""
    wrapped = el("div", body, class_="scroll", tabindex="0", role="region", aria_label="All rows")
    return section("All rows", el("p", note, class_="note"), wrapped)


def _least(column: _Column, rows: Sequence[Row]) -> float | None:
    return min((v for row in rows if (v := column.best(row)) is not None), default=None)


def _head(row: Row) -> Html:
    """Return a row's name, with what is to be known of it and links to its runs."""
    said = [row.cell.rest] if row.cell and row.cell.rest else []
    if row.reference and row.cell:
        said.append("reference")
    if row.state == "dropped":
        said.append(f"dropped after {row.steps} steps")
    elif row.state not in ("finished", "base"):
        said.append(row.state)
    links: list[Child] = []
    for name in row.names:
        text = f"seed {name.rpartition('seed')[2]}"
        links += [", " if links else "", el("a", text, href=f"runs/{name}/report.html")]
    small = [", ".join(said), " · " if said and links else "", *links]
    return el("th", _pair(row), el("small", *small) if said or links else "", scope="row")


def _columns(table: Table) -> list[_Column]:
    found = []
    for name, quality in table.qualities.items():
        found.append(_Column(name, "quantized", _stat_of("before", name, quality)))
        found.append(_Column(name, "tuned", _stat_of("after", name, quality), _bad(name, quality)))
    return [
        *found,
        _Column("merge", "keeps", _number("gain_kept", _percent), _value("gain_kept", -1)),
        _Column("peak", "memory", _number("memory_gib"), _value("memory_gib")),
        _Column(
            "tokens", "a second", _number("tokens_per_second"), _value("tokens_per_second", -1)
        ),
        _Column("base", "on disk", _number("base_mib"), _value("base_mib")),
        _Column("adapter", "on disk", _number("adapter_mib"), _value("adapter_mib")),
        _Column("trained", "weights", _number("trained", count)),
        _Column("time", "of a run", _number("seconds"), _value("seconds")),
    ]


def _stat_of(where: str, name: str, quality: Quality) -> Callable[[Row], str]:
    def words(row: Row) -> str:
        stat: Stat | None = getattr(row, where).get(name)
        return stat_words(quality, stat) if stat else ""

    return words


def _bad(name: str, quality: Quality) -> Callable[[Row], float | None]:
    return lambda row: quality.sign * row.after[name].mean if name in row.after else None


def _number(key: str, words: Callable[[float], str] | None = None) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        stat = row.numbers.get(key)
        if stat is None:
            return ""
        return words(stat.mean) if words else cost_words(key, stat.mean)

    return cell


def _value(key: str, sign: int = 1) -> Callable[[Row], float | None]:
    return lambda row: sign * row.numbers[key].mean if key in row.numbers else None


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


# The rest -----------------------------------------------------------------------------------------


def _halving(shown: Shown) -> Html:
    """Show what each cell was after each rung."""
    rungs, quality = shown.journal.rungs, shown.table.quality
    if len(rungs) < 2 or quality is None:
        return Html()
    keys = [*map(str, rungs[:-1])]
    lines = []
    for row in shown.table.rows:
        if row.cell is None:
            continue
        records = [
            shown.journal.runs[run.name]
            for run in shown.comparison.runs
            if run.cell.label == row.label and run.name in shown.journal.runs
        ]
        cells = [_at_rung([r.results.get(key) for r in records], quality) for key in keys]
        last = stat_words(quality, row.after[quality.name]) if row.state == "finished" else ""
        lines.append(
            el("tr", el("th", _name(row), scope="row"), *[el("td", c) for c in (*cells, last)])
        )
    heads = [el("th", f"{rung} steps", scope="col") for rung in rungs]
    body = el(
        "table", el("thead", el("tr", el("th", ""), *heads)), el("tbody", *lines), class_="rows"
    )
    note = f"{capital(quality.name)} after each rung; the best third goes on from its checkpoint."
    return section(
        "Successive halving", el("p", note, class_="note"), el("div", body, class_="scroll")
    )


def _at_rung(results: Sequence[Mapping[str, Any] | None], quality: Quality) -> str:
    from .results import tuned_values

    values = tuned_values([result for result in results if result], quality.name)
    return stat_words(quality, Stat(tuple(values))) if values else ""


def _left_out(shown: Shown) -> Html:
    """Say which rows have no figures, and why."""
    parts = []
    for state, title in (("failed", "Failed"), ("refused", "Not run, as it would be refused"),
                         ("interrupted", "Interrupted"), ("running", "Under way"),
                         ("waiting", "Not run yet")):  # fmt: skip
        rows = [row for row in shown.table.rows if row.state == state]
        items = [
            el("li", el("strong", _name(row)), f": {row.reason}" if row.reason else "")
            for row in rows
        ]
        parts += [el("h3", title), el("ul", *items, class_="reasons")] if items else []
    warned = [row for row in shown.table.rows if row.warnings]
    items = [el("li", el("strong", _name(row)), f": {'; '.join(row.warnings)}") for row in warned]
    parts += [el("h3", "Warnings of runs"), el("ul", *items, class_="reasons")] if items else []
    return section("What is missing, and warnings", *parts, name="missing") if parts else Html()


def _how(shown: Shown) -> Html:
    journal, made = shown.journal, shown.comparison
    spec = made.spec
    rows: list[tuple[str, Child]] = [
        ("model", spec.model or "the bundled demo"),
        ("data", ", ".join(spec.data.named) or "the bundled demo's"),
    ]
    rows += [(key, _values(values)) for key, values in made.grid.items()]
    if made.options.budget:
        rows.append(("budget", f"{made.options.budget:g} hours, {_hours(journal.seconds)} taken"))
    rows += [(key, value) for key in ("gpu", "cpu") if (value := journal.machine.get(key))]
    rows += [(key, value) for key, value in journal.machine.items() if key not in ("gpu", "cpu")]
    parts: list[Child] = [facts_table(rows)]
    if shown.command:
        parts += [el("h3", "Do it again"), el("pre", shown.command, class_="command")]
    parts.append(details("The comparison, as YAML", el("pre", to_yaml(yaml_of(made)))))
    return section("How it was done", *parts)


def yaml_of(made: Comparison) -> dict[str, Any]:
    """Return what a YAML file says that asks for the same comparison."""
    told = made.to_dict()
    defaults = type(made.options)().model_dump()
    options = {k: v for k, v in told["compare"].items() if v != defaults[k]}
    return {**told["spec"], "grid": told["grid"], **({"compare": options} if options else {})}


def _values(values: Sequence[Any]) -> Html:
    chips = [el("code", v if isinstance(v, str) else to_yaml(v).removesuffix("...\n").strip())
             for v in values]  # fmt: skip
    return el("span", *chips, class_="chips")


SECTIONS: tuple[Callable[[Shown], Html], ...] = (
    _pareto,
    _table,
    _sweeps,
    _halving,
    _left_out,
    _how,
)
"""In the order of the page."""
