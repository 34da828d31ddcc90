"""The page that a run leaves behind: `report.html`, made from the files in the run folder alone.

One file, no scripts, no network, light and dark. Whatever the folder lacks is left out of the page.
Everything goes through `el`, which escapes all text; nothing else makes HTML.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..folders.metrics import (
    change_words,
    direction,
    duration,
    told_apart,
    with_error,
)
from ..folders.run_folder import RunFolder
from ..memory.workload import Setting
from .charts import Bar, Curve, bar_chart, line_chart
from .html import (
    Child,
    Html,
    capital,
    details,
    document,
    el,
    facts_table,
    figures_list,
    numbers_table,
    section,
)
from .run import Measured, Run, items, measured, number, part, text
from .words import count, counted, headline, lede, mebibytes, percent, short


def write_report(folder: RunFolder) -> Path:
    """Make `report.html` from the files in the folder, and return its path."""
    return folder.write_text("report.html", render(Run.read(folder)))


def render(run: Run) -> str:
    """Return the whole page."""
    sections = [section for make in SECTIONS if (section := make(run))]
    return document(headline(run), el("main", _header(run), *sections), _footer(run))


def _header(run: Run) -> Html:
    state, started = text(run.marker, "state"), text(run.marker, "started")
    eyebrow = el(
        "p",
        el("span", "quantadapt", class_="brand"),
        el("span", state, class_=f"state {state}") if state else "",
        el("time", f"{started[:16].replace('T', ' ')} UTC", datetime=started) if started else "",
        class_="eyebrow",
    )
    cell, _, result = headline(run).partition(": ")
    result = result.replace(" → ", "\N{NO-BREAK SPACE}→\N{NO-BREAK SPACE}")
    title = el("h1", cell, el("span", result, class_="result") if result else "")
    words = lede(run)
    found = run.metrics.get("warnings")
    warnings = [
        el("p", el("strong", "Warning: "), capital(str(warning)), class_="warning", role="alert")
        for warning in (found if isinstance(found, list) else [])
    ]
    return el("header", eyebrow, title, el("p", words, class_="lede") if words else "", *warnings)


def _footer(run: Run) -> Html:
    version = text(run.marker, "version")
    made = f"Made by quantadapt {version}".strip()
    return el("footer", el("p", f"{made} from the files beside this page."))


_BARS = {
    "unquantized": ("base, not quantized", "before"),
    "quantized": ("quantized", "before"),
    "tuned": ("quantized + adapter", "after"),
    "merged": ("merged", "after"),
}


def _evaluations(run: Run) -> Html:
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
    return _together(with_error(counted(value, figure.better), error, unit, short))


def _together(text: str) -> str:
    """Keep a value, its error and its unit on one line."""
    return text.replace(" ", "\N{NO-BREAK SPACE}") if "±" in text else text


def _loss(run: Run) -> Html:
    points, held_out = _points(run, "loss"), _points(run, "eval_loss")
    if len(points) < 2:
        return Html()
    facts = [f"{points[0][0]:g} to {points[-1][0]:g} optimizer steps"]
    seconds, tokens = (number(run.metrics, "train", key) for key in ("seconds", "tokens"))
    if seconds and tokens:
        facts.append(f"{count(tokens)} tokens at {short(tokens / seconds)} per second")
    note = f"{'; '.join(facts)}. The line is a moving average over the dots."
    train = part(run.metrics, "train")
    kept, best = number(train, "kept_step"), number(train, "best_step")
    last = number(train, "steps")
    if held_out:
        note += " The dashed line with diamonds is the loss on held-out data."
    words = [f"It was lowest at step {best:g}." if best is not None else ""]
    words += [f"The adapter of step {kept:g} is kept." if held_out and kept is not None else ""]
    words += ["Training stopped early." if train.get("stopped_early") is True else ""]
    note = " ".join(filter(None, [note, *words]))
    earlier = kept if kept != last else None
    unit = text(train, "unit") if "unit" in train else "nats per token"  # of older runs
    chart = line_chart(Curve(points, held_out, earlier, number(train, "resumed_from"), unit))
    return section("Training loss", el("p", capital(note), class_="note"), chart)


def _reward(run: Run) -> Html:
    """Draw what answers got while the model learnt from them, where it did."""
    points = _points(run, "reward")
    if len(points) < 2:
        return Html()
    note = "The mean over all answers since the last log. The line is a moving average over the"
    chart = line_chart(Curve(points, what="reward"))
    return section("Reward", el("p", f"{note} dots.", class_="note"), chart)


def _points(run: Run, key: str) -> list[tuple[float, float]]:
    """Return (step, value) of the log's lines that have both."""
    pairs = ((number(line, "step"), number(line, key)) for line in run.log)
    return [(step, value) for step, value in pairs if step is not None and value is not None]


