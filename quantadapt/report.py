"""The page that a run leaves behind: `report.html`, made from the files in the run folder alone.

One file, no scripts, no network, light and dark. Whatever the folder lacks is left out of the page.
Everything goes through `el`, which escapes all text; nothing else makes HTML.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from .run_folder import RunFolder

TIMES = "\N{MULTIPLICATION SIGN}"
T = TypeVar("T")


class Perplexity(TypedDict, total=False):
    """Perplexity on the held-out data; null where it was not measured."""

    unquantized: float | None
    quantized: float | None
    tuned: float | None
    merged: float | None


class Training(TypedDict, total=False):
    """What training took; `seconds` is the training loop alone."""

    steps: int
    seconds: float
    tokens: int | None
    peak_memory_gib: float | None
    trainable_parameters: int
    base_parameters: int
    resumed_from: int | None


class Size(TypedDict, total=False):
    """Sizes of the weights in MiB."""

    dense_mib: float | None
    quantized_mib: float | None
    adapter_mib: float | None


class Refusal(TypedDict, total=False):
    """A rule that forbids the merge, as in `errors.Problem`."""

    what: str
    fix: str
    rule: str
    where: str


class MergeVerdict(TypedDict, total=False):
    """What became of the merge. `kind` is "dense", "requantize", "refused" or "never"."""

    kind: str
    kl: float | None
    top1: float | None
    gain_kept: float | None
    refusals: list[Refusal]


class Sample(TypedDict, total=False):
    """One held-out prompt, answered before and after training."""

    prompt: str
    reference: str | None
    before: str
    after: str


class Metrics(TypedDict, total=False):
    """The layout of `metrics.json`. Every part may be missing; `stages` are seconds by name."""

    perplexity: Perplexity
    stages: dict[str, float]
    train: Training
    size: Size
    merge: MergeVerdict
    samples: list[Sample]
    command: str


@dataclass(frozen=True)
class Run:
    """All that the page is made of: the contents of a run folder's files."""

    marker: Mapping[str, Any]
    plan: Mapping[str, Any]
    metrics: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]
    environment: Mapping[str, Any]
    spec: str

    @classmethod
    def read(cls, folder: RunFolder) -> Run:
        """Read a run folder; what is missing is empty."""
        spec = folder.path / "spec.yaml"
        return cls(
            marker=folder.marker,
            plan=folder.read_json("plan.json"),
            metrics=folder.read_json("metrics.json"),
            log=folder.read_metrics(),
            environment=folder.read_json("environment.json"),
            spec=spec.read_text(encoding="utf-8", errors="replace") if spec.is_file() else "",
        )


def write_report(folder: RunFolder) -> Path:
    """Make `report.html` from the files in the folder, and return its path."""
    return folder.write_text("report.html", render(Run.read(folder)))


def render(run: Run) -> str:
    """Return the whole page."""
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        el("title", headline(run)),
        el("link", rel="icon", href=_ICON),
        el("style", Html(style)),
    )
    sections = [section for make in _SECTIONS if (section := make(run))]
    body = el("body", el("main", _header(run), *sections), _footer(run))
    return f"<!doctype html>\n{el('html', head, body, lang='en')}\n"


# --- words -----------------------------------------------------------------------------------


def headline(run: Run) -> str:
    """Return the run in one line, e.g. `hqq 4-bit x lora: perplexity 41.2 → 3.12 in 48 s`."""
    before, after = _before_after(run)
    if before is None or after is None:
        state = run.marker.get("state")
        return f"{_cell(run)}: {state}" if state in ("failed", "interrupted") else _cell(run)
    seconds = _number(run.metrics, "train", "seconds")
    spent = f" in {duration(seconds)}" if seconds is not None else ""
    return f"{_cell(run)}: perplexity {short(before)} → {short(after)}{spent}"


def _cell(run: Run) -> str:
    backend, adapter = _part(run.plan, "backend"), _part(run.plan, "adapter")
    bits = _number(backend, "options", "bits")
    names = [
        " ".join([_text(backend, "name"), f"{bits:g}-bit" if bits else ""]).strip(),
        _text(adapter, "name"),
    ]
    return f" {TIMES} ".join(name for name in names if name) or "quantadapt run"


def _lede(run: Run) -> str:
    """Return two or three plain sentences: what was trained, what it changed, what it saves."""
    sentences = [_gain_sentence(run), _trained_sentence(run), _size_sentence(run)]
    return " ".join(sentence for sentence in sentences if sentence)


