"""The page of a comparison: what to take, the plots, the table, and what was left out.

One file, no scripts, no network, light and dark; everything goes through `el`, which escapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..folders.metrics import duration
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
from ..reporting.words import TIMES
from .folder import Journal
from .grid import Comparison
from .plots import pareto, sweeps
from .results import Quality, Row, Stat, Table, tuned_values
from .rows_table import rows_table
from .verdict import COSTS, Verdict, cost_words, stat_words


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
    table, made = shown.table, shown.comparison
    parts = [
        pareto(table, made.options.prefer),
        rows_table(table, shown.verdict.row, len(made.grid["seed"])),
        sweeps(table, made.grid),
        _halving(shown),
        _left_out(shown),
        _how(shown),
    ]
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
