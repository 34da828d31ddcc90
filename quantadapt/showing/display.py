"""Shows a run while it goes on, and what came out of it.

On a terminal there is a spinner for the stage that is going on and a bar with loss and learning
rate while training; elsewhere the same facts come as plain lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from ..errors import Problem
from ..folders.metrics import duration, label, many, with_unit
from ..memory.cards import GIB, size_words

if TYPE_CHECKING:
    from rich.console import Console


BETWEEN = "loading libraries and data"
GAP = "   "
_PLAIN_LINES = 10
_ROUGHLY = 600
"""Seconds from which on nobody asks for the seconds."""
_BAR = (6, 40)
"""The fewest and the most columns of the bar."""
_SINCE = ("tokens", "seconds")
"""What a log counts from the beginning of the training."""


class RunDisplay:
    """A listener for `pipeline.run`; use it as a context manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = console.is_terminal
        self.details: list[str] = []
        self.stage = ""
        self._validated: list[str] = []
        self._live: Progress | None = None
        self._task = TaskID(0)
        self._last_line = 0
        self._last_log: Mapping[str, Any] = {}
        self._bar = BarColumn()

    def __enter__(self) -> RunDisplay:
        self._wait(BETWEEN)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def __call__(self, event: str, data: Mapping[str, Any]) -> None:
        """Show one event; those it does not know are passed over."""
        handler = getattr(self, f"on_{event}", None)
        if handler is not None:
            handler(data)

    def on_stage(self, data: Mapping[str, Any]) -> None:
        """A stage begins or is done."""
        name = str(data["name"])
        if data["state"] == "start":
            self.stage, self.details, self._last_line = name, [], 0
            self._last_log = {}
            self._wait(name)
            return
        details = "   ".join(self.details)
        self._stop()
        line = f"[green]✓[/green] {name:<9}{data['seconds']:>7.1f} s   {details}"
        self.console.print(line.rstrip(), soft_wrap=True)
        self._wait(BETWEEN)

    def on_figures(self, data: Mapping[str, Any]) -> None:
        """An evaluation has measured a model; the first of its figures is shown."""
        name, figure = next(iter(data["figures"].items()))
        what = escape(f"{label(data['evaluation'], name)} {data['model']}".rstrip())
        value = escape(with_unit(figure.value, figure.unit, four_digits))
        self.details.append(f"{what} [bold]{value}[/bold]")

    def on_export(self, data: Mapping[str, Any]) -> None:
        """An export was written, or not."""
        self.details.append(escape(f"{data['name']} {data['state']}"))
        if data["state"] == "failed":
            for line in export_lines({data["name"]: data}):
                self.console.print(line, markup=False, soft_wrap=True)

    def on_detail(self, data: Mapping[str, Any]) -> None:
        """Something to say when the stage is done."""
        self.details.append(escape(str(data["text"])))

    def on_note(self, data: Mapping[str, Any]) -> None:
        """Something the user may want to know."""
        self.console.print(f"note: {data['text']}", markup=False, soft_wrap=True)

    def on_warning(self, data: Mapping[str, Any]) -> None:
        """Something is wrong with what came out."""
        self.console.print(warning(data["text"]), soft_wrap=True)

    def on_log(self, data: Mapping[str, Any]) -> None:
        """Training reports a step."""
        step, most = int(data["step"]), int(data["max_steps"])
        numbers = self._numbers(data)
        self.details = [f"{many(step, 'step')}   loss {data['loss']:.4f}", *self._validated]
        if self.live:
            self._train_bar(step, most, numbers)
        elif step >= most or (step - self._last_line) * _PLAIN_LINES >= most:
            self._last_line = step
            line = f"  train step {step}/{most}   {_fitting(numbers)}"
            self.console.print(line, soft_wrap=True)
        self._last_log = data

    def _numbers(self, data: Mapping[str, Any]) -> list[tuple[int, str]]:
        """Return what a step is told by, each with a number that is small if it matters much."""
        numbers = [(0, f"loss {data['loss']:.4f}"), *((3, text) for text in self._validated)]
        if "reward" in data:
            numbers.insert(0, (0, f"reward {data['reward']:.4g}"))
        numbers.append((5, f"lr {data['learning_rate']:.2e}"))
        tokens, seconds = (
            float(data.get(key, 0)) - float(self._last_log.get(key, 0)) for key in _SINCE
        )
        if tokens > 0 and seconds > 0:
            numbers.append((2, f"{tokens / seconds:,.0f} tokens/s"))
        if data.get("peak_memory_gib"):
            numbers.append((4, size_words(data["peak_memory_gib"] * GIB)))
        if (left := float(data.get("seconds_left", 0))) >= 1:
            unit = 60 if left >= _ROUGHLY else 1
            numbers.append((1, f"{duration(unit * round(left / unit))} left"))
        return numbers

    def on_validation(self, data: Mapping[str, Any]) -> None:
        """Training has measured the loss on held-out data."""
        step, most = int(data["step"]), int(data["max_steps"])
        text = f"held-out loss {data['eval_loss']:.4f}"
        best = ", the lowest so far" if data["best"] else ""
        self._validated = [text]
        if not self.live:
            self.console.print(f"  train step {step}/{most}   {text}{best}", soft_wrap=True)

    def _train_bar(self, step: int, most: int, numbers: list[tuple[int, str]]) -> None:
        columns = ("{task.description}", "{task.completed}/{task.total}", "{task.fields[numbers]}")
        before, counted, beside = (TextColumn(text) for text in columns)
        taken = len(f"* train  {most}/{most}  ")
        shown = _fitting(numbers, self.console.width - taken - _BAR[0])
        width = min(self.console.width - taken - len(shown), _BAR[1])
        if self._live is None or self._live.tasks[0].total is None:
            self._bar = BarColumn(bar_width=width)
            columns_ = (SpinnerColumn(), before, self._bar, counted, beside)
            progress = Progress(*columns_, **_options(self.console))
            self._start(progress, "train", total=most, numbers=shown)
        assert self._live is not None
        self._bar.bar_width = width
        self._live.update(self._task, completed=step, numbers=shown)

    def _wait(self, text: str) -> None:
        """Show a spinner; nothing where there is no terminal."""
        if self.live:
            self._start(_spinner(self.console), text, total=None)

    def _start(self, live: Progress, text: str, **task: Any) -> None:
        self._stop()
        self._live = live
        self._task = live.add_task(text, **task)
        live.start()

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