def _gain_sentence(run: Run) -> str:
    before, after = _before_after(run)
    if not before or not after:
        return ""
    ratio = before / after
    if ratio >= 2:
        return f"Training made the quantized model's perplexity {short(ratio)} times lower."
    change = abs(1 - after / before)
    if change < 0.005:
        return "Training left the quantized model's perplexity as it was."
    direction = "lowered" if after < before else "raised"
    return f"Training {direction} the quantized model's perplexity by {percent(change)}."


def _trained_sentence(run: Run) -> str:
    trained = _number(run.metrics, "train", "trainable_parameters")
    base = _number(run.metrics, "train", "base_parameters")
    if not trained or not base:
        return ""
    return f"It trained {count(trained)} parameters beside {count(base)} frozen ones."


def _size_sentence(run: Run) -> str:
    dense = _number(run.metrics, "size", "dense_mib")
    quantized = _number(run.metrics, "size", "quantized_mib")
    if not dense or not quantized or dense / quantized < 1.05:
        return ""
    now, then, ratio = mebibytes(quantized), mebibytes(dense), short(dense / quantized)
    return f"The base takes {now} instead of {then}, {ratio} times less."


def _before_after(run: Run) -> tuple[float | None, float | None]:
    values = _part(run.metrics, "perplexity")
    return _number(values, "quantized"), _number(values, "tuned")


def short(value: float) -> str:
    """Return three significant digits, e.g. 3.12, 41.2, 1,234."""
    if value and (abs(value) >= 1e7 or abs(value) < 1e-3):
        return f"{value:.2e}"
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    rounded = round(value, digits)
    return f"{rounded:,.{min(max(digits, 0), 4)}f}"


def percent(share: float) -> str:
    """Return a share as a percentage, e.g. `0.22 %`."""
    value = 100 * share
    decimals = 0 if abs(value) >= 10 and value % 1 < 0.05 else 1
    return f"{value:.2g} %" if abs(value) < 1 else f"{value:.{decimals}f} %"


def count(number: float) -> str:
    """Return a large number in words, e.g. `494 million`."""
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{short(number / size)} {word}"
    return f"{number:,.0f}"


