"""The table of a comparison's page: a line for each row, the best of each column marked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..reporting.html import Child, Html, el, section
from ..reporting.words import count, percent
from .plots import pair
from .results import Quality, Row, Stat, Table
from .verdict import cost_words, stat_words


@dataclass(frozen=True)
class _Column:
    head: str
    below: str
    cell: Callable[[Row], str]
    best: Callable[[Row], float | None] = lambda row: None
    """What is to be small, to mark the best."""


def rows_table(table: Table, taken: Row | None, seeds: int) -> Html:
    """Show the figures of all rows; `taken` is marked, each figure is a mean over `seeds`."""
    columns = [c for c in _columns(table) if any(c.cell(row) for row in table.rows)]
    judged = table.judged()
    best = {c.head + c.below: _least(c, judged) for c in columns}
    head = el(
        "tr",
        el("th", "", scope="col"),
        *[el("th", c.head, el("small", c.below) if c.below else "", scope="col") for c in columns],
    )
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
        kind = "taken" if taken and row.label == taken.label else "faint" if faint else ""
        lines.append(el("tr", _head(row), *cells, class_=kind))
    body = el("table", el("thead", head), el("tbody", *lines), class_="rows")
    note = "Quantized: before training. Blue figures are the best of their column."
    note += f" Means over {seeds} seeds." if seeds > 1 else ""
    note += f" {table.shared}" if table.shared else ""
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
    return el("th", pair(row), el("small", *small) if said or links else "", scope="row")


def _columns(table: Table) -> list[_Column]:
    found = []
    for name, quality in table.qualities.items():
        found.append(_Column(name, "quantized", _stat_of("before", name, quality)))
        found.append(_Column(name, "tuned", _stat_of("after", name, quality), _bad(name, quality)))
    return [
        *found,
        _Column("merge", "keeps", _number("gain_kept", percent), _value("gain_kept", -1)),
        _Column("peak", "memory", _number("memory_gib"), _value("memory_gib")),
        _Column("to calibrate", "memory", _number("quantize_memory_gib")),
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
