"""The charts of the report page, as inline SVG for wide and for narrow screens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from .html import Html, details, el, numbers_table, styles
from .svg import (
    CHARACTER,
    NARROW,
    WIDE,
    diamond,
    line,
    nice_ticks,
    px,
    rounded_bar,
    svg,
    svg_text,
    vertical,
)
from .words import short

T = TypeVar("T")


def chart_style() -> str:
    """Return the CSS of all drawings; colours and fonts are variables of the page."""
    return styles("charts.css")


@dataclass(frozen=True)
class Bar:
    """One bar: its label, value, the value in words, and "before" or "after" for the colour."""

    label: str
    value: float
    text: str
    kind: str


def bar_chart(
    title: str, bars: Sequence[Bar], *, log: bool = False, unit: str = "", name: str = ""
) -> Html:
    """Return horizontal bars with direct labels, for wide and for narrow screens, and a table.

    Args:
        name: what the drawings' ids begin with, if not the title.
    """
    drawings = [_draw_bars(title, bars, log, width, name or title) for width in (WIDE, NARROW)]
    heading = f"{title} ({unit})" if unit else title
    table = numbers_table(["", heading], [[bar.label, bar.text] for bar in bars])
    return el("figure", *drawings, details("Numbers", table))


def _draw_bars(title: str, bars: Sequence[Bar], log: bool, width: int, name: str) -> Html:
    beside = width == WIDE
    left = CHARACTER * max(len(bar.label) for bar in bars) + 14 if beside else 0
    right = CHARACTER * max(len(bar.text) for bar in bars) + 14
    pitch, above, thick = (36, 0, 22) if beside else (52, 20, 20)
    scale = _Scale([bar.value for bar in bars], log, left, width - right)
    height = pitch * len(bars) + (24 if log else 0)
    parts: list[Html] = []
    for tick in scale.ticks if log else []:
        parts += vertical(scale(tick), height - 22, f"{tick:,g}")
    for index, bar in enumerate(bars):
        top = index * pitch + above
        start, end = sorted((scale(scale.foot), scale(bar.value)))
        middle = top + thick / 2 + 5
        label = (left - 14, middle, "end") if beside else (0, top - 6, "start")
        parts += [
            svg_text(bar.label, *label, kind="label"),
            rounded_bar(start, top, max(end - start, 2), thick, bar.kind),
            svg_text(bar.text, max(end, start + 2) + 8, middle, kind=f"value {bar.kind}"),
        ]
    described = "; ".join(f"{bar.label}: {bar.text}" for bar in bars)
    return svg(title, described, width, height, parts, name)


class _Scale:
    """Maps values to pixels. A logarithmic one starts at 1, or at the power of ten below all; of
    another one, bars stand on 0."""

    def __init__(self, values: Sequence[float], log: bool, start: float, end: float) -> None:
        self.log, self.start, self.end = log, start, end
        low = 10 ** math.floor(math.log10(min(values))) if log else min(values)
        low = min(1.0 if log else 0.0, low)
        self.foot = low if log else 0.0
        self.low, self.high = self._at(low), self._at(max(values) if log else max(0.0, *values))
        powers = range(math.floor(math.log10(low)), 309) if log else range(0)
        self.ticks = [10.0**p for p in powers if self._at(10.0**p) <= self.high]

    def __call__(self, value: float) -> float:
        share = (self._at(value) - self.low) / ((self.high - self.low) or 1)
        return self.start + share * (self.end - self.start)

    def _at(self, value: float) -> float:
        return math.log10(value) if self.log else value


Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """The losses of a training run, as (step, loss), or something else by step.

    Attributes:
        points: of the training data, one at least.
        held_out: of held-out data.
        kept: the step whose weights are kept, where that is not the last.
        resumed_from: the step that a resumed run went on from.
        unit: of the losses; may be empty.
        what: they are.
    """

    points: Points
    held_out: Points = ()
    kept: float | None = None
    resumed_from: float | None = None
    unit: str = ""
    what: str = "loss"


def line_chart(curve: Curve) -> Html:
    """Return the loss curves, of training raw and smoothed, for wide and narrow screens, and as
    tables."""
    rows = [
        [f"{raw[0]:g}", f"{raw[1]:.4g}", f"{mean[1]:.4g}"]
        for raw, mean in thinned(list(zip(curve.points, smoothed(curve.points), strict=True)), 20)
    ]
    unit = f" ({curve.unit})" if curve.unit else ""
    tables = [numbers_table(["step", f"{curve.what}{unit}", "moving average"], rows)]
    if curve.held_out:
        rows = [[f"{step:g}", f"{loss:.4g}"] for step, loss in thinned(curve.held_out, 40)]
        tables.append(numbers_table(["step", f"{curve.what} on held-out data{unit}"], rows))
    return el("figure", *line_drawings(curve), details("Numbers", *tables))


def line_drawings(curve: Curve) -> list[Html]:
    """Return the loss curves for wide and narrow screens, without the tables."""
    smooth = smoothed(curve.points)
    return [_draw_line(curve, smooth, *size) for size in ((WIDE, 300), (NARROW, 240))]


def _draw_line(curve: Curve, smooth: Points, width: int, height: int) -> Html:
    points, held_out, resumed_from = curve.points, curve.held_out, curve.resumed_from
    left, right, top, bottom = 44, width - 50, 26, height - 44
    shown = sorted([*points, *held_out])
    steps, losses = [p[0] for p in shown], [p[1] for p in shown]
    found = nice_ticks(steps[0], steps[-1], 6 if width == WIDE else 4)
    x_ticks = [tick for tick in found if float(tick).is_integer()]
    y_ticks = nice_ticks(min(losses), max(losses), 5)
    low, high = min(y_ticks[0], min(losses)), max(y_ticks[-1], max(losses))

    def x(step: float) -> float:
        return left + (step - steps[0]) / ((steps[-1] - steps[0]) or 1) * (right - left)

    def y(loss: float) -> float:
        return bottom - (loss - low) / ((high - low) or 1) * (bottom - top)

    parts = [svg_text(", ".join(filter(None, [curve.what, curve.unit])), 0, 12, kind="axis")]
    parts.append(svg_text("optimizer step", right, height - 4, "end", kind="axis"))
    for tick in y_ticks:
        parts.append(line(left, y(tick), right, y(tick), "grid"))
        parts.append(svg_text(f"{tick:g}", left - 8, y(tick) + 4, "end", kind="axis"))
    for tick in x_ticks:
        parts.append(line(x(tick), bottom, x(tick), bottom + 5, "tick"))
        parts.append(svg_text(f"{tick:,g}", x(tick), bottom + 20, "middle", kind="axis"))
    if resumed_from is not None and steps[0] < resumed_from < steps[-1]:
        parts += vertical(x(resumed_from), bottom, "", top)
        parts.append(svg_text("resumed", x(resumed_from) + 5, top + 10, kind="axis"))
    dots = thinned(points, 400)
    parts += [el("circle", cx=px(x(s)), cy=px(y(v)), r="2.5", class_="dot") for s, v in dots]
    path = " ".join(f"{px(x(s))},{px(y(v))}" for s, v in thinned(smooth, 400))
    parts.append(el("polyline", points=path, class_="curve"))
    last = smooth[-1]
    at = y(last[1]) + 5
    parts.append(svg_text(short(last[1]), x(last[0]) + 8, at, kind="value after"))
    described = (
        f"From {short(smooth[0][1])} at step {points[0][0]:g} to {short(last[1])} at {last[0]:g}."
    )
    if held_out:
        path = " ".join(f"{px(x(s))},{px(y(v))}" for s, v in thinned(held_out, 400))
        parts.append(el("polyline", points=path, class_="curve held-out"))
        marks = thinned(held_out, 40)
        parts += [diamond(x(s), y(v), 7 if s == curve.kept else 4) for s, v in marks]
        end, loss = held_out[-1]
        beside = y(loss) + 5
        if abs(beside - at) < 16:
            beside = at + (16 if beside >= at else -16)
        parts.append(svg_text(short(loss), x(end) + 8, beside, kind="value held-out"))
        described += f" On held-out data from {short(held_out[0][1])} to {short(loss)}."
    if curve.kept is not None and steps[0] <= curve.kept <= steps[-1]:
        parts += vertical(x(curve.kept), bottom, "", top)
        parts.append(svg_text("kept", x(curve.kept) + 5, top + 10, kind="axis"))
    title = f"Training {curve.what} by step"
    return svg(title, described, width, height, parts, title)


def smoothed(points: Points) -> list[tuple[float, float]]:
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