@contextmanager
def spinner(console: Console, text: str) -> Iterator[None]:
    """Show a spinner while the body runs; nothing where there is no terminal."""
    if not console.is_terminal:
        yield
        return
    with _spinner(console) as live:
        live.add_task(escape(text), total=None)
        yield


@contextmanager
def counting(
    console: Console, text: str, total: int, done: int = 0
) -> Iterator[Callable[[], None]]:
    """Show how many of `total` are done and how long the rest takes; yields what counts one more.
    Nothing is shown where there is no terminal."""
    if not console.is_terminal:
        yield lambda: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), **_options(console)) as live:
        task = live.add_task(escape(text), total=total, completed=done)
        yield lambda: live.advance(task)


class Waiting:
    """A spinner beside which lines may be printed; nothing where there is no terminal, or no text.

    Use it as a context manager, and print in that of `aside`.
    """

    def __init__(self, console: Console, text: str) -> None:
        self.console, self.text = console, text
        self._live: Progress | None = None

    def __enter__(self) -> Waiting:
        if self.console.is_terminal and self.text:
            self._live = _spinner(self.console)
            self._live.add_task(escape(self.text), total=None)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Take the spinner off for a moment."""
        if self._live is not None:
            self._live.stop()
        yield
        if self._live is not None:
            self._live.start()


def _fitting(numbers: Iterable[tuple[int, str]], room: float = math.inf) -> str:
    """Return those texts that matter most and fit into `room` columns, in their order."""
    numbers, kept, left = list(numbers), set[int](), room + len(GAP)
    for rank, text in sorted(numbers):
        if not kept or len(text) + len(GAP) <= left:
            kept.add(rank)
            left -= len(text) + len(GAP)
    return GAP.join(text for rank, text in numbers if rank in kept)


def _spinner(console: Console) -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    return Progress(*columns, **_options(console))


def _options(console: Console) -> dict[str, Any]:
    """Leave stdout alone: vendors' output must not come to the screen through rich."""
    return {
        "console": console,
        "transient": True,
        "redirect_stdout": False,
        "redirect_stderr": False,
    }


def warning(text: str) -> Text:
    """Return a warning as it is shown."""
    return Text(f"warning: {text}", style="bold yellow")


def four_digits(value: float) -> str:
    """Return four significant digits, zeros at the end included: 14.00."""
    return f"{value:#.4g}".rstrip(".")


def export_lines(exports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return what became of the exports, as `metrics.json` has them, and why one was refused."""
    lines = []
    for name, found in exports.items():
        lines.append(f"{name}: {found['words']}")
        lines += [f"  {Problem(**refusal)}" for refusal in found["refusals"]]
    return lines
