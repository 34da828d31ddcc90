"""Shows a run while it goes on, and what came out of it.

On a terminal there is a spinner for the stage that is going on and a bar with loss and learning
rate while training; elsewhere the same facts come as plain lines.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from ..errors import Problem
from ..folders.metrics import MODELS, direction, label, told_apart, with_unit

if TYPE_CHECKING:
    from rich.console import Console

    from ..folders.metrics import Measured
    from ..planning.stage import Plan
    from ..spec import TrainSpec

BETWEEN = "loading libraries and data"
_PLAIN_LINES = 10


class RunDisplay:
    """A listener for `pipeline.run`; use it as a context manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.details: list[str] = []
        self.stage = ""
        self._validated: list[str] = []
        self._live: Progress | None = None
        self._task = TaskID(0)
        self._last_line = 0

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
        what = escape(f"{label(data['evaluation'], name)} {data['model']}")
        value = escape(with_unit(figure.value, figure.unit, four_digits))
        self.details.append(f"{what} [bold]{value}[/bold]")

    def on_export(self, data: Mapping[str, Any]) -> None:
        """An export was written, or not."""
        self.details.append(f"{data['name']} {data['state']}")
        if data["state"] == "failed":
            for line in export_lines({data["name"]: data}):
                self.console.print(line, markup=False, soft_wrap=True)

    def on_note(self, data: Mapping[str, Any]) -> None:
        """Something the user may want to know."""
        self.console.print(f"note: {data['text']}", markup=False, soft_wrap=True)

    def on_warning(self, data: Mapping[str, Any]) -> None:
        """Something is wrong with what came out."""
        self.console.print(warning(data["text"]), soft_wrap=True)

    def on_log(self, data: Mapping[str, Any]) -> None:
        """Training reports a step."""
        step, most = int(data["step"]), int(data["max_steps"])
        numbers = f"loss {data['loss']:.4f}   lr {data['learning_rate']:.2e}"
        self.details = [f"{step} steps   loss {data['loss']:.4f}", *self._validated]
        numbers = "   ".join([numbers, *self._validated]) if self.console.is_terminal else numbers
        if self.console.is_terminal:
            self._train_bar(step, most, numbers)
        elif step >= most or (step - self._last_line) * _PLAIN_LINES >= most:
            self._last_line = step
            self.console.print(f"  train step {step}/{most}   {numbers}", soft_wrap=True)

    def on_validation(self, data: Mapping[str, Any]) -> None:
        """Training has measured the loss on held-out data."""
        step, most = int(data["step"]), int(data["max_steps"])
        text = f"held-out loss {data['eval_loss']:.4f}"
        best = ", the lowest so far" if data["best"] else ""
        self._validated = [text]
        if not self.console.is_terminal:
            self.console.print(f"  train step {step}/{most}   {text}{best}", soft_wrap=True)

    def _train_bar(self, step: int, most: int, numbers: str) -> None:
        if self._live is None or self._live.tasks[0].total is None:
            self._start(
                Progress(
                    SpinnerColumn(),
                    TextColumn("{task.description}"),
                    BarColumn(),
                    TextColumn("{task.completed}/{task.total}"),
                    TextColumn("{task.fields[numbers]}"),
                    TimeRemainingColumn(),
                    **_options(self.console),
                ),
                "train",
                total=most,
                numbers=numbers,
            )
        assert self._live is not None
        self._live.update(self._task, completed=step, numbers=numbers)

    def _wait(self, text: str) -> None:
        """Show a spinner; nothing where there is no terminal."""
        if self.console.is_terminal:
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
        live.add_task(text, total=None)
        yield


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
            self._live.add_task(self.text, total=None)
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


def plan_lines(plan: Plan) -> list[str]:
    """Return the plan in three lines."""
    spec, train = plan.spec, plan.spec.train
    quantizer = _call(plan.backend.name, plan.quantizer.model_dump())
    adapter = _call(plan.adapter.name, plan.adapter_options)
    return [
        f"model   {model_name(plan)} on {device_words(plan)} in {plan.dtype}",
        f"train   {adapter} on {quantizer}, {steps_words(train)} at {train.learning_rate:g}",
        f"output  {spec.output}: {export_words(plan)}",
    ]


def steps_words(train: TrainSpec) -> str:
    """Say how long the training is."""
    if train.max_steps > 0:
        return f"{train.max_steps} steps"
    return f"{train.num_train_epochs:g} epochs"


def model_name(plan: Plan) -> str:
    """Return the model as the user named it."""
    return plan.spec.model or "the bundled demo"


def device_words(plan: Plan) -> str:
    """Say on what the plan works."""
    if plan.processes == 1:
        return plan.device
    return f"{plan.processes} x {plan.device.partition(':')[0]} ({plan.parallel})"


def export_words(plan: Plan) -> str:
    """Say what will be written."""
    return ", ".join(export.words for export in plan.exports)


def _call(name: str, options: Mapping[str, Any]) -> str:
    given = ", ".join(f"{key}={value}" for key, value in options.items())
    return f"{name}({given})" if given else name


def show_result(console: Console, folder: Path, metrics: Mapping[str, Any]) -> None:
    """Print what was measured, a sample before and after, what was written and the report."""
    console.print()
    warnings = metrics.get("warnings", [])
    console.print(_figures(metrics.get("evaluations", {}), "yellow" if warnings else "green"))
    for text in warnings:
        console.print(warning(text), soft_wrap=True)
    for name, why in metrics.get("failed_evaluations", {}).items():
        console.print(f"{name}: {why}", markup=False, soft_wrap=True)
    for sample in metrics.get("samples", [])[:1]:
        console.print(_sample(sample))
    for line in export_lines(metrics.get("exports", {})):
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"report: [bold]{escape(str(folder / 'report.html'))}[/bold]", soft_wrap=True)


def warning(text: str) -> Text:
    """Return a warning as it is shown."""
    return Text(f"warning: {text}", style="bold yellow")


def _figures(evaluations: Mapping[str, Mapping[str, Measured]], colour: str) -> Table:
    """Return a row for each model, a column for the first figure of each evaluation; the tuned
    model's is in `colour`."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("on held-out data")
    columns = []
    for evaluation, figures in evaluations.items():
        name, figure = next(iter(figures.items()))
        above, beside = told_apart(figure["unit"])
        columns.append((figure["values"], beside))
        head = ", ".join(filter(None, (label(evaluation, name), above)))
        head = f"{head}\n{direction(figure['better'])}".strip()
        table.add_column(escape(head), justify="right")
    for model, text in MODELS.items():
        cells = [
            "" if (value := values.get(model)) is None else with_unit(value, beside, four_digits)
            for values, beside in columns
        ]
        if any(cells):
            style = f"bold {colour}" if model == "tuned" else ""
            table.add_row(f"{model}: {text}", *cells, style=style)
    return table


def _sample(sample: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 3, 0, 0))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    table.add_row("")
    for name in ("prompt", "before", "after"):
        table.add_row(name, escape(_shown(str(sample.get(name, "")))))
    table.add_row("")
    return table


def _shown(text: str, lines: int = 6) -> str:
    """Return the first lines of a text, without the empty ones around them."""
    kept = text.strip().splitlines()
    return "\n".join([*kept[:lines], "..."] if len(kept) > lines else kept) or "(nothing)"


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
