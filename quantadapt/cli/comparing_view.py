"""`quantadapt compare` on the screen: the plan, the runs as they go on, and the table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table as Shown

from ..folders.metrics import direction, duration
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
    for line in _counts(made, able, output):
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
        where = f"{made.options.gpus or len(this_machine().cuda)} GPUs, a run on each"
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


class CompareDisplay:
    """A listener for `run_comparison`; use it as a context manager.

    A line for each run that has ended; on a terminal also a bar for each that goes on.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.done, self.total, self.slots = 0, 0, 1
        self._bars: dict[str, TaskID] = {}
        self._live = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[told]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> CompareDisplay:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def __call__(self, event: str, facts: Mapping[str, Any]) -> None:
        """Show one event; those it does not know are passed over."""
        handler = getattr(self, f"on_{event}", None)
        if handler is not None:
            handler(facts)

    def _print(self, text: str, style: str = "") -> None:
        self.console.print(text, markup=False, soft_wrap=True, style=style)

    def on_planned(self, facts: Mapping[str, Any]) -> None:
        """It is known what there is to do."""
        todo, over = len(facts["todo"]), facts["over"]
        if over:
            self._print(f"{over} of {todo + over} runs have ended before and are not run again")
        if failed := facts["failed"]:
            self._print(f"{failed} of them failed; --retry runs them again", "yellow")

    def on_batch(self, facts: Mapping[str, Any]) -> None:
        """So many runs begin together, to a rung or to their end."""
        self.done, self.total, self.slots = 0, facts["count"], facts["slots"]
        if facts["steps"] is not None and facts["count"]:
            self._print(f"rung of {facts['steps']} steps: {facts['count']} runs")

    def on_start(self, facts: Mapping[str, Any]) -> None:
        """A run begins."""
        name = facts["job"].name
        self._bars[name] = self._live.add_task(escape(name), total=None, told="starting")

    def on_progress(self, facts: Mapping[str, Any]) -> None:
        """A run has trained a step."""
        bar = self._bars.get(facts["job"].name)
        if bar is None or not isinstance(facts.get("loss"), float) or not facts.get("max_steps"):
            return
        done, total = facts["step"], facts["max_steps"]
        told = f"step {done}/{total}  loss {facts['loss']:.4f}" if done < total else "measuring"
        self._live.update(bar, completed=done, total=total, told=told)

    def on_ended(self, facts: Mapping[str, Any]) -> None:
        """A run has ended."""
        job, ending, result = facts["job"], facts["ending"], facts["result"]
        if (bar := self._bars.pop(job.name, None)) is not None:
            self._live.remove_task(bar)
        self.done += 1
        place = f"{self.done}/{self.total}"
        good = ending.state == "finished"
        words = _figures_words(result) if good else f"{ending.state}: {ending.reason}"
        sign, style = ("✓", "green") if good else ("✗", "yellow")
        text = f"[{style}]{sign}[/{style}] {place:>6}  {escape(job.name)}   {escape(words)}"
        self.console.print(f"{text}   [dim]{duration(ending.seconds)}[/dim]", soft_wrap=True)
        left = self.total - self.done
        if self.done == 1 and left and good:
            rest = duration(ending.seconds * left / self.slots)
            self._print(f"about {rest} for the other {left}, if all are like the first", "dim")

    def on_stopping(self, facts: Mapping[str, Any]) -> None:
        """What goes on is told to end."""
        runs = "the run" if facts["count"] == 1 else f"{facts['count']} runs"
        self._print(f"waiting for a checkpoint of {runs} under way; Ctrl-C again ends it at once")

    def on_rungs(self, facts: Mapping[str, Any]) -> None:
        """It is known how the budget is shared."""
        rungs, guess = facts["rungs"], duration(facts["seconds"])
        if len(rungs) == 1:
            self._print(f"the budget takes all {facts['cells']} cells whole: about {guess}")
            return
        words = ", ".join(map(str, rungs))
        self._print(f"rungs of {words} steps, a third of the cells in each next one: about {guess}")

    def on_dropped(self, facts: Mapping[str, Any]) -> None:
        """Cells go no further."""
        for label, words in facts["dropped"].items():
            self._print(f"  dropped after {facts['steps']} steps: {label}, {words}", "dim")
        kept = ", ".join(facts["kept"])
        self._print(f"  going on: {kept}")

    def on_note(self, facts: Mapping[str, Any]) -> None:
        """Something the user may want to know."""
        self._print(f"note: {facts['text']}")


def _figures_words(result: Mapping[str, Any]) -> str:
    """Return the first figure of each evaluation, before and after: `perplexity 16.4 → 1.88`."""
    from ..folders.metrics import label, with_unit
    from .progress import four_digits

    found = []
    for evaluation, figures in result.get("evaluations", {}).items():
        name, figure = next(iter(figures.items()))
        values = [figure["values"].get(model) for model in ("quantized", "tuned")]
        shown = [with_unit(v, figure["unit"], four_digits) for v in values if v is not None]
        found.append(f"{label(evaluation, name)} {' → '.join(shown)}")
    return "   ".join(found)


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
    for text in table.remarks:
        console.print(f"warning: {text}", markup=False, soft_wrap=True, style="bold yellow")
    console.print(f"\n{found.words}", markup=False, soft_wrap=True)


def _told(row: Row) -> str:
    if row.state == "dropped":
        return f" [dim](after {row.steps} steps)[/dim]"
    return " [dim](reference)[/dim]" if row.reference and row.cell else ""


def result_lines(result: ComparisonResult) -> list[str]:
    """Return where everything is."""
    return [f"page: {result.folder / 'compare.html'}"]
