"""`python -m benchmarks.faults`."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("QUANTADAPT_PLUGIN_TIMEOUT", "60")  # on a machine that others use as well

from benchmarks.bad_inputs.campaign import load_libraries

from . import bad, damages, full, threads
from .commands import Bench, checkpoint, commands
from .trials import Trial, failures, kills, races, share_of, signals, writers

PARTS = ("killed", "signalled", "write fails", full.PART, damages.PART, "two writers")
PARTS += (threads.PART, bad.PART)


def all_trials(bench: Bench, parts: list[str], only: list[str]) -> Iterator[Trial]:
    """Yield every trial of these parts, in the same order each time; of these commands alone, if
    any are named."""
    disturbed = {"killed", "signalled", "write fails", full.PART, "two writers"}.intersection(parts)
    mounts = full.PART in parts and full.may_mount(bench.root)
    if full.PART in parts and not mounts:
        print("no file system can be mounted here: no trials of a full disk", flush=True)
    for command in commands(bench) if disturbed else []:
        if only and command.name not in only:
            continue
        bench.measure(command)
        yield from kills(bench, command)
        if command.obeys:
            yield from signals(bench, command)
        yield from failures(bench, command)
        yield from full.trials(bench, command) if mounts else ()
        yield from writers(bench, command)
        yield from races(bench, command)
    if damages.PART in parts:
        resumed = checkpoint(bench)
        bench.measure(resumed)
        yield from damages.trials(bench, resumed)
    yield from threads.trials(bench)
    if bad.PART in parts:
        yield from bad.trials(bench.inputs)


class Table:
    """Counts by part and group; with a file, what was tried is remembered."""

    def __init__(self, file: Path | None) -> None:
        self.file, self.tried = file, dict[str, list[str]]()
        self.counts, self.failed = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
        if file is not None and file.exists():
            lines = map(json.loads, file.read_text().splitlines())
            self.tried = {line["title"]: line["wrong"] for line in lines}

    def add(self, trial: Trial) -> None:
        """Do a trial, unless it was done before, and count it."""
        known = trial.title in self.tried
        wrong = self.tried[trial.title] if known else _tried(trial)
        if self.file is not None and not known:
            with self.file.open("a") as stream:
                stream.write(json.dumps({"title": trial.title, "wrong": wrong}) + "\n")
        self.counts[trial.part, trial.group] += 1
        self.failed[trial.part, trial.group] += bool(wrong)
        for text in wrong:
            print(f"{trial.title}: {text}", flush=True)

    def text(self) -> str:
        """Return the counts as a table."""
        rows = [f"| {part} | {group} | {count} | {self.failed[part, group]} |"
                for (part, group), count in self.counts.items()]  # fmt: skip
        sums = [f"| {part} | all | {sum(n for (p, _), n in self.counts.items() if p == part)} |"
                f" {sum(n for (p, _), n in self.failed.items() if p == part)} |"
                for part in dict.fromkeys(part for part, _ in self.counts)]  # fmt: skip
        head = ["| part | of | trials | with something wrong |", "| --- | --- | ---: | ---: |"]
        return "\n".join([*head, *rows, *sums])


def _tried(trial: Trial) -> list[str]:
    try:
        return trial.wrong()
    except Exception as error:  # what is left could not even be looked at
        return [f"{type(error).__name__}: {error}"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Try faults, and count what goes wrong.")
    parser.add_argument("--share", type=float, default=1.0, help="of each part; 1 for all")
    parser.add_argument("--seed", type=int, default=0, help="which share")
    parser.add_argument("--part", action="append", choices=PARTS, help="may be repeated")
    parser.add_argument("--command", action="append", help="only of these; may be repeated")
    parser.add_argument("--match", default="", help="only trials whose title holds this text")
    parser.add_argument("--done", type=Path, help="a file that remembers trials; go on from it")
    parser.add_argument("--list", action="store_true", help="list the trials, try nothing")
    given = parser.parse_args()
    started, parts = time.monotonic(), given.part or list(PARTS)
    load_libraries()
    table = Table(given.done)
    with tempfile.TemporaryDirectory(prefix="quantadapt-faults-") as scratch:
        bench = Bench(Path(scratch).resolve() / "root", Path(scratch).resolve() / "inputs")
        found = [
            trial for trial in all_trials(bench, parts, given.command or []) if trial.part in parts
        ]
        found = [trial for trial in found if given.match in trial.title]
        for trial in share_of(found, given.share, given.seed):
            print(trial.title) if given.list else table.add(trial)
    if given.list:
        return
    count, failed = table.counts.total(), table.failed.total()
    print(f"\n{table.text()}\n")
    print(f"{count} trials, {failed} with something wrong, {time.monotonic() - started:.0f} s")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
