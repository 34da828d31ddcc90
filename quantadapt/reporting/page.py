"""The page that a run leaves behind: `report.html`, made from the files in the run folder alone.

One file, no scripts, no network, light and dark. Whatever the folder lacks is left out of the page.
Everything goes through `el`, which escapes all text; nothing else makes HTML.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..folders.metrics import with_unit
from ..folders.run_folder import RunFolder
from .html import Child, Html, capital, details, document, el, facts_table, figures_list, section
from .measured import evaluation_sections
from .run import Run, items, number, part, text
from .training import loss_section, memory_section, reward_section, stages_section
from .words import headline, lede, percent, short


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


def _data(run: Run) -> Html:
    data = part(run.metrics, "data")
    limit = number(data, "max_length") or 0
    files = [_data_file(file, int(limit)) for file in items(data, "files")]
    return section("Data", *files) if files else Html()


def _data_file(file: Mapping[str, Any], limit: int) -> Html:
    """Return a file as a heading and a table of its counts."""
    counts = {key: number(file, key) for key in ("examples", "held_out", "tokens", "learnt")}
    counts["learnt"] = counts["learnt"] or None  # of texts for vectors, labels or rewards: no token
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
    return with_unit(value, unit, short)


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
    evaluation_sections,
    _samples,
    reward_section,
    loss_section,
    _exports,
    memory_section,
    _data,
    stages_section,
    _command,
    _plan,
    _spec,
    _environment,
)
"""In the order of the page."""
