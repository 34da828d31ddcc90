"""Shows a comparison while it goes on: a line for each run that has ended, on a terminal also a bar
for each that is under way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.progress import SpinnerColumn, TaskID

from ..folders.metrics import duration, label, with_unit
from .bars import Bars
from .display import four_digits

if TYPE_CHECKING:
    from rich.console import Console

_SLOWER = 1.25
"""So much slower than was told, and it is told anew."""


class CompareDisplay(Bars):
    """A listener for `quantadapt.compare`; use it as a context manager."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, SpinnerColumn())
        self.done, self.total, self.slots = 0, 0, 1
        self._took: list[float] = []
        self._told = 0.0
        self._bars: dict[str, TaskID] = {}

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
        self._took, self._told = [], 0.0
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
        told = f"step {done}/{total}  loss {facts['loss']:.4f}"
        if isinstance(left := facts.get("seconds_left"), float):
            told += f"  {duration(left)} left"
        told = told if done < total else "measuring"
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
        if good:
            self._tell_rest(ending.seconds)

    def _tell_rest(self, seconds: float) -> None:
        """Say how long the others take: after the first, and where they turn out to be slower."""
        self._took.append(seconds)
        left, each = self.total - self.done, sum(self._took) / len(self._took)
        if not left or each < _SLOWER * self._told:
            return
        self._told = each
        rest = duration(each * max(left / self.slots, 1))
        like = "the first" if len(self._took) == 1 else f"the first {len(self._took)}"
        self._print(f"about {rest} for the other {left}, if all are like {like}", "dim")

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
        for cell, words in facts["dropped"].items():
            self._print(f"  dropped after {facts['steps']} steps: {cell}, {words}", "dim")
        kept = ", ".join(facts["kept"])
        self._print(f"  going on: {kept}")

    def on_note(self, facts: Mapping[str, Any]) -> None:
        """Something the user may want to know."""
        self._print(f"note: {facts['text']}")


def _figures_words(result: Mapping[str, Any]) -> str:
    """Return the first figure of each evaluation, before and after: `perplexity 16.4 → 1.88`."""
    found = []
    for evaluation, figures in result.get("evaluations", {}).items():
        name, figure = next(iter(figures.items()))
        values = [figure["values"].get(model) for model in ("quantized", "tuned")]
        shown = [with_unit(v, figure["unit"], four_digits) for v in values if v is not None]
        found.append(f"{label(evaluation, name)} {' → '.join(shown)}")
    return "   ".join(found)
