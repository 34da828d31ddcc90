"""`quantadapt compare` on the screen: plan and table. How it goes on: `showing.comparing`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table as Shown

from ..folders.metrics import direction
from ..reporting.words import mebibytes

if TYPE_CHECKING:
    from rich.console import Console

    from ..comparing.grid import Comparison
    from ..comparing.planned import PlannedCell
    from ..comparing.results import Row, Table
    from ..comparing.stage import ComparisonResult
    from ..comparing.verdict import Verdict

_MOST = 40
"""Cells that are listed one by one."""


def show_plan(
    console: Console, made: Comparison, cells: Sequence[PlannedCell], output: Path
) -> None:
    """Print what will be run, and what is left out and why."""
    from ..comparing.bases import disk_of

    able = [cell for cell in cells if not cell.refusals]
    table = Shown(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    predicted = any(cell.memory_gib for cell in able)
    for head in ("to compare", "merge", *(["memory"] if predicted else [])):
        table.add_column(head, overflow="fold", justify="right" if head == "memory" else "left")
    for cell in able[:_MOST]:
        name = f"{cell.cell.label}  [dim](reference)[/dim]" if cell.cell.reference else ""
        values = [name or escape(cell.cell.label), cell.plan.merge if cell.plan else ""]
        values += [mebibytes(1024 * (cell.memory_gib or 0))] if predicted else []
        table.add_row(*values)
    console.print(table)
    if len(able) > _MOST:
        console.print(f"and {len(able) - _MOST} more")
    if refused := [cell for cell in cells if cell.refusals]:
        console.print(f"\nnot run, {len(refused)} of {len(cells)}:")
        for cell in refused:
            text = f"  {cell.cell.label}: {cell.reason}"
            console.print(text, markup=False, soft_wrap=True, style="yellow")
    for line in [*_counts(made, able, output), disk_of(made, able, output.expanduser()).words]:
        if not line:
            continue
        console.print(line, markup=False, soft_wrap=True)
    console.print()


def _counts(made: Comparison, able: Sequence[PlannedCell], output: Path) -> Iterator[str]:
    from ..machine import this_machine
    from ..planning.words import steps_words

    seeds = len(made.grid["seed"])
    each = "" if seeds == 1 else f" of {len(able)} cells with {seeds} seeds"
    count = len(able) * seeds
    plan = able[0].plan
    assert plan is not None
    where = plan.device
    if where == "cuda" and len(this_machine().cuda) > 1:
        where = f"{made.options.gpus or len(this_machine().cuda)} GPUs"
        where += ", a run on each" if made.options.at_once == 1 else ""
    if made.options.at_once > 1:
        where += f", {made.options.at_once} at a time on {'each' if ' GPUs' in where else 'it'}"
    runs = "1 run" if count == 1 else f"{count} runs"
    yield f"\n{runs}{each}, {steps_words(plan.spec.train)}, on {where}"
    if made.options.budget:
        yield (
            f"budget {made.options.budget:g} hours: the first run shows how many rungs of "
            "successive halving that takes"
        )
    else:
        yield "how long it takes is told after the first"
    kept = "" if made.options.keep_merged else "; merged models are measured and removed"
    yield f"results in {output}{kept}"


def show_table(console: Console, made: Comparison, table: Table, found: Verdict) -> None:
    """Print the rows, the best first, what is missing, and what to take."""
    from ..comparing.verdict import cost_words, stat_words

    numbers = {"gain_kept": "merge\nkeeps", "memory_gib": "peak\nmemory",
               "tokens_per_second": "tokens\nper s", "base_mib": "base\n",
               "adapter_mib": "adapter\n", "seconds": "time\n"}  # fmt: skip
    numbers = {k: head for k, head in numbers.items() if any(k in r.numbers for r in table.rows)}
    shown = Shown(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    shown.add_column("\n", overflow="fold")
    for name, quality in table.qualities.items():
        shown.add_column(f"{escape(name)}\nquantized", justify="right")
        shown.add_column(f"tuned, {direction(quality.better)}", justify="right")
    for head in numbers.values():
        shown.add_column(head, justify="right")
    for row in table.rows:
        if not row.before and not row.after:
            continue
        cells = [escape(row.label) + _told(row)]
        for name, quality in table.qualities.items():
            stats = (row.before.get(name), row.after.get(name))
            cells += [escape(stat_words(quality, stat)) if stat else "" for stat in stats]
        for key in numbers:
            stat = row.numbers.get(key)
            value = stat.mean if stat else None
            plain = value is not None and key == "gain_kept"
            cells.append(
                "" if value is None else f"{value:.0%}" if plain else cost_words(key, value)
            )
        style = "bold green" if row is found.row else "dim" if row.state != "finished" else ""
        shown.add_row(*cells, style=style)
    console.print()
    console.print(shown)
    for row in table.rows:
        if row.state in ("failed", "refused", "interrupted", "running", "waiting"):
            why = f": {row.reason}" if row.reason else ""
            text = f"{row.label}: {row.state}{why}"
            console.print(text, markup=False, soft_wrap=True, style="yellow")
    if table.shared:
        console.print(f"\n{table.shared}", markup=False, soft_wrap=True, style="dim")
    for text in table.remarks:
        console.print(f"warning: {text}", markup=False, soft_wrap=True, style="bold yellow")
    console.print(f"\n{found.words}", markup=False, soft_wrap=True)


def _told(row: Row) -> str:
    if row.state == "dropped":
        return f" [dim](after {row.steps} steps)[/dim]"
    return " [dim](reference)[/dim]" if row.reference and row.cell else ""


def result_lines(result: ComparisonResult) -> list[str]:
    """Return where everything is."""
    taken = result.verdict.row
    runs = [result.folder / "runs" / name for name in taken.names] if taken else []
    found = [f"its run: {', '.join(map(str, runs))}"] if runs else []
    return [*found, f"page: {result.folder / 'compare.html'}"]