def _data(run: Run) -> Html:
    data = part(run.metrics, "data")
    limit = number(data, "max_length") or 0
    files = [_data_file(file, int(limit)) for file in items(data, "files")]
    return section("Data", *files) if files else Html()


def _data_file(file: Mapping[str, Any], limit: int) -> Html:
    """Return a file as a heading and a table of its counts."""
    counts = {key: number(file, key) for key in ("examples", "held_out", "tokens", "learnt")}
    rows: list[tuple[str, Child]] = [("format", text(file, "format"))]
    rows += [(key, f"{value:,.0f}") for key, value in counts.items() if value is not None]
    if cut := number(file, "cut"):
        lost = number(file, "lost") or 0
        rows.append(("cut", f"{cut:,.0f} to {limit} tokens; {lost:,.0f} tokens to learn lost"))
    for key in ("dropped", "remarks"):
        reasons = part(file, key)
        lines = [f"{value:,.0f} {why}" for why in reasons if (value := number(reasons, why))]
        rows += [(key if not index else "", line) for index, line in enumerate(lines)]
    unused = file.get("unused")
    if isinstance(unused, list) and unused:
        rows.append(("other columns", ", ".join(map(str, unused))))
    return el("div", el("h3", text(file, "file")), facts_table(rows))


def _stages(run: Run) -> Html:
    stages = part(run.metrics, "stages")
    found = [(name, value) for name in stages if (value := number(stages, name)) is not None]
    total = sum(value for _, value in found)
    if not total:
        return Html()
    longest = max(value for _, value in found)
    bars = [
        Bar(name, value, duration(value), "after" if value == longest else "before")
        for name, value in found
    ]
    note = el("p", f"{duration(total)} in all.", class_="note")
    return section("Time per stage", note, bar_chart("Time per stage", bars, unit="seconds"))


def _memory(run: Run) -> Html:
    size = part(run.metrics, "size")
    named = {
        "dense_mib": ("base, not quantized", "before"),
        "quantized_mib": ("quantized", "after"),
        "adapter_mib": ("adapter", "after"),
    }
    found = [(name, value) for name in named if (value := number(size, name)) is not None]
    bars = [Bar(named[name][0], value, mebibytes(value), named[name][1]) for name, value in found]
    chart = bar_chart("Size of the weights", bars, unit="MiB") if bars else Html()
    train = part(run.metrics, "train")
    figures = figures_list(_memory_figures(train))
    words = _setting_words(part(train, "memory"))
    note = el("p", words, class_="note") if words else Html()
    return section("Memory", chart, figures, note) if chart or figures else Html()


def _memory_figures(train: Mapping[str, Any]) -> list[tuple[str, str]]:
    peak, trained = number(train, "peak_memory_gib"), number(train, "trainable_parameters")
    base = number(train, "base_parameters")
    figures = []
    if trained is not None:
        share = f", {percent(trained / base)} of the base" if base else ""
        figures.append((count(trained), f"trainable parameters{share}"))
    if peak is not None:
        figures.append((mebibytes(peak * 1024), "peak memory"))
    predicted = number(train, "memory", "predicted_gib")
    if predicted is not None:
        figures.append((mebibytes(predicted * 1024), "predicted for it"))
    if (empty := number(train, "packed", "empty")) is not None:
        figures.append((f"{1 - empty:.1%}", "of packed rows filled"))
    if (streamed := number(train, "streamed", "gib")) is not None:
        figures.append((mebibytes(streamed * 1024), "of the base copied to the GPU in a step"))
    if (hidden := number(train, "streamed", "hidden")) is not None:
        figures.append((percent(hidden), "of the time of copies hidden"))
    dequantizing = number(train, "dequantize_share")
    if dequantizing is not None:
        figures.append((percent(dequantizing), "of training spent on dequantizing"))
    rounding = number(train, "rounding_share")
    if rounding is not None:
        figures.append((percent(rounding), "of training spent on rounding weights"))
    return figures


def _setting_words(memory: Mapping[str, Any]) -> str:
    """Return how training used memory, e.g. `20 of 32 layers recomputed, ...`."""
    names = ("recomputed_layers", "micro_batch", "layers", "batch")
    count, size, layers, batch = (number(memory, name) for name in names)
    if count is None or size is None or layers is None or batch is None:
        return ""
    setting = Setting(int(count), memory.get("offload") is True, int(size))
    return capital(f"{setting.describe(int(layers), int(batch))}.")


def _exports(run: Run) -> Html:
    """Show what was written; where a run did not get that far, what its plan refuses."""
    found = part(run.metrics, "exports")
    parts = [_export(name, part(found, name)) for name in found] or [
        _export(text(planned, "name"), planned)
        for planned in items(run.plan, "exports")
        if items(planned, "refusals")
    ]
    return section("Exports", *parts) if parts else Html()


