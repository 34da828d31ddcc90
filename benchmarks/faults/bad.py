"""The bad inputs of `benchmarks.bad_inputs`, as trials."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.bad_inputs.__main__ import all_cases
from benchmarks.bad_inputs.campaign import BAD, healthy, run
from benchmarks.bad_inputs.cases import Case

from .trials import Trial

PART = "bad input"


def trials(scratch: Path) -> Iterator[Trial]:
    """Yield each case as a trial."""
    made = scratch / "healthy"
    for case in all_cases():
        yield Trial(PART, case.kind, case.title, _trial(case, made))


def _trial(case: Case, made: Path) -> Callable[[], list[str]]:
    def wrong() -> list[str]:
        os.environ["QUANTADAPT_PLUGIN_TIMEOUT"] = "3"  # those that hang are among them
        start = made if made.exists() else healthy(made)
        result = run(case, start, made.parent)
        bad = f"{result.outcome}, {result.seconds:.1f} s: {result.output[-600:]}"
        return [bad] if result.outcome in BAD else []

    return wrong
