"""Bases that several runs have in common: the first run of a group calibrates it, and the others
take it from its folder.

A base lies in the folder of each run that has it, as if that run had made it; its files have a name
in each and are there once. Whether it really is the same, the run that takes it looks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import OutputError, Problem
from ..folders.atomic import free_space
from ..folders.run_folder import RunFolder
from ..paths import BASE
from ..planning.planned import Plan
from ..planning.reusing import KEY, base_in, settings_of, suits
from ..protocols import Task
from ..reporting.words import mebibytes
from .folder import CompareFolder
from .grid import Comparison, Run
from .planned import PlannedCell
from .processes import Ending, Job


def groups_of(runs: Iterable[Run], cells: Mapping[str, PlannedCell]) -> list[list[Run]]:
    """Return the runs whose backend calibrates, those together whose bases are the same."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        made = cells[run.cell.label].plan
        if made is not None and made.calibrates:
            found.setdefault(_key(made, run), []).append(run)
    return list(found.values())


def _key(made: Plan, run: Run) -> str:
    """Return what the base of a run depends on, beside what all runs have in common. The seed
    chooses what the quantizer is shown; of some objectives the steps do, too."""
    by_steps = type(made.task).read_for is not Task.read_for
    train = made.spec.train.model_dump(mode="json") if by_steps else None
    return json.dumps([settings_of(made), run.seed, train], sort_keys=True, default=str)


@dataclass(frozen=True)
class Bases:
    """The calibrated bases of a comparison, and which runs share them."""

    folder: CompareFolder
    _groups: Mapping[str, list[Run]] = field(default_factory=dict)
    _plans: Mapping[str, Plan] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        runs: Sequence[Run],
        cells: Mapping[str, PlannedCell],
        folder: CompareFolder,
    ) -> Bases:
        """Return what `runs` share."""
        groups = groups_of(runs, cells)
        shared = {run.name: group for group in groups for run in group}
        plans = {run.name: made for run in runs if (made := cells[run.cell.label].plan)}
        return cls(folder, shared, plans)

    def look(self, job: Job) -> Job | Ending | None:
        """Return the job as it can begin now; None if another run is about to make its base, see
        `maker`; how it has ended where that could not be made."""
        group = self._names(job.name)
        if not group or base_in(job.folder / BASE):
            return job
        making = self.maker(job.name)  # asked first: it may be done with it while this looks
        for name in reversed(group):  # data may have changed since the first was made
            if self._has(name):
                place = json.dumps(str(self.folder.run(name)), ensure_ascii=False)
                return replace(job, command=[*job.command, "--set", f"{KEY}={place}"])
        if self._given_up(job.name):
            *_, name = sorted(self._lost(job.name), key=lambda name: not self._killed(name))
            why = self.folder.record(name).reason
            return Ending("failed", f"its base could not be quantized, see {name}: {why}")
        return None if making else job

    def instead_of(self, job: Job) -> str:
        """Return the run that was killed while it made the base that `job`, as `look` returned it,
        makes now; empty if there is none."""
        lost = self._lost(job.name)
        taken = base_in(job.folder / BASE) or any(map(self._has, self._names(job.name)))
        return "" if taken or not lost else lost[0]

    def maker(self, name: str) -> str:
        """Return the run that is about to make the base of another one; empty if none is."""
        for other in self._names(name):
            run = self.folder.run(other)
            if self.folder.record(other).state != "running" or base_in(run / BASE):
                continue  # one that is there, and not for others, is not made again
            if not _read(run, "plan.json").get("adopt"):
                return other  # the model may be quantized already, as a hub id tells late
        return ""

    def count(self, runs: Iterable[Run]) -> int:
        """Return how many bases `runs` have."""
        return len({id(self._groups[run.name]) for run in runs if run.name in self._groups})

    def _names(self, name: str) -> list[str]:
        return [run.name for run in self._groups.get(name, [])]

    def _has(self, name: str) -> bool:
        """Say whether others can take the base of a run; that of an older version, or of another
        device, they cannot."""
        record = self.folder.record(name)
        begun = record.state != "waiting" or record.seconds > 0
        return begun and suits(self.folder.run(name), self._plans[name])

    def _given_up(self, name: str) -> bool:
        """Say whether nobody tries to make a run's base any more: what fails in words fails again;
        what is killed, by a machine out of memory, may go well for another, who tries once."""
        lost = self._lost(name)
        return len(lost) > 1 or not all(map(self._killed, lost))

    def _lost(self, name: str) -> list[str]:
        return [other for other in self._names(name) if self._could_not(other)]

    def _killed(self, name: str) -> bool:
        return self.folder.record(name).killed

    def _could_not(self, name: str) -> bool:
        """Say whether a run has failed because its base could not be made."""
        run = self.folder.run(name)
        if self.folder.record(name).state != "failed" or base_in(run / BASE):
            return False
        measured = "evaluate" in (_read(run, "metrics.json").get("stages") or {})
        began = measured or not self.folder.measures_base(name)
        return began and _read(run, "plan.json").get("adopt") is False


