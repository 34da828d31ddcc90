"""`compare`: plan the grid, run what is not there yet, and write the table after each run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import OutputError, Problem, QuantadaptError, SpecError
from ..folders.atomic import remove
from ..folders.environment import environment
from ..folders.run_folder import RunFolder
from ..machine import this_machine
from . import halving
from .folder import CompareFolder, Record, check, opened
from .grid import DENSE, Comparison, Run, comparison
from .planned import PlannedCell, measures_a_merge, plan_cells, spec_of
from .processes import Ending, Job, OutOfBudget, Processes, Start, obeying_signals, slots
from .results import WHOLE, Table, badness, figures_of, table_of
from .verdict import Verdict, stat_words, verdict
from .writing import write_tables

Listener = Callable[[str, Mapping[str, Any]], None]
"""Called with an event and its facts: "planned", "batch", "start", "progress", "ended", "rungs",
"dropped" or "note"."""


@dataclass(frozen=True, repr=False)
class ComparisonResult:
    """What a comparison found.

    Attributes:
        folder: where it lies; `compare.html` in it is the page.
        table: a row for each cell.
        verdict: what to take, and what that is based on.
    """

    folder: Path
    table: Table
    verdict: Verdict

    def __repr__(self) -> str:
        return f"<ComparisonResult {str(self.folder)!r}; {self.verdict.words}>"


def compare(
    spec: Mapping[str, Any] | None = None,
    grid: Mapping[str, Sequence[Any]] | None = None,
    *,
    output: str | Path,
    seeds: int | None = None,
    overwrite: bool = False,
    retry: bool = False,
    listener: Listener | None = None,
    **options: Any,
) -> ComparisonResult:
    """Train each cell of a grid, each run in a process of its own, and compare them.

    Called again with the same output, it goes on: what has ended is not run again, what was
    interrupted goes on from its checkpoint.

    Args:
        spec: what all runs have in common, as `Spec` takes it; the model by path or hub id.
        grid: a dotted key of the spec -> the values to try, e.g. {"backend": ["hqq", "bnb-nf4"],
            "adapter": ["lora", "dora"], "train.learning_rate": [1e-4, 3e-4]}.
        output: the folder of the comparison; runs are in `output/runs`.
        seeds: so many runs of each cell.
        overwrite: replace an earlier comparison there.
        retry: run again what failed.
        listener: told what happens.
        options: `budget` in hours, `reference`, `by`, `within`, `prefer`, `keep_merged` and `gpus`,
            see `comparing.grid.Options`.

    Raises:
        SpecError, PlanRefused: something is wrong with the grid, or no cell of it can be run.
        OutputError: the folder cannot be used. FolderInUse: somebody else is at work there.
        QuantadaptError: the budget does not suffice for one round of all cells.
    """
    made = comparison(spec or {}, grid or {}, seeds=seeds, **options)
    trusted = (spec or {}).get("trust_remote_code") is True
    tell = listener if listener is not None else _silent
    return run_comparison(
        made, output, overwrite=overwrite, retry=retry, trusted=trusted, listener=tell
    )


def _silent(event: str, facts: Mapping[str, Any]) -> None:
    """Tell nobody."""


def run_comparison(
    made: Comparison,
    output: str | Path,
    *,
    overwrite: bool = False,
    retry: bool = False,
    trusted: bool = False,
    listener: Listener,
    command: str = "",
    start: Start | None = None,
) -> ComparisonResult:
    """Do what `compare` does, with a comparison that is made already.

    Args:
        trusted: code that comes with the model may run.
        command: the command line that led here, for the page.
        start: starts a process; for tests.
    """
    cells, path = look_at(made, output, overwrite=overwrite), Path(output).expanduser()
    with obeying_signals(), opened(path, made, overwrite=overwrite) as folder:
        work = _Work(made, folder, {each.cell.label: each for each in cells}, listener, trusted)
        work.command = command
        work.prepare(retry)
        states = [folder.record(run.name).state for run in work.runs]
        over, failed = len(states) - len(work.todo), states.count("failed")
        listener("planned", {"todo": work.todo, "over": over, "failed": failed})
        state = "interrupted"
        try:
            work.go(start)
            state = "finished"
        finally:
            folder.journal.state = state  # type: ignore[assignment]
            work.write()
        return ComparisonResult(folder.path, work.table, verdict(work.table, made.options))


def look_at(made: Comparison, output: str | Path, *, overwrite: bool = False) -> list[PlannedCell]:
    """Return what the cells come to. Raises what `run_comparison` would raise before anything is
    run; touches nothing."""
    _check_options(made)
    check(Path(output), made, overwrite=overwrite)
    cells = plan_cells(made, Path(output).expanduser())
    _check_figure(made, cells)
    return cells


def _check_options(made: Comparison) -> None:
    check_budget(made)
    gpus, there = made.options.gpus, len(slots(made.spec.device, this_machine()))
    if gpus is not None and gpus > there:
        what = f"{gpus} runs at a time need {gpus} GPUs, and there are {there}"
        if not this_machine().cuda:
            what = "there is no GPU here: one run goes on at a time"
        raise SpecError([Problem(what, "leave it out", "compare.gpus")])


def _check_figure(made: Comparison, cells: Sequence[PlannedCell]) -> None:
    """Raise SpecError where no evaluation has what quality is to be judged by."""
    by = made.options.by
    known = [name for cell in cells if cell.plan for name in cell.plan.evaluators]
    if by and not any(by == name or by.startswith(f"{name} ") for name in known):
        names = ", ".join(dict.fromkeys(known))
        what = f"no evaluation of these runs has {by!r}"
        fix = f"name one of {names}, or one of its figures: '{known[0]} ...'" if known else ""
        raise SpecError([Problem(what, fix, "compare.by")])


def check_budget(made: Comparison) -> None:
    """Raise SpecError where a budget cannot be shared, as it is not known how long a run is."""
    if made.options.budget is None:
        return
    problems = []
    if "train.max_steps" in made.grid:
        what = "with a budget, rungs are parts of train.max_steps, which all cells share"
        problems.append(Problem(what, "say one number beside the grid", "grid.train.max_steps"))
    demo_run = made.spec.model is None and made.spec.data.path is None
    if made.spec.train.max_steps < 1 and not demo_run:
        what = "with a budget, runs have to be so many steps long, of which rungs are parts"
        problems.append(Problem(what, "set it, e.g. --max-steps 300", "train.max_steps"))
    if problems:
        raise SpecError(problems)


@dataclass
class _Work:
    """A comparison under way."""

    comparison: Comparison
    folder: CompareFolder
    cells: Mapping[str, PlannedCell]
    listener: Listener
    trusted: bool
    command: str = ""
    table: Table = field(default_factory=lambda: Table([], {}))

    @property
    def runs(self) -> list[Run]:
        """The runs that are not refused."""
        return [run for run in self.comparison.runs if not self.cells[run.cell.label].refusals]

    @property
    def todo(self) -> list[Run]:
        """Those of them that are not over."""
        open_ = ("waiting", "interrupted", "running")
        return [run for run in self.runs if self.folder.record(run.name).state in open_]

    def prepare(self, retry: bool) -> None:
        """Note what is refused, what is over, and what every run is told."""
        for run in self.comparison.runs:
            record, cell = self.folder.record(run.name), self.cells[run.cell.label]
            if WHOLE in record.results:
                continue
            if cell.refusals:
                record.state, record.reason = "refused", cell.reason
            elif record.state == "refused" or (retry and record.state == "failed"):
                record.state, record.reason = "waiting", ""
            elif record.state == "running":
                record.state, record.reason = "interrupted", "it was cut off"
        self._note_machine()
        measures = self._measures_base()
        for run in self.runs:
            made = self.cells[run.cell.label].plan
            assert made is not None
            unquantized = run.spec.evaluate.unquantized and run.name == measures
            spec = spec_of(made, run.seed, self.folder.run(run.name), unquantized=unquantized)
            self.folder.write(f"specs/{run.name}.yaml", spec.to_yaml())
        self.write()

    def _note_machine(self) -> None:
        """Note on what this is done, and where that is not what it was begun on."""
        found, journal = environment(), self.folder.journal
        now = {key: str(found[key]) for key in ("gpu", "cpu") if found[key]}
        now |= {name: version for name, version in found["versions"].items() if version}
        if not journal.machine:
            journal.machine = now
        for key in now:
            if (then := journal.machine.get(key)) != now[key]:
                text = f"some runs were on {key} {then}, others on {now[key]}"
                journal.remarks += [text] if text not in journal.remarks else []

    def _measures_base(self) -> str:
        """Return the run that measures the dense base for all; none where a reference begins with
        it anyway."""
        runs = self.runs
        dense = any(self.cells[r.cell.label].plan.backend.name == DENSE for r in runs)  # type: ignore[union-attr]
        return "" if dense or not runs else runs[0].name

    def go(self, start: Start | None) -> None:
        """Run what is not over."""
        options, first = self.comparison.options, self.comparison.spec
        places = slots(first.device, this_machine(), options.gpus)
        left = (
            None if options.budget is None else 3600 * options.budget - self.folder.journal.seconds
        )
        self.processes = Processes(places, self.tell, self.done, seconds=left, start=start)
        try:
            if options.budget is None:
                self.batch(self.todo, None)
            else:
                self.halve(options.budget)
        except OutOfBudget:
            text = f"the budget of {options.budget:g} hours is spent"
            for run in self.todo:
                record = self.folder.record(run.name)
                record.reason = text
            self.tell("note", {"text": text})

    def batch(self, runs: Iterable[Run], steps: int | None) -> None:
        """Run those that have no result after so many steps, all of them if None."""
        key = WHOLE if steps is None else str(steps)
        missing = [run for run in runs if key not in self.folder.record(run.name).results]
        facts = {"count": len(missing), "steps": steps, "slots": len(self.processes.slots)}
        self.tell("batch", facts)
        self.processes.run([self.job(run, steps) for run in missing])

    def job(self, run: Run, steps: int | None) -> Job:
        """Return the process that trains a run, from its last checkpoint on if it has begun."""
        folder = self.folder.run(run.name)
        words = [sys.executable, "-m", "quantadapt", "run", str(self.folder.spec(run.name))]
        words += ["--json", *(["--resume"] if RunFolder(folder).marker else [])]
        words += ["--trust-remote-code"] if self.trusted else []
        if steps is not None:  # a rung: no more than what it is judged by, and a checkpoint
            words += ["--max-steps", str(steps), "--set", f"train.save_steps={steps}"]
            words += ["--set", "export={merge: never}"]
        return Job(run.name, words, folder, self.folder.log(run.name), steps)

    def tell(self, event: str, facts: Mapping[str, Any]) -> None:
        """Note that a run begins, and hand on whatever happens."""
        if event == "start":
            record = self.folder.record(facts["job"].name)
            record.state, record.reason = "running", ""
            self.folder.save()
        self.listener(event, facts)

    def done(self, job: Job, ending: Ending) -> None:
        """Note how a run has ended, and what came of it."""
        record = self.folder.record(job.name)
        record.seconds += ending.seconds
        record.state, record.reason = ending.state, ending.reason  # type: ignore[assignment]
        if ending.state == "finished":
            self.take(job, record)
        self.write()
        key = WHOLE if job.steps is None else str(job.steps)
        facts = {"job": job, "ending": ending, "result": record.results.get(key, {})}
        self.listener("ended", facts)

    def take(self, job: Job, record: Record) -> None:
        """Note what a run was measured to be."""
        try:
            found = figures_of(job.folder)
        except QuantadaptError as error:
            record.state, record.reason = "failed", error.problems[0].what
            return
        record.results[WHOLE if job.steps is None else str(job.steps)] = found
        if job.steps is not None:
            record.state = "waiting"
            return
        spec = next(run.spec for run in self.comparison.runs if run.name == job.name)
        merged = job.folder / "merged"
        if measures_a_merge(spec) and not self.comparison.options.keep_merged and merged.is_dir():
            with suppress(OutputError):
                remove(merged)

    def write(self) -> None:
        """Write the journal and the tables."""
        self.folder.save()
        self.table = table_of(self.comparison, self.folder.journal)
        write_tables(self.folder, self.comparison, self.table, self.command)

    # Successive halving -------------------------------------------------------------------------

    def halve(self, hours: float) -> None:
        """Train all a little, and the better ones longer, in so many hours."""
        labels = list(dict.fromkeys(run.cell.label for run in self.runs))
        steps = self._steps(labels)
        rungs = self._rungs(labels, steps, 3600 * hours)
        for index, rung in enumerate(rungs):
            last = index == len(rungs) - 1
            alive = [run for run in self.todo if run.cell.label in labels]
            self.batch(alive, None if last else rung)
            if not last:
                labels = self._survivors(labels, rung, rungs[index + 1 :])

    def _steps(self, labels: Sequence[str]) -> int:
        made = self.cells[labels[0]].plan
        assert made is not None
        return made.spec.train.max_steps

    def _rungs(self, labels: Sequence[str], steps: int, budget: float) -> list[int]:
        """Return the rungs, which are decided once, by what the first run takes."""
        journal = self.folder.journal
        if journal.rungs:
            return journal.rungs
        most = halving.most_rungs(len(labels), steps)
        pilot = halving.ladder(len(labels), steps, most)[0]
        first = min(self.todo, key=lambda run: run.cell.reference, default=None)
        if first is None:
            return []
        self.batch([first], pilot)
        record = self.folder.record(first.name)
        result = record.results.get(str(pilot))
        if result is None:
            what = (
                f"the first run did not end well, so there is nothing to plan by: {record.reason}"
            )
            raise QuantadaptError(what, fix=f"see {self.folder.log(first.name)}")
        train = float(result.get("train_seconds") or 0.0)
        cost = halving.Cost(max(record.seconds - train, 0.0), train / pilot)
        seeds = len(self.comparison.grid["seed"])
        journal.rungs = halving.choose(len(labels), steps, cost, seeds, budget)
        self.folder.save()
        needed = len(labels) * seeds * cost.of(journal.rungs[0])
        if needed > budget:
            journal.rungs = []
            raise self._too_small(len(labels) * seeds, pilot, needed)
        guess = halving.seconds(len(labels), journal.rungs, cost, seeds)
        facts = {"rungs": journal.rungs, "cells": len(labels), "seconds": guess}
        self.tell("rungs", facts)
        return journal.rungs

    def _too_small(self, runs: int, steps: int, needed: float) -> QuantadaptError:
        hours = self.comparison.options.budget
        what = (
            f"the budget of {hours:g} hours is too small: {runs} runs of {steps} steps alone take"
        )
        what += f" about {needed / 3600:.2g} hours, going by the first"
        fix = "raise --budget, or take fewer cells, seeds or held-out examples"
        return QuantadaptError(what, fix=fix, where="compare.budget")

    def _survivors(self, labels: Sequence[str], rung: int, ahead: Sequence[int]) -> list[str]:
        """Return the cells that go on, and note why the others do not."""
        found: dict[str, float] = {}
        for label in labels:
            values = [self._badness(run, rung) for run in self.runs if run.cell.label == label]
            known = [value for value in values if value is not None]
            if known:
                found[label] = sum(known) / len(known)
        if not found:
            raise QuantadaptError(f"no run has come to {rung} steps", fix="see the table for why")
        before = self._dropped_after(rung)
        if before:  # it was decided when this was begun
            return [label for label in found if label not in before]
        references = [label for label in found if self.cells[label].cell.reference]
        kept = halving.survivors(found, references, self._affordable(rung, ahead))
        for run in self.runs:
            record = self.folder.record(run.name)
            if run.cell.label in found and run.cell.label not in kept:
                record.state, record.reason = "dropped", _after(rung)
        self.write()
        told = {label: self._words(label) for label in found if label not in kept}
        self.tell("dropped", {"steps": rung, "kept": kept, "dropped": told})
        return kept

    def _dropped_after(self, rung: int) -> set[str]:
        records = {run.cell.label: self.folder.record(run.name) for run in self.runs}
        return {
            label
            for label, record in records.items()
            if record.state == "dropped" and record.reason == _after(rung)
        }

    def _words(self, label: str) -> str:
        """Return the figure that a cell is judged by."""
        quality = self.table.quality
        row = next((row for row in self.table.rows if row.label == label), None)
        if quality is None or row is None or quality.name not in row.after:
            return "not measured"
        return f"{quality.name} {stat_words(quality, row.after[quality.name])}"

    def _badness(self, run: Run, rung: int) -> float | None:
        result = self.folder.record(run.name).results.get(str(rung))
        return badness(result, self.comparison.options.by) if result else None

    def _affordable(self, rung: int, ahead: Sequence[int]) -> int | None:
        """Return how many cells the rest of the budget takes to the next rung, by what they have
        taken so far."""
        left, seeds = self.processes.left, len(self.comparison.grid["seed"])
        spent = [self.folder.record(run.name).seconds for run in self.runs]
        trained = [
            float(result.get("train_seconds") or 0.0)
            for run in self.runs
            if (result := self.folder.record(run.name).results.get(str(rung)))
        ]
        if left is None or not trained:
            return None
        step = sum(trained) / len(trained) / rung
        fixed = max(sum(spent) / len(spent) - step * rung, 0.0)
        each = seeds * halving.Cost(fixed, step).of(ahead[0] - rung)
        return max(1, int(left // each)) if each > 0 else None


def _after(rung: int) -> str:
    return f"after {rung} steps"
