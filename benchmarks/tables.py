"""Lines of the Markdown tables that several benchmarks print."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def case_row(
    found: Mapping[str, Any], columns: Mapping[str, tuple[str, str]], digits: int = 3
) -> str:
    """Return the line of a case: its figures, and its first and last loss.

    Args:
        columns: title -> the key of a figure in `found`, and how it is written.
        digits: of the losses.
    """
    if "losses" not in found:
        return f"| {found['case']} | failed {'| ' * len(columns)}|"
    values = [(found.get(key), style) for key, style in columns.values()]
    cells = ["" if value is None else format(value, style) for value, style in values]
    losses = ", ".join(f"{loss:.{digits}f}" for loss in found["losses"])
    return f"| {found['case']} | {' | '.join(cells)} | {losses} |"