def duration(seconds: float) -> str:
    """Return a duration, e.g. `0.4 s`, `48 s`, `3 min 12 s`, `2 h 5 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s" if seconds >= 0.05 else "under 0.1 s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def mebibytes(value: float) -> str:
    """Return a size, e.g. `312 MiB`, `1.24 GiB`."""
    return f"{short(value / 1024)} GiB" if value >= 1024 else f"{short(value)} MiB"


# --- sections --------------------------------------------------------------------------------


def _header(run: Run) -> Html:
    state, started = _text(run.marker, "state"), _text(run.marker, "started")
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
    lede = _lede(run)
    return el("header", eyebrow, title, el("p", lede, class_="lede") if lede else "")


def _perplexity(run: Run) -> Html:
    named = {
        "unquantized": ("base, not quantized", "before"),
        "quantized": ("quantized", "before"),
        "tuned": ("quantized + adapter", "after"),
        "merged": ("merged", "after"),
    }
    values = _part(run.metrics, "perplexity")
    found = [(name, value) for name in named if (value := _number(values, name)) and value > 0]
    if not found:
        return Html()
    bars = [Bar(named[name][0], value, short(value), named[name][1]) for name, value in found]
    low, high = min(bar.value for bar in bars), max(bar.value for bar in bars)
    log = high > 10 * low
    note = "On held-out text; lower is better, and 1 would be a perfect guess every time."
    if log:
        note += " The scale is logarithmic."
    chart = bar_chart("Perplexity", bars, log=log)
    return _section("Perplexity", el("p", note, class_="note"), chart)


def _loss(run: Run) -> Html:
    points = [
        (step, loss)
        for line in run.log
        if (step := _number(line, "step")) is not None
        and (loss := _number(line, "loss")) is not None
    ]
    if len(points) < 2:
        return Html()
    facts = [f"{points[0][0]:g} to {points[-1][0]:g} optimizer steps"]
    seconds, tokens = (_number(run.metrics, "train", key) for key in ("seconds", "tokens"))
    if seconds and tokens:
        facts.append(f"{count(tokens)} tokens at {short(tokens / seconds)} per second")
    note = f"{'; '.join(facts)}. The line is a moving average over the dots."
    chart = line_chart(points, _number(run.metrics, "train", "resumed_from"))
    return _section("Training loss", el("p", _capital(note), class_="note"), chart)


def _stages(run: Run) -> Html:
    stages = _part(run.metrics, "stages")
    found = [(name, value) for name in stages if (value := _number(stages, name)) is not None]
    total = sum(value for _, value in found)
    if not total:
        return Html()
    longest = max(value for _, value in found)
    bars = [
        Bar(name, value, duration(value), "after" if value == longest else "before")
        for name, value in found
    ]
    note = el("p", f"{duration(total)} in all.", class_="note")
    return _section("Time per stage", note, bar_chart("Time per stage", bars, unit="seconds"))


def _memory(run: Run) -> Html:
    size = _part(run.metrics, "size")
    named = {
        "dense_mib": ("base, not quantized", "before"),
        "quantized_mib": ("quantized", "after"),
        "adapter_mib": ("adapter", "after"),
    }
    found = [(name, value) for name in named if (value := _number(size, name)) is not None]
    bars = [Bar(named[name][0], value, mebibytes(value), named[name][1]) for name, value in found]
    chart = bar_chart("Size of the weights", bars, unit="MiB") if bars else Html()
    figures = _figures(_memory_figures(_part(run.metrics, "train")))
    return _section("Memory", chart, figures) if chart or figures else Html()


def _memory_figures(train: Mapping[str, Any]) -> list[tuple[str, str]]:
    peak, trained = _number(train, "peak_memory_gib"), _number(train, "trainable_parameters")
    base = _number(train, "base_parameters")
    figures = []
    if trained is not None:
        share = f", {percent(trained / base)} of the base" if base else ""
        figures.append((count(trained), f"trainable parameters{share}"))
    if peak is not None:
        figures.append((mebibytes(peak * 1024), "peak memory"))
    return figures


_VERDICTS = {
    "dense": ("Merged", "The adapter was merged into dense weights; they are in merged/."),
    "requantize": ("Merged", "The adapter was merged and the weights were quantized again."),
    "refused": ("Not merged", "A merge was refused; the adapter works beside the base."),
    "never": ("Not merged", "No merged model was asked for; the adapter works beside the base."),
}


def _merge(run: Run) -> Html:
    merge = _part(run.metrics, "merge")
    refused = _items(merge, "refusals") or _items(run.plan, "merge_refusals")
    kind = _text(merge, "kind") or ("refused" if refused else "")
    if not kind:
        return Html()
    word, sentence = _VERDICTS.get(kind, (kind, ""))
    kl, top1, kept = (_number(merge, key) for key in ("kl", "top1", "gain_kept"))
    figures = [
        (percent(kept), "of the gain in perplexity is kept") if kept is not None else None,
        (percent(top1), "of next tokens agree (top-1)") if top1 is not None else None,
        (f"{kl:.2g}", "KL divergence, nats per token") if kl is not None else None,
    ]
    refusals = [_refusal(item) for item in refused] if kind == "refused" else []
    verdict = el("p", el("strong", f"{word}."), " ", sentence, class_=f"verdict {kind}")
    return _section("Merge", verdict, _figures([f for f in figures if f]), *refusals)


def _refusal(refusal: Mapping[str, Any]) -> Html:
    where, rule, fix = (_text(refusal, key) for key in ("where", "rule", "fix"))
    source = " · ".join(part for part in (where, f"rule {rule}" if rule else "") if part)
    return el(
        "div",
        el("p", _text(refusal, "what")),
        el("p", el("strong", "Way out: "), fix) if fix else "",
        el("p", source, class_="note") if source else "",
        class_="refusal",
    )


def _samples(run: Run) -> Html:
    samples = [_sample(item) for item in _items(run.metrics, "samples")]
    note = "Held-out prompts, answered greedily by the quantized model before and after training."
    return _section("Samples", el("p", note, class_="note"), *samples) if samples else Html()


def _sample(sample: Mapping[str, Any]) -> Html:
    answers = [
        _answer(key.capitalize(), _text(sample, key), key)
        for key in ("before", "after", "reference")
        if sample.get(key) is not None
    ]
    prompt = _answer("Prompt", _text(sample, "prompt"), "prompt")
    return el("article", prompt, el("div", *answers, class_="answers"), class_="sample")


def _answer(label: str, text: str, kind: str) -> Html:
    body = el("pre", text, dir="auto", tabindex="0") if text.strip() else el("em", "nothing")
    return el("div", el("h3", label), body, class_=f"answer {kind}")


def _plan(run: Run) -> Html:
    rows: list[tuple[str, Child]] = []
    for key in ("backend", "adapter"):
        part = _part(run.plan, key)
        if part:
            options = _chips(part.get("options"))
            rows.append((key, el("div", el("strong", _text(part, "name")), " ", options)))
    elsewhere = ("backend", "adapter", "notes", "merge_refusals")
    plain = [key for key in run.plan if key not in elsewhere]
    rows += [(key, _value(run.plan[key])) for key in plain if run.plan[key] not in (None, [], {})]
    notes = run.plan.get("notes")
    listed = [el("li", str(note)) for note in notes] if isinstance(notes, list) else []
    heading = [el("h3", "Notes"), el("ul", *listed)] if listed else []
    return _section("Plan", _table(rows), *heading) if rows or listed else Html()


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
    command = _text(run.metrics, "command")
    return _section("Run it again", el("pre", command, class_="command")) if command else Html()


def _spec(run: Run) -> Html:
    if not run.spec.strip():
        return Html()
    return _section("Spec", _details("The resolved spec, as YAML", el("pre", run.spec)))


def _environment(run: Run) -> Html:
    versions = _part(run.environment, "versions")
    facts = {key: value for key, value in run.environment.items() if key != "versions"}
    rows = [(key, str(value)) for key, value in facts.items() if value not in (None, "")]
    rows += [(name, str(version or "not installed")) for name, version in versions.items()]
    if not rows:
        return Html()
    table = _details("Machine and versions", _table(rows))
    return _section("Environment", table)


_SECTIONS: tuple[Callable[[Run], Html], ...] = (
    _perplexity,
    _samples,
    _loss,
    _merge,
    _memory,
    _stages,
    _command,
    _plan,
    _spec,
    _environment,
)


def _footer(run: Run) -> Html:
    version = _text(run.marker, "version")
    made = f"Made by quantadapt {version}".strip()
    return el("footer", el("p", f"{made} from the files beside this page."))


# --- charts ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """One bar: its label, value, the value in words, and "before" or "after" for the colour."""

    label: str
    value: float
    text: str
    kind: str


_WIDE, _NARROW = 720, 340
_CHARACTER = 8.0
"""Widest average of a character of 14 px text, to keep labels from being cut."""


def bar_chart(title: str, bars: Sequence[Bar], *, log: bool = False, unit: str = "") -> Html:
    """Return horizontal bars with direct labels, for wide and for narrow screens, and a table."""
    drawings = [_draw_bars(title, bars, log, width) for width in (_WIDE, _NARROW)]
    heading = f"{title} ({unit})" if unit else title
    table = _numbers(["", heading], [[bar.label, bar.text] for bar in bars])
    return el("figure", *drawings, table)


def _draw_bars(title: str, bars: Sequence[Bar], log: bool, width: int) -> Html:
    beside = width == _WIDE
    left = _CHARACTER * max(len(bar.label) for bar in bars) + 14 if beside else 0
    right = _CHARACTER * max(len(bar.text) for bar in bars) + 14
    pitch, above, thick = (36, 0, 22) if beside else (52, 20, 20)
    scale = _Scale([bar.value for bar in bars], log, left, width - right)
    height = pitch * len(bars) + (24 if log else 0)
    parts: list[Html] = []
    for tick in scale.ticks if log else []:
        parts += _vertical(scale(tick), height - 22, f"{tick:,g}")
    for index, bar in enumerate(bars):
        top, end = index * pitch + above, scale(bar.value)
        middle = top + thick / 2 + 5
        label = (left - 14, middle, "end") if beside else (0, top - 6, "start")
        parts += [
            _svg_text(bar.label, *label, kind="label"),
            _rounded(left, top, max(end - left, 2), thick, bar.kind),
            _svg_text(bar.text, max(end, left + 2) + 8, middle, kind=f"value {bar.kind}"),
        ]
    described = "; ".join(f"{bar.label}: {bar.text}" for bar in bars)
    return _svg(title, described, width, height, parts)


class _Scale:
    """Maps values to pixels. A logarithmic one starts at 1, or at the power of ten below all."""

    def __init__(self, values: Sequence[float], log: bool, start: float, end: float) -> None:
        self.log, self.start, self.end = log, start, end
        low = min(1.0, 10 ** math.floor(math.log10(min(values)))) if log else 0.0
        self.low, self.high = self._at(low), self._at(max(values))
        powers = range(math.floor(math.log10(low)), 309) if log else range(0)
        self.ticks = [10.0**p for p in powers if self._at(10.0**p) <= self.high]

    def __call__(self, value: float) -> float:
        share = (self._at(value) - self.low) / ((self.high - self.low) or 1)
        return self.start + share * (self.end - self.start)

    def _at(self, value: float) -> float:
        return math.log10(value) if self.log else value


def line_chart(points: Sequence[tuple[float, float]], resumed_from: float | None) -> Html:
    """Return the loss curve, raw and smoothed, for wide and narrow screens, and a table."""
    smooth = smoothed(points)
    drawings = [
        _draw_line(points, smooth, resumed_from, *size) for size in ((_WIDE, 300), (_NARROW, 240))
    ]
    rows = [
        [f"{raw[0]:g}", f"{raw[1]:.4g}", f"{mean[1]:.4g}"]
        for raw, mean in thinned(list(zip(points, smooth, strict=True)), 20)
    ]
    table = _numbers(["step", "loss (nats per token)", "moving average"], rows)
    return el("figure", *drawings, table)


def _draw_line(
    points: Sequence[tuple[float, float]],
    smooth: Sequence[tuple[float, float]],
    resumed_from: float | None,
    width: int,
    height: int,
) -> Html:
    left, right, top, bottom = 44, width - 50, 26, height - 44
    steps, losses = [p[0] for p in points], [p[1] for p in points]
    x_ticks = nice_ticks(steps[0], steps[-1], 6 if width == _WIDE else 4)
    y_ticks = nice_ticks(min(losses), max(losses), 5)
    low, high = min(y_ticks[0], min(losses)), max(y_ticks[-1], max(losses))

    def x(step: float) -> float:
        return left + (step - steps[0]) / ((steps[-1] - steps[0]) or 1) * (right - left)

    def y(loss: float) -> float:
        return bottom - (loss - low) / ((high - low) or 1) * (bottom - top)

    parts = [_svg_text("loss, nats per token", 0, 12, kind="axis")]
    parts.append(_svg_text("optimizer step", right, height - 4, "end", kind="axis"))
    for tick in y_ticks:
        parts.append(_line(left, y(tick), right, y(tick), "grid"))
        parts.append(_svg_text(f"{tick:g}", left - 8, y(tick) + 4, "end", kind="axis"))
    for tick in x_ticks:
        parts.append(_line(x(tick), bottom, x(tick), bottom + 5, "tick"))
        parts.append(_svg_text(f"{tick:,g}", x(tick), bottom + 20, "middle", kind="axis"))
    if resumed_from is not None and steps[0] < resumed_from < steps[-1]:
        parts += _vertical(x(resumed_from), bottom, "", top)
        parts.append(_svg_text("resumed", x(resumed_from) + 5, top + 10, kind="axis"))
    dots = thinned(points, 400)
    parts += [el("circle", cx=_px(x(s)), cy=_px(y(v)), r="2.5", class_="dot") for s, v in dots]
    path = " ".join(f"{_px(x(s))},{_px(y(v))}" for s, v in thinned(smooth, 400))
    parts.append(el("polyline", points=path, class_="curve"))
    last = smooth[-1]
    parts.append(_svg_text(short(last[1]), x(last[0]) + 8, y(last[1]) + 5, kind="value after"))
    described = (
        f"From {short(smooth[0][1])} at step {steps[0]:g} to {short(last[1])} at {steps[-1]:g}."
    )
    return _svg("Training loss by step", described, width, height, parts)


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return a centred moving average over about a tenth of the points."""
    reach = max(1, len(points) // 20)
    means = []
    for index, (step, _) in enumerate(points):
        before = min(reach, index)
        after = before if index < reach else reach  # symmetric where the loss still falls steeply
        window = [value for _, value in points[index - before : index + after + 1]]
        means.append((step, sum(window) / len(window)))
    return means


def thinned(items: Sequence[T], most: int) -> list[T]:
    """Return at most `most` of the items, evenly spread, the first and last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Return round numbers between `low` and `high`, roughly `about` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power: float = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    ticks = [round((first + i) * step, 10) for i in range(about * 3)]
    return [tick for tick in ticks if tick <= high + step * 1e-9] or [low]


def _svg(title: str, described: str, width: int, height: float, parts: Sequence[Html]) -> Html:
    size = "wide" if width == _WIDE else "narrow"
    name = f"{title.lower().replace(' ', '-')}-{size}"
    return el(
        "svg",
        el("title", title, id=f"{name}-t"),
        el("desc", described, id=f"{name}-d"),
        *parts,
        viewBox=f"0 0 {width} {_px(height)}",
        role="img",
        aria_labelledby=f"{name}-t {name}-d",
        class_=size,
    )


def _svg_text(text: str, x: float, y: float, anchor: str = "start", *, kind: str) -> Html:
    return el("text", text, x=_px(x), y=_px(y), text_anchor=anchor, class_=kind)


def _rounded(x: float, y: float, width: float, height: float, kind: str) -> Html:
    """A bar that is square at its foot and rounded at its tip."""
    r = min(4.0, width / 2)
    end = f"a{r} {r} 0 0 1 {r} {r}v{_px(height - 2 * r)}a{r} {r} 0 0 1 {-r} {r}"
    across = _px(width - r)
    return el("path", d=f"M{_px(x)} {_px(y)}h{across}{end}h-{across}z", class_=f"bar {kind}")


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Html:
    return el("line", x1=_px(x1), y1=_px(y1), x2=_px(x2), y2=_px(y2), class_=kind)


def _vertical(x: float, bottom: float, label: str, top: float = 0) -> list[Html]:
    line = _line(x, top, x, bottom, "grid")
    return [line, _svg_text(label, x, bottom + 17, "middle", kind="axis")] if label else [line]


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


# --- HTML ------------------------------------------------------------------------------------


class Html(str):
    """Text that is HTML already. `el` escapes every other string."""


Child = Html | str


def el(tag: str, *children: Child, **attributes: str) -> Html:
    """Return an element. `class_` becomes class, other underscores become hyphens."""
    named = [
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
    ]
    start = f"<{tag}{''.join(named)}>"
    if tag in ("meta", "link"):
        return Html(start)
    inner = "".join(child if isinstance(child, Html) else escape(child) for child in children)
    return Html(f"{start}{inner}</{tag}>")


def escape(text: str) -> Html:
    """Escape text for HTML; control characters become visible."""
    visible = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
    return Html(html.escape(str(text).replace("\r\n", "\n").translate(visible)))


def _section(title: str, *children: Child) -> Html:
    name = title.lower().replace(" ", "-")
    return el("section", el("h2", title, id=name), *children, aria_labelledby=name)


def _figures(figures: Sequence[tuple[str, str]]) -> Html:
    items = [el("div", el("dt", label), el("dd", value)) for value, label in figures]
    return el("dl", *items, class_="figures") if items else Html()


def _table(rows: Iterable[tuple[str, Child]]) -> Html:
    lines = [
        el("tr", el("th", key.replace("_", " "), scope="row"), el("td", value))
        for key, value in rows
    ]
    return el("table", el("tbody", *lines), class_="facts")


def _numbers(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Html:
    """A chart's numbers as a table, folded away."""
    head = el("thead", el("tr", *[el("th", heading, scope="col") for heading in headings]))
    lines = [el("tr", *[el("td", cell) for cell in row]) for row in rows]
    return _details("Numbers", el("table", head, el("tbody", *lines), class_="numbers"))


def _details(summary: str, *children: Child) -> Html:
    return el("details", el("summary", summary), *children)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# --- reading what may be missing -------------------------------------------------------------


def _part(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = values.get(key)
    return part if isinstance(part, Mapping) else {}


def _items(values: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    items = values.get(key)
    return [item for item in items if isinstance(item, Mapping)] if isinstance(items, list) else []


def _text(values: Mapping[str, Any], key: str) -> str:
    value = values.get(key)
    return str(value) if value is not None else ""


def _number(values: Mapping[str, Any], *path: str) -> float | None:
    for key in path[:-1]:
        values = _part(values, key)
    value = values.get(path[-1])
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if math.isfinite(value) else None


_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E"
    "%3Cpath fill='%230072b2' d='M2 2h4v12H2zM10 9h4v5h-4z'/%3E%3C/svg%3E"
)
