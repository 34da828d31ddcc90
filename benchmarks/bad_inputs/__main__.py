"""`python -m benchmarks.bad_inputs`."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from . import (
    adapters,
    checkpoints,
    comparing,
    data,
    judging,
    options,
    pages,
    plugins,
    records,
)
from .campaign import BAD, campaign
from .cases import Case

PARTS = (records, checkpoints, adapters, data, options, plugins, judging, comparing, pages)


def all_cases() -> list[Case]:
    """Return every case, in the same order each time."""
    return [case for part in PARTS for case in part.cases()]


def chosen(kind: str, match: str, every: int) -> Iterator[Case]:
    """Yield what is asked for; of all, each `every`-th."""
    wanted = [c for c in all_cases() if kind in c.kind and match in c.title]
    yield from wanted[::every]


def main() -> None:
    parser = argparse.ArgumentParser(description="Run bad inputs and count what comes of them.")
    parser.add_argument("--kind", default="", help="only kinds that hold this text")
    parser.add_argument("--match", default="", help="only cases whose title holds this text")
    parser.add_argument("--every", type=int, default=1, help="only each n-th")
    parser.add_argument("--show", default="", help="print the output of cases with this outcome")
    parser.add_argument("--list", action="store_true", help="list the cases, run nothing")
    given = parser.parse_args()
    found = list(chosen(given.kind, given.match, given.every))
    if given.list:
        print(*(case.title for case in found), sep="\n")
        print(f"{len(found)} cases")
        return
    counts: Counter[str] = Counter()
    table: dict[str, Counter[str]] = {}
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bad-inputs-") as scratch:
        for result in campaign(found, Path(scratch)):
            counts[result.outcome] += 1
            table.setdefault(result.case.kind, Counter())[result.outcome] += 1
            if result.outcome in BAD:
                print(
                    f"{result.outcome:16} {result.case.title} ({result.seconds:.1f} s)", flush=True
                )
            if given.show and given.show in (result.outcome, "all"):
                print(
                    f"--- {result.outcome}: {result.case.title}\n{result.output[-1500:]}",
                    flush=True,
                )
    outcomes = ("refused", "worked", *BAD)
    print(f"\n| kind | {' | '.join(outcomes)} |\n| --- |{' --- |' * len(outcomes)}")
    for kind, row in [*table.items(), ("all", counts)]:
        print(f"| {kind} | {' | '.join(str(row[o]) for o in outcomes)} |")
    print(f"\n{counts.total()} cases in {time.monotonic() - started:.0f} s")
    if any(counts[outcome] for outcome in BAD):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
