"""What charts are drawn with: SVG that stands in the page, for wide and for narrow screens."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .html import Html, el

WIDE, NARROW = 720, 340
CHARACTER = 8.0
"""Widest average of a character of 14 px text, to keep labels from being cut."""


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


def svg(
    title: str,
    described: str,
    width: int,
    height: float,
    parts: Sequence[Html],
    name: str,
    *,
    kind: str = "",
) -> Html:
    """Return a drawing with a title and a description for those who cannot see it.

    Args:
        width: `WIDE` or `NARROW`; the style sheet shows the one that fits the screen.
        name: what its ids begin with.
        kind: its class, if not "wide" or "narrow".
    """
    size = kind or ("wide" if width == WIDE else "narrow")
    name = f"{name.lower().replace(' ', '-')}-{size}"
    return el(
        "svg",
        el("title", title, id=f"{name}-t"),
        el("desc", described, id=f"{name}-d"),
        *parts,
        viewBox=f"0 0 {width} {px(height)}",
        role="img",
        aria_labelledby=f"{name}-t {name}-d",
        class_=size,
    )


def svg_text(text: str, x: float, y: float, anchor: str = "start", *, kind: str) -> Html:
    """Return a text; `kind` is its class."""
    return el("text", text, x=px(x), y=px(y), text_anchor=anchor, class_=kind)


def rounded_bar(x: float, y: float, width: float, height: float, kind: str) -> Html:
    """A bar that is square at its foot and rounded at its tip."""
    r = min(4.0, width / 2)
    end = f"a{r} {r} 0 0 1 {r} {r}v{px(height - 2 * r)}a{r} {r} 0 0 1 {-r} {r}"
    across = px(width - r)
    return el("path", d=f"M{px(x)} {px(y)}h{across}{end}h-{across}z", class_=f"bar {kind}")


def diamond(x: float, y: float, reach: float) -> Html:
    """Return a mark that stands on its tip."""
    path = f"M{px(x)} {px(y - reach)}l{reach} {reach}l-{reach} {reach}l-{reach} -{reach}z"
    return el("path", d=path, class_="mark")


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Html:
    """Return a straight line."""
    return el("line", x1=px(x1), y1=px(y1), x2=px(x2), y2=px(y2), class_=kind)


def vertical(x: float, bottom: float, label: str, top: float = 0) -> list[Html]:
    """Return a line of the grid, and what it says below."""
    drawn = line(x, top, x, bottom, "grid")
    return [drawn, svg_text(label, x, bottom + 17, "middle", kind="axis")] if label else [drawn]


def px(value: float) -> str:
    """Return a length as SVG has it."""
    return f"{value:.1f}".removesuffix(".0")