def _export(name: str, export: Mapping[str, Any]) -> Html:
    state, words = text(export, "state"), text(export, "words")
    verdict = el("p", el("strong", name), ": ", words, class_=f"verdict {state}")
    figures = part(export, "figures")
    told = re.search(r"\d", words.replace(text(export, "folder"), ""))  # by the words already
    shown = [
        (_figure(value, part(figures, key)), key.replace("_", " "))
        for key in figures
        if not told and (value := number(figures, key, "value")) is not None
    ]
    return el("div", verdict, figures_list(shown), *map(_refusal, items(export, "refusals")))


def _figure(value: float, figure: Mapping[str, Any]) -> str:
    unit = text(figure, "unit")
    if unit == "share":
        return percent(value)
    return f"{short(counted(value, text(figure, 'better')))} {unit}".strip()


def _refusal(refusal: Mapping[str, Any]) -> Html:
    where, rule, fix = (text(refusal, key) for key in ("where", "rule", "fix"))
    source = " · ".join(part for part in (where, f"rule {rule}" if rule else "") if part)
    return el(
        "div",
        el("p", text(refusal, "what")),
        el("p", el("strong", "Way out: "), fix) if fix else "",
        el("p", source, class_="note") if source else "",
        class_="refusal",
    )


def _samples(run: Run) -> Html:
    samples = [_sample(item) for item in items(run.metrics, "samples")]
    note = "Held-out prompts, answered greedily by the quantized model before and after training."
    return section("Samples", el("p", note, class_="note"), *samples) if samples else Html()


def _sample(sample: Mapping[str, Any]) -> Html:
    answers = [
        _answer(key.capitalize(), text(sample, key), key)
        for key in ("before", "after", "reference")
        if sample.get(key) is not None
    ]
    prompt = _answer("Prompt", text(sample, "prompt"), "prompt")
    return el("article", prompt, el("div", *answers, class_="answers"), class_="sample")


def _answer(label: str, text: str, kind: str) -> Html:
    body = el("pre", text, dir="auto", tabindex="0") if text.strip() else el("em", "nothing")
    return el("div", el("h3", label), body, class_=f"answer {kind}")


def _plan(run: Run) -> Html:
    rows: list[tuple[str, Child]] = []
    named = [(key, part(run.plan, key)) for key in ("backend", "adapter", "objective")]
    named += [("evaluation", record) for record in items(run.plan, "evaluations")]
    for key, record in named:
        if record:
            options = _chips(record.get("options"))
            rows.append((key, el("div", el("strong", text(record, "name")), " ", options)))
    shown = ("backend", "adapter", "objective", "evaluations", "exports", "merge", "merge_refusals")
    elsewhere = (*shown, "notes", "memory")
    plain = [key for key in run.plan if key not in elsewhere]
    rows += [(key, _value(run.plan[key])) for key in plain if run.plan[key] not in (None, [], {})]
    notes = run.plan.get("notes")
    listed = [el("li", str(note)) for note in notes] if isinstance(notes, list) else []
    heading = [el("h3", "Notes"), el("ul", *listed)] if listed else []
    return section("Plan", facts_table(rows), *heading) if rows or listed else Html()


def _value(value: object) -> Html:
    if isinstance(value, Mapping):
        return _chips(value)
    if isinstance(value, (list, tuple)):
        return el("span", *[el("code", str(item)) for item in value], class_="chips")
    words = {True: "yes", False: "no"}
    return el("span", words[value] if isinstance(value, bool) else str(value))


def _chips(options: object) -> Html:
    if not isinstance(options, Mapping):
        return Html()
    chips = [el("code", f"{key}={value}") for key, value in options.items() if value is not None]
    return el("span", *chips, class_="chips")


def _command(run: Run) -> Html:
    command = text(run.metrics, "command")
    return section("Run it again", el("pre", command, class_="command")) if command else Html()


def _spec(run: Run) -> Html:
    if not run.spec.strip():
        return Html()
    return section("Spec", details("The resolved spec, as YAML", el("pre", run.spec)))


def _environment(run: Run) -> Html:
    versions = part(run.environment, "versions")
    facts = {key: value for key, value in run.environment.items() if key != "versions"}
    rows = [(key, str(value)) for key, value in facts.items() if value not in (None, "")]
    rows += [(name, str(version or "not installed")) for name, version in versions.items()]
    if not rows:
        return Html()
    table = details("Machine and versions", facts_table(rows))
    return section("Environment", table)


SECTIONS: tuple[Callable[[Run], Html], ...] = (
    _evaluations,
    _samples,
    _reward,
    _loss,
    _exports,
    _memory,
    _data,
    _stages,
    _command,
    _plan,
    _spec,
    _environment,
)
"""In the order of the page."""
