"""The runs of a comparison: what each is told, which are over, and what came of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ..errors import OutputError, QuantadaptError
from ..folders.atomic import remove
from ..folders.environment import environment
from ..folders.run_folder import RunFolder
from ..machine import this_machine
from .bases import Bases
from .folder import WHOLE, CompareFolder, Record
from .grid import DENSE, Comparison, Run
from .planned import PlannedCell, measures_a_merge, spec_of
from .processes import Ending, Job, OutOfBudget, Processes, Start, slots
from .results import Table, figures_of, table_of
from .writing import write_tables

Listener = Callable[[str, Mapping[str, Any]], None]
"""Called with an event and its facts: "planned", "batch", "start", "progress", "stopping", "ended",
"rungs", "dropped" or "note"."""


@dataclass
class Work:
    """A comparison under way."""

    comparison: Comparison
    folder: CompareFolder
    cells: Mapping[str, PlannedCell]
    listener: Listener
    trusted: bool
    command: str = ""
    table: Table = field(default_factory=lambda: Table([], {}))
    _makers: set[str] = field(default_factory=set)

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
        self.bases = Bases.of(self.runs, self.cells, self.folder)
        measures = self._measures_base()
        for run in self.runs:
            if not self._is_lost(run):
                self._write_spec(run, measures=run.name == measures)
        self.write()

    def _write_spec(self, run: Run, *, measures: bool) -> None:
        """Write what a run is told; whether it `measures` the dense base is not of the cell."""
        made = self.cells[run.cell.label].plan
        assert made is not None
        unquantized = run.spec.evaluate.unquantized and measures
        spec = spec_of(made, run.seed, self.folder.run(run.name), unquantized=unquantized)
        self.folder.write(f"specs/{run.name}.yaml", spec.to_yaml())

    def _note_machine(self) -> None:
        """Note on what this is done, and where that is not what it was begun on."""
        found, journal = environment(), self.folder.journal
        now = {key: str(found[key]) for key in ("gpu", "cpu") if found[key]}
        now |= {name: version for name, version in found["versions"].items() if version}
        if not journal.machine:
            journal.machine = now
        self._remark_sharing()
        for key in now:
            if (then := journal.machine.get(key)) != now[key]:
                self._remark(f"some runs were on {key} {then}, others on {now[key]}")

    def _remark_sharing(self) -> None:
        if (count := self.comparison.options.at_once) > 1 and self.todo:
            place = "GPU" if this_machine().cuda else "machine"
            what = "speeds and times are of a part of it, and what others do at that time"
            self._remark(f"up to {count} runs at a time shared a {place}: {what} moves them")

    def _remark(self, text: str) -> None:
        remarks = self.folder.journal.remarks
        remarks += [text] if text not in remarks else []

    def _measures_base(self) -> str:
        """Return the run that measures the dense base for all; none where a reference begins with
        it anyway, or nobody is left who could."""
        runs = [run for run in self.runs if not self._is_lost(run)]
        if any(self.cells[r.cell.label].plan.backend.name == DENSE for r in runs):  # type: ignore[union-attr]
            return ""
        told = [run.name for run in runs if self.folder.measures_base(run.name)]
        waiting = [r.name for r in runs if self.folder.record(r.name).state == "waiting"]
        fresh = [name for name in waiting if not self.folder.record(name).results]
        return next(iter([*told, *fresh, *waiting]), "")

    def _is_lost(self, run: Run) -> bool:
        """Say whether a run has failed before anything was measured."""
        record = self.folder.record(run.name)
        return record.state == "failed" and not record.results

    def _hand_on(self, failed: str) -> None:
        """Have another run measure the dense base where the one that should has failed."""
        name = self._measures_base()
        run = next((run for run in self.runs if run.name == name), None)
        if run is None or not run.spec.evaluate.unquantized or self.folder.measures_base(name):
            return
        self._write_spec(run, measures=True)
        text = f"{failed} failed before it had measured the base, not quantized; {name} measures it"
        self.tell("note", {"text": text})

    def go(self, start: Start | None, plan: Callable[[Work], None]) -> None:
        """Run what is not over, as `plan` says, until the budget is spent.

        Args:
            start: starts a process; that of `processes` by default.
        """
        options = self.comparison.options
        places = slots(self.comparison.spec.device, this_machine(), options.gpus, options.at_once)
        left = None
        if options.budget is not None:
            left = 3600 * options.budget - self.folder.journal.seconds
        self.processes = Processes(places, self.tell, self.done, seconds=left, start=start)
        try:
            plan(self)
        except OutOfBudget:
            text = f"the budget of {options.budget:g} hours is spent"
            for run in self.todo:
                self.folder.record(run.name).reason = text
            self.tell("note", {"text": text})

    def batch(self, runs: Iterable[Run], steps: int | None) -> None:
        """Run those that have no result after so many steps, all of them if None."""
        key = WHOLE if steps is None else str(steps)
        missing = [run for run in runs if key not in self.folder.record(run.name).results]
        facts = {"count": len(missing), "steps": steps, "slots": len(self.processes.slots)}
        self.tell("batch", facts)
        self.processes.run([self.job(run, steps) for run in missing], self.look)

    def look(self, job: Job) -> Job | Ending | None:
        """Return a job as it can begin now, see `Bases.look`; tell what it waits for."""
        found = self.bases.look(job)
        if found is None and (maker := self.bases.maker(job.name)) not in self._makers:
            self._makers.add(maker)
            text = f"what shares the base of {maker} begins once that is calibrated"
            self.tell("note", {"text": text})
        if isinstance(found, Job) and (killed := self.bases.instead_of(found)):
            text = f"{killed} was killed while it made its base; {job.name} makes it now"
            self.tell("note", {"text": text})
        return found

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
        record.killed = ending.killed
        if ending.state == "finished":
            self.take(job, record)
        self.write()
        if record.state == "failed":
            self._hand_on(job.name)
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