def _read(run: Path, name: str) -> dict[str, Any]:
    """Return what a file of a run says; nothing where it is not there, or damaged."""
    try:
        return RunFolder(run).read_json(name)
    except OutputError:
        return {}


@dataclass(frozen=True)
class Disk:
    """What calibrated bases will take.

    Attributes:
        bases: how many are still to be made.
        runs: of so many.
        needed: bytes that they are predicted to take; None where that is not known.
        free: bytes that the disk has; None where it does not tell.
    """

    bases: int
    runs: int
    needed: int | None
    free: int | None

    @property
    def words(self) -> str:
        """All of it, in one sentence; empty where none is made."""
        if not self.bases:
            return ""
        once = f" once for {self.runs} runs" if self.runs > self.bases else ""
        kept = "its folder" if self.runs == 1 else "their folders"
        text = f"1 base is calibrated{once}" if self.bases == 1 else ""
        text = f"{text or f'{self.bases} bases are calibrated{once}'}, and kept in {kept}"
        if self.needed is None:
            return text
        free = "" if self.free is None else f" of {mebibytes(self.free / 2**20)} that are free"
        return f"{text}: about {mebibytes(self.needed / 2**20)} on disk{free}"

    @property
    def problem(self) -> Problem | None:
        """Why they cannot be made; None if they can."""
        if self.needed is None or self.free is None or self.needed <= self.free:
            return None
        what = f"there is too little room on the disk: {self.words}"
        return Problem(what, "free space, or choose another --output", "output")


def disk_of(made: Comparison, cells: Iterable[PlannedCell], output: Path) -> Disk:
    """Return what the calibrated bases of the runs will take on the disk of `output`."""
    by_label = {each.cell.label: each for each in cells if each.plan}
    runs = [run for run in made.runs if run.cell.label in by_label]
    folder = CompareFolder(output)
    groups = groups_of(runs, by_label)
    coming = [group for group in groups if not _is_there(group, by_label, folder)]
    sizes = []
    for group in coming:
        plan = by_label[group[0].cell.label].plan
        memory = plan.memory if plan else None
        sizes.append(memory.work.checkpoint_bytes if memory else None)
    known = [size for size in sizes if size is not None]
    needed = sum(known) if len(known) == len(sizes) else None
    return Disk(len(coming), sum(map(len, coming)), needed, free_space(output))


def _is_there(
    group: Iterable[Run], by_label: Mapping[str, PlannedCell], folder: CompareFolder
) -> bool:
    """Say whether a run of a group has the base that the others would take."""
    plans = ((run.name, by_label[run.cell.label].plan) for run in group)
    return any(plan and suits(folder.run(name), plan) for name, plan in plans)
