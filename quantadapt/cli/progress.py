"""What a plan and a run come to, as the command line prints it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from ..folders.metrics import (
    MODELS,
    change_words,
    direction,
    label,
    told_apart,
    with_error,
    with_unit,
)
from ..planning.words import device_words, export_words, model_name, steps_words
from ..records import as_call
from ..showing.display import RunDisplay, Waiting, export_lines, four_digits, spinner, warning

if TYPE_CHECKING:
    from rich.console import Console

    from ..folders.metrics import Measured
    from ..planning.planned import Plan

__all__ = [
    "RunDisplay",
    "Waiting",
    "export_lines",
    "figures_table",
    "four_digits",
    "plan_lines",
    "show_errors",
    "show_result",
    "spinner",
]


def plan_lines(plan: Plan) -> list[str]:
    """Return the plan in three lines."""
    spec, train = plan.spec, plan.spec.train
    quantizer = as_call(plan.backend.name, plan.quantizer.model_dump())
    adapter = as_call(plan.adapter.name, plan.adapter_options)
    return [
        f"model   {model_name(plan)} on {device_words(plan)} in {plan.dtype}",
        f"train   {adapter} on {quantizer}, {steps_words(train)} at {train.learning_rate:g}",
        f"output  {spec.output}: {export_words(plan)}",
    ]


def show_result(console: Console, folder: Path, metrics: Mapping[str, Any]) -> None:
    """Print what was measured, a sample before and after, what was written and the report."""
    console.print()
    warnings = metrics.get("warnings", [])
    console.print(figures_table(metrics.get("evaluations", {}), "yellow" if warnings else "green"))
    for figures in metrics.get("evaluations", {}).values():
        show_errors(console, figures)
    for text in warnings:
        console.print(warning(text), soft_wrap=True)
    for name, why in metrics.get("failed_evaluations", {}).items():
        console.print(f"{name}: {why}", markup=False, soft_wrap=True)
    for sample in metrics.get("samples", [])[:1]:
        console.print(_sample(sample))
    for line in export_lines(metrics.get("exports", {})):
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"report: [bold]{escape(str(folder / 'report.html'))}[/bold]", soft_wrap=True)


def figures_table(evaluations: Mapping[str, Mapping[str, Measured]], colour: str) -> Table:
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
            table.add_row(f"{model}: {text}", *map(escape, cells), style=style)
    return table


def show_errors(console: Console, figures: Mapping[str, Measured]) -> None:
    """Print figures with their standard errors, if they have such, and what training changed."""
    known = {name: figure for name, figure in figures.items() if figure.get("errors")}
    models = [model for model in MODELS if any(model in f["values"] for f in known.values())]
    if not known:
        return
    changed = [model for f in known.values() for model in f.get("changes", {})]
    last = "tuned" if "tuned" in changed else next(iter(changed), "")
    since = {f["changes"][last]["since"] for f in known.values() if last in f.get("changes", {})}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("± standard error", overflow="fold")
    for head in [*models, *(f"{last} since {other}" for other in since)]:
        table.add_column(head, justify="right")
    for name, figure in known.items():
        cells = [_with_error(figure, model) for model in models]
        change = figure.get("changes", {}).get(last)
        cells += [change_words(change, figure["unit"]) if change else ""] if since else []
        lower = direction(figure["better"]) if figure["better"] == "lower" else ""
        table.add_row(escape(f"{name}, {lower}".strip(", ")), *map(escape, cells))
    console.print()
    console.print(table)


def _with_error(figure: Measured, model: str) -> str:
    value = figure["values"].get(model)
    if value is None:
        return ""
    return with_error(value, figure["errors"].get(model), figure["unit"], four_digits)


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
