"""Points in two dimensions, with what nothing beats marked: inline SVG without a script.

What is told of a point appears when it is pointed at or has the focus, in the corner of the plot
where the worst would be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .html import Html, el
from .svg import NARROW, WIDE, line, nice_ticks, px, svg, svg_text

COLOURS = 8
"""So many colours there are, `c0` to `c7` in the style sheet; then all are grey, `c8`."""
SHAPES = 6
_HALF = 470
_LETTER = 6.9
"""Widest average of a character of a label."""
_TIP = 7.2
_RADIUS = 5.5
_AWAY = 22
"""How far from a plot the labels of its lines stand."""
_LINE = 16
"""The height of a line of text."""


@dataclass(frozen=True)
class Point:
    """One point.

    Attributes:
        label: what stands beside it.
        facts: what is told of it.
        spread: half the height of the bar through it; None for no bar.
        colour, shape: of its mark, by number.
        front: nothing beats it.
        faint: it is not to be compared with the others.
        group: points of one group are joined by a line, from left to right, and have one label;
            empty for no line.
    """

    x: float
    y: float
    label: str
    facts: Sequence[str] = ()
    spread: float | None = None
    colour: int = 0
    shape: int = 0
    front: bool = False
    faint: bool = False
    group: str = ""


@dataclass(frozen=True)
class Axis:
    """An axis.

    Attributes:
        title: what it shows.
        words: its values in words.
        higher: higher ones are better.
        worst: what is worse is drawn at the edge, with an arrow and its value.
    """

    title: str
    words: Callable[[float], str]
    higher: bool = False
    worst: float | None = None

    def cut(self, value: float) -> float:
        """Return a value, or that of the edge."""
        if self.worst is None:
            return value
        return max(value, self.worst) if self.higher else min(value, self.worst)


def scatter(title: str, points: Sequence[Point], x: Axis, y: Axis, *, small: bool = False) -> Html:
    """Return a plot for wide and for narrow screens; a small one fills half of a wide screen."""
    if not points:
        return Html()
    sizes = (_HALF, 330, "wide") if small else (WIDE, 400, "wide")
    drawings = [_draw(title, points, x, y, *size) for size in (sizes, (NARROW, 300, "narrow"))]
    return el("figure", *drawings, class_="scatter")


def drawing(title: str, points: Sequence[Point], x: Axis, y: Axis) -> Html:
    """Return a plot for wide screens alone."""
    return _draw(title, points, x, y, WIDE, 400, "wide")


def mark(shape: int, x: float, y: float, radius: float, kind: str) -> Html:
    """Return a mark of one of `SHAPES` shapes."""
    r = radius
    paths = {
        1: f"M{px(x - r)} {px(y - r)}h{px(2 * r)}v{px(2 * r)}h{px(-2 * r)}z",
        2: f"M{px(x)} {px(y - 1.2 * r)}l{px(1.15 * r)} {px(2.1 * r)}h{px(-2.3 * r)}z",
        3: f"M{px(x)} {px(y - 1.3 * r)}l{px(1.3 * r)} {px(1.3 * r)}l{px(-1.3 * r)} {px(1.3 * r)}"
        f"l{px(-1.3 * r)} {px(-1.3 * r)}z",
        4: f"M{px(x)} {px(y + 1.2 * r)}l{px(1.15 * r)} {px(-2.1 * r)}h{px(-2.3 * r)}z",
        5: f"M{px(x - 1.2 * r)} {px(y - 0.5 * r)}h{px(2.4 * r)}v{px(r)}h{px(-2.4 * r)}z",
    }
    if shape % SHAPES in paths:
        return el("path", d=paths[shape % SHAPES], class_=kind)
    return el("circle", cx=px(x), cy=px(y), r=px(r), class_=kind)


class _Scale:
    """Maps values to pixels, by their logarithm where they span more than a factor of six."""

    def __init__(self, values: Sequence[float], start: float, end: float, about: int) -> None:
        low, high = min(values), max(values)
        self.log = low > 0 and high / low > 6
        self.ticks = _log_ticks(low, high, about) if self.log else nice_ticks(low, high, about)
        reach = (self.at(high) - self.at(low)) or abs(self.at(high)) * 0.1 or 1.0
        self.low, self.high = self.at(low) - 0.06 * reach, self.at(high) + 0.06 * reach
        self.start, self.end = start, end

    def at(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def __call__(self, value: float) -> float:
        share = (self.at(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def _log_ticks(low: float, high: float, about: int) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        ticks = [m * 10.0**p for p in powers for m in steps]
        ticks = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
        if len(ticks) <= about + 1:
            return ticks or [low]
    return ticks[:: math.ceil(len(ticks) / about)]


@dataclass(frozen=True)
class _Box:
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: _Box) -> bool:
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )

    def within(self, other: _Box) -> bool:
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.top >= other.top
            and self.bottom <= other.bottom
        )


def _draw(
    title: str, points: Sequence[Point], x: Axis, y: Axis, width: int, height: int, kind: str
) -> Html:
    words = [_words(point, y) for point in points]
    beside = 0 if width == NARROW else min(_column(points, words), width / 2)
    if beside == width / 2:  # the whole stands in the tip
        most = int((beside - _AWAY) / _LETTER)
        words = [w if len(w) <= most else f"{w[: most - 1]}…" for w in words]
    plot = _Box(54, 26, width - 14 - beside, height - 46)
    values = [y.cut(v) for p in points for v in (p.y, p.y - (p.spread or 0), p.y + (p.spread or 0))]
    values = [v for v in values if v > 0] if min(p.y for p in points) > 0 else values
    about = 4 if width == NARROW else 5 if width == _HALF else 7
    across = _Scale([p.x for p in points], plot.left, plot.right, about)
    up = _Scale(values, plot.bottom, plot.top, 6)
    places = [(across(p.x), up(y.cut(p.y))) for p in points]
    parts = [
        _frame(x, y, across, up, plot),
        *_joined(points, places),
        _front_line(points, places, plot, plot.bottom if y.higher else plot.top),
    ]
    labels = _labels(points, words, places, plot, width != NARROW)
    parts += [
        line(places[n][0] + _RADIUS + 2, places[n][1], x - 4, y - 4, "tick")
        for n, (x, y, _) in labels.items()
        if points[n].group
    ]
    for index, point in enumerate(points):
        drawn = _point(point, words[index], places[index], labels.get(index), up, y)
        parts.append(el("g", drawn, _tip(point, plot, y.higher), **_of(point)))
    described = "; ".join(f"{p.label}: {', '.join(p.facts)}" for p in points)
    return svg(title, described, width, height, parts, f"{title} {width}", kind=kind)


def _of(point: Point) -> dict[str, str]:
    return {"class_": f"point{' faint' if point.faint else ''}", "tabindex": "0"}


def _frame(x: Axis, y: Axis, across: _Scale, up: _Scale, plot: _Box) -> Html:
    """Return grid, ticks and titles."""
    parts = [
        svg_text(y.title, 0, plot.top - 12, kind="axis"),
        svg_text(x.title, plot.right, plot.bottom + 40, "end", kind="axis"),
    ]
    for tick, label in zip(up.ticks, _at_ticks(y, up.ticks), strict=True):
        parts.append(line(plot.left, up(tick), plot.right, up(tick), "grid"))
        parts.append(svg_text(label, plot.left - 8, up(tick) + 4, "end", kind="axis"))
    for tick, label in zip(across.ticks, _at_ticks(x, across.ticks), strict=True):
        parts.append(line(across(tick), plot.bottom, across(tick), plot.bottom + 5, "tick"))
        below = plot.bottom + 19
        parts.append(svg_text(label, across(tick), below, "middle", kind="axis"))
    return Html("".join(parts))


def _at_ticks(axis: Axis, ticks: Sequence[float]) -> list[str]:
    """Return what stands at ticks: values in words, or with all digits where two read alike."""
    found = [axis.words(tick) for tick in ticks]
    if len(set(found)) == len(found):
        return found
    times, unit = (100, "%") if found[0].endswith("%") else (1, "")
    return [f"{times * tick:,.10g}{unit}" for tick in ticks]


def _joined(points: Sequence[Point], places: Sequence[tuple[float, float]]) -> list[Html]:
    """Return a line through the points of each group."""
    lines = []
    for group in dict.fromkeys(p.group for p in points if p.group):
        mine = sorted(at for p, at in zip(points, places, strict=True) if p.group == group)
        colour = next(_colour(p) for p in points if p.group == group)
        path = " ".join(f"{px(x)},{px(y)}" for x, y in mine)
        lines.append(el("polyline", points=path, class_=f"joined {colour}"))
    return lines


def _front_line(
    points: Sequence[Point], places: Sequence[tuple[float, float]], plot: _Box, start: float
) -> Html:
    """Return the stairs beyond which there is nothing; they start at the worse end of y."""
    steps = sorted(at for p, at in zip(points, places, strict=True) if p.front)
    if not steps:
        return Html()
    path = f"M{px(steps[0][0])} {px(start)}V{px(steps[0][1])}"
    path += "".join(f"H{px(left)}V{px(top)}" for left, top in steps[1:])
    return el("path", d=f"{path}H{px(plot.right)}", class_="front")


def _words(point: Point, axis: Axis) -> str:
    """Return the label of a point, with its value where it is drawn at the edge."""
    if not point.label or axis.cut(point.y) == point.y:
        return point.label
    return f"{'↓' if axis.higher else '↑'} {axis.words(point.y)}  {point.label}"


def _labels(
    points: Sequence[Point],
    words: Sequence[str],
    at: Sequence[tuple[float, float]],
    plot: _Box,
    all_: bool,
) -> dict[int, tuple[float, float, str]]:
    """Return where labels stand (x, y, anchor) by the number of their point, as many as there is
    room for: those of the front first, and if not `all_`, alone. Those of lines stand beside the
    plot."""
    places: dict[int, tuple[float, float, str]] = {}
    taken = [_around(*place) for place in at]
    area = _Box(plot.left - 4, plot.top - 8, plot.right + 14, plot.bottom + 2)
    order = sorted(range(len(points)), key=lambda i: (points[i].faint, not points[i].front))
    for index in order:
        point = points[index]
        if not point.label or point.group or not (all_ or point.front):
            continue
        length = _LETTER * len(words[index]) * (1.08 if point.front else 1)
        for x, y, anchor in _beside(*at[index], 9 if point.front else 5):
            left = {"start": x, "end": x - length, "middle": x - length / 2}[anchor]
            box = _Box(left, y - 11, left + length, y + 3)
            others = (other for i, other in enumerate(taken) if i != index)
            if box.within(area) and not any(box.meets(other) for other in others):
                places[index] = (x, y, anchor)
                taken.append(box)
                break
    return places | (_of_lines(points, at, plot) if all_ else {})


def _right_ends(points: Sequence[Point]) -> list[int]:
    """Return the point at the right end of each line, by number."""
    ends: dict[str, int] = {}
    for index, point in enumerate(points):
        if point.group and point.label:
            last = ends.setdefault(point.group, index)
            ends[point.group] = index if point.x > points[last].x else last
    return list(ends.values())


def _column(points: Sequence[Point], words: Sequence[str]) -> float:
    """Return how wide the labels of lines are."""
    ends = _right_ends(points)
    return _LETTER * max(len(words[end]) for end in ends) + _AWAY if ends else 0.0


def _of_lines(
    points: Sequence[Point], at: Sequence[tuple[float, float]], plot: _Box
) -> dict[int, tuple[float, float, str]]:
    """Return where the labels of lines stand: one below the other on the right of the plot, each as
    near to the height where its line ends as there is room; of too many the lowest are left out."""
    ends = sorted(_right_ends(points), key=lambda index: at[index][1])
    room = int((plot.bottom - plot.top) // _LINE) + 1
    heights: list[float] = []
    for index in ends[:room]:
        heights.append(max(at[index][1], heights[-1] + _LINE if heights else plot.top))
    lowest = plot.bottom
    for number in reversed(range(len(heights))):
        heights[number] = lowest = min(heights[number], lowest)
        lowest -= _LINE
    pairs = zip(ends, heights, strict=False)
    return {index: (plot.right + _AWAY, height + 4, "start") for index, height in pairs}


def _around(x: float, y: float) -> _Box:
    reach = _RADIUS + 2
    return _Box(x - reach, y - reach, x + reach, y + reach)


def _beside(x: float, y: float, gap: float) -> Iterable[tuple[float, float, str]]:
    """Yield places for a label, the best first."""
    near, far = _RADIUS + gap, _RADIUS + 17
    yield from ((x + near, y + 4, "start"), (x - near, y + 4, "end"))
    yield from ((x, y - near - 1, "middle"), (x, y + near + 10, "middle"))
    for down in (-9, 15, -22, 28):
        yield from ((x + near, y + down, "start"), (x - near, y + down, "end"))
    yield from ((x, y - far, "middle"), (x, y + far + 10, "middle"))


def _point(
    point: Point,
    words: str,
    at: tuple[float, float],
    place: tuple[float, float, str] | None,
    up: _Scale,
    axis: Axis,
) -> Html:
    """Return a point with its bar and label."""
    x, y = at
    beyond = axis.cut(point.y) != point.y
    parts = [el("title", f"{point.label}: {', '.join(point.facts)}")]
    if point.spread and not beyond:
        low = point.y - point.spread
        ends = (up(low) if low > 0 or not up.log else y, up(axis.cut(point.y + point.spread)))
        parts.append(line(x, ends[0], x, ends[1], f"spread {_colour(point)}"))
    if point.front:
        parts.append(mark(point.shape, x, y, _RADIUS + 3.5, "ring"))
    parts.append(el("circle", cx=px(x), cy=px(y), r="14", class_="reach"))
    parts.append(mark(point.shape, x, y, _RADIUS, f"mark {_colour(point)}"))
    if place:
        kind = "label strong" if point.front else "label"
        parts.append(svg_text(words, *place, kind=kind))
    return Html("".join(parts))


def _colour(point: Point) -> str:
    return f"c{min(point.colour, COLOURS)}"


def _tip(point: Point, plot: _Box, below: bool) -> Html:
    """Return what is told of a point, in the upper or lower right corner of the plot."""
    texts = [point.label, *point.facts]
    width = min(_TIP * max(map(len, texts)) + 20, plot.right)
    height = 17.0 * len(texts) + 12
    left, top = plot.right - width, plot.bottom - height - 4 if below else plot.top - 4
    back = el("rect", x=px(left), y=px(top), width=px(width), height=px(height), rx="5",
              class_="back")  # fmt: skip
    lines = [
        svg_text(text, left + 10, top + 18 + 17 * index, kind="tip-fact" if index else "tip-label")
        for index, text in enumerate(texts)
    ]
    return el("g", back, *lines, class_="tip")
