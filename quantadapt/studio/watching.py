"""What the studio shows of a run, from its folder alone: how far it is, its curve, its report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..folders.metrics import duration
from ..folders.run_folder import RunFolder
from ..reporting.charts import Curve, line_drawings
from ..reporting.html import Html, capital, el, figures_list
from ..reporting.run import Run, number, text
from ..reporting.words import headline, mebibytes, short
from .running import Runs, State

_RECENT = 5
"""Log lines that tokens per second are taken from."""
_HINTS = {
    "elsewhere": "It was not started here; so it is shown, and not touched.",
    "interrupted": "Where it was training, it left a checkpoint: “Go on” resumes it there.",
    "ended": "Its process has gone without a word. “Go on” resumes it from its last checkpoint.",
}


def watch_html(runs: Runs, folder: RunFolder | None) -> Html:
    """Return how far a run is."""
    if folder is None:
        return el("div", el("p", "There is no run here yet.", class_="note"), class_="qa")
    state, run = runs.state(folder), _read(folder)
    parts = [el("h2", headline(run) if run.plan else folder.path.name), _state_line(state, run)]
    more = " ".join(filter(None, [_sentence(state.more), _HINTS.get(state.kind)]))
    if more:
        parts.append(el("p", more, class_="note"))
    parts += _progress(run, state)
    below = []
    if len(points := _pairs(run, "loss")) > 1:
        drawn = line_drawings(Curve(points, _pairs(run, "eval_loss")))
        below.append(el("div", *drawn, class_="qa-chart"))
    if printed := runs.printed(folder):
        below.append(el("pre", printed, class_="boxed"))
    return el("div", *parts, el("div", *below, class_="beside"), class_="qa")


def report_html(folder: RunFolder | None) -> Html:
    """Return the report of a run in a frame that may do nothing: the folder may come from
    elsewhere."""
    if folder is None:
        return Html()
    file = folder.path / "report.html"
    inside = file.is_file() and file.resolve().is_relative_to(folder.path.resolve())
    if not inside:
        return el("div", el("p", "It appears when the run has ended.", class_="note"), class_="qa")
    page = file.read_text(encoding="utf-8", errors="replace")
    frame = el("iframe", srcdoc=page, sandbox="", title=f"report of {folder.path.name}")
    return el("div", frame, class_="qa")


def _sentence(words: str) -> str:
    return f"{capital(words)}." if words else ""


def _read(folder: RunFolder) -> Run:
    """Read the folder's files, which may be in the making or somebody else's work."""
    try:
        return Run.read(folder)
    except Exception:
        return Run(folder.marker, {}, {}, [], {}, "")


def _state_line(state: State, run: Run) -> Html:
    started = text(run.marker, "started")[:16].replace("T", " ")
    since = f", started {started} UTC" if started else ""
    return el("p", el("span", state.words, class_=f"state {state.kind}"), since, class_="note")


def _progress(run: Run, state: State) -> list[Html]:
    lines = [line for line in run.log if number(line, "loss") is not None]
    if not lines:
        return []
    last = lines[-1]
    step, most = number(last, "step"), number(last, "max_steps")
    speed, seconds = _speed(lines), number(last, "seconds")
    figures = [(short(value), "loss") for value in [number(last, "loss")] if value is not None]
    if step is not None and most:
        figures.insert(0, (f"{step:,.0f} of {most:,.0f}", "step"))
    if speed:
        figures.append((short(speed), "tokens per second"))
    memory = number(last, "peak_memory_gib") or number(run.metrics, "train", "peak_memory_gib")
    if memory:
        figures.append((mebibytes(memory * 1024), "peak memory"))
    going, left = state.kind in ("running", "elsewhere"), number(last, "seconds_left")
    if going and left:
        figures.append((duration(left), "left to train"))
    elif seconds:
        figures.append((duration(seconds), "of training"))
    found = [figures_list(figures)]
    if going and step is not None and most:
        found.append(_bar(step / most))
    return found


def _bar(share: float) -> Html:
    width = f"{100 * share:.1f}%"
    inner = el("div", style=f"width: {width}")
    return el("div", inner, class_="bar", role="progressbar", aria_valuenow=width.rstrip("%"))


def _speed(lines: list[Mapping[str, Any]]) -> float | None:
    """Return tokens per second over the last lines of the log."""
    recent = lines[-_RECENT:]
    first = recent[0] if len(recent) > 1 else {"tokens": 0, "seconds": 0.0}
    spans = [_between(first, recent[-1], key) for key in ("tokens", "seconds")]
    return spans[0] / spans[1] if spans[1] > 0 and spans[0] > 0 else None


def _between(first: Mapping[str, Any], last: Mapping[str, Any], key: str) -> float:
    return (number(last, key) or 0.0) - (number(first, key) or 0.0)


def _pairs(run: Run, key: str) -> list[tuple[float, float]]:
    """Return (step, value) of the log's lines that have both."""
    pairs = ((number(line, "step"), number(line, key)) for line in run.log)
    return [(step, value) for step, value in pairs if step is not None and value is not None]
