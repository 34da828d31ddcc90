"""Lines of the Markdown tables that several benchmarks print."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
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


def case_rows(
    cases: Sequence[str],
    run: Callable[[str], dict[str, Any]],
    columns: Mapping[str, tuple[str, str]],
    out: Path | None,
) -> list[dict[str, Any]]:
    """Run cases, and print the table as they end; return their figures, each with the `ratio` of
    its rate to that of the first that did not fail.

    Args:
        columns: as for `case_row`.
        out: a file for the figures as JSON.
    """
    print(f"| case | {' | '.join(columns)} | first and last loss |")
    print(f"| --- | {'---: | ' * len(columns)}--- |", flush=True)
    results: list[dict[str, Any]] = []
    for case in cases:
        found = run(case)
        reference = next((r["tokens_per_second"] for r in results if "losses" in r), None)
        if "losses" in found:
            found["ratio"] = found["tokens_per_second"] / (reference or found["tokens_per_second"])
        results.append(found)
        print(case_row(found, columns), flush=True)
        print(found.get("error", ""), file=sys.stderr, end="", flush=True)
        if out:
            out.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return results
