"""Figures in words, as the report page writes them."""

from __future__ import annotations

import math


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
