"""What evaluations measured: a chart and tables for each."""

from __future__ import annotations

from collections.abc import Sequence

from ..folders.metrics import change_words, direction, told_apart, with_error
from .charts import Bar, bar_chart
from .html import Html, capital, details, el, numbers_table, section
from .run import Measured, Run, measured, part, text
from .words import short

_BARS = {
    "unquantized": ("base, not quantized", "before"),
    "quantized": ("quantized", "before"),
    "tuned": ("quantized + adapter", "after"),
    "merged": ("merged", "after"),
}


def evaluation_sections(run: Run) -> Html:
    """Return a section for each evaluation, and for those that failed."""
    sections = [
        _evaluation(figures, f"evaluation-{index}")
        for index, (_, figures) in enumerate(measured(run), start=1)
    ]
    failed = part(run.metrics, "failed_evaluations")
    reasons = [el("li", el("strong", name), f": {text(failed, name)}") for name in failed]
    if reasons:
        sections.append(section("Not measured", el("ul", *reasons)))
    return Html("".join(sections))


def _evaluation(figures: Sequence[Measured], name: str) -> Html:
    """Draw the first of an evaluation's figures; the others are a table."""
    first, *others = figures
    bars = [
        Bar(_BARS[model][0], value, _model_value(first, model, first.unit), _BARS[model][1])
        for model, value in first.values.items()
    ]
    low = min((bar.value for bar in bars), default=0.0)
    log = low > 0 and max(bar.value for bar in bars) > 10 * low
    above, _ = told_apart(first.unit)
    data = "" if first.errors else "On held-out data"
    where = ", ".join(filter(None, (data, f"in {above}" if above else "")))
    note = f"{capital('; '.join(filter(None, (where, direction(first.better)))))}."
    if first.errors:
        note += " Behind ± stands the standard error."
        others = list(figures)
    if log:
        note += " The scale is logarithmic."
    title = capital(first.name)
    chart = bar_chart(title, bars, log=log, unit=above, name=name) if bars else Html()
    tables = (_others(others), _changes(others))
    return section(title, el("p", note, class_="note"), chart, *tables, name=name)


def _others(figures: Sequence[Measured]) -> Html:
    """Return figures as a table, a column for each model."""
    models = [model for model in _BARS if any(model in figure.values for figure in figures)]
    rows = []
    for figure in figures:
        above, beside = told_apart(figure.unit)
        name = ", ".join(filter(None, (figure.name, above, direction(figure.better))))
        rows.append([name, *(_model_value(figure, model, beside) for model in models)])
    return numbers_table(["", *models], rows) if models else Html()


def _changes(figures: Sequence[Measured]) -> Html:
    """Return as a table what changed from one model to the next, a column for each."""
    steps = dict.fromkeys(
        (model, str(figure.changes[model]["since"]))
        for model in _BARS
        for figure in figures
        if model in figure.changes
    )
    rows = []
    for figure in figures:
        found = [figure.changes.get(model) for model, _ in steps]
        words = [_together(change_words(c, figure.unit)) if c else "" for c in found]
        rows.append([figure.name, *words])
    heads = [f"{model} since {before}" for model, before in steps]
    table = numbers_table(["change", *heads], rows)
    return details("What changed", table) if steps else Html()


def _model_value(figure: Measured, model: str, unit: str) -> str:
    if (value := figure.values.get(model)) is None:
        return ""
    error = figure.errors.get(model)
    return _together(with_error(value, error, unit, short))


def _together(text: str) -> str:
    """Keep a value, its error and its unit on one line."""
    return text.replace(" ", "\N{NO-BREAK SPACE}") if "±" in text else text
