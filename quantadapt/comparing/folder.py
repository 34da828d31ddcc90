"""The folder of a comparison, and the journal in it: what has been run, and what came of it.

    quantadapt-compare.json     the journal
    compare.html .json .csv     the table, written anew after each run
    runs/NAME/                  the run folders
    specs/NAME.yaml             what each was told: `quantadapt run specs/NAME.yaml` does it again
    logs/NAME.txt               what each said

One process has the folder alone. The journal is written after each run, so whatever ends this
process costs what is under way, and no more.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from ..errors import OutputError, PlanRefused, Problem, SpecError
from ..folders.atomic import (
    OTHER_OUTPUT,
    clear_up,
    in_words,
    is_free,
    put_back,
    refuse_links_out,
    refuse_occupied,
    refuse_overlap,
    refuse_unwritable,
    unlocked_folder,
    write_atomic,
)
from ..folders.lock import refuse_in_use, take
from ..folders.run_folder import RunFolder, json_ready
from ..folders.written import Names
from ..inputs.documents import read_object, validated
from ..inputs.plain_yaml import read_yaml
from ..inputs.typed import Typed
from ..machine import installed_version
from .grid import Comparison

MARKER = "quantadapt-compare.json"
WHOLE = "all"
"""The key of what a whole run was measured to be, see `Record.results`."""
TABLES = ("compare.json", "compare.csv", "compare.html")

State = Literal["waiting", "running", "finished", "failed", "refused", "interrupted", "dropped"]
"""Of a run. "refused": not run, as its plan says; "dropped": no further than a rung."""


class Figure(Typed):
    """A figure of an evaluation, as `metrics.json` has it."""

    unit: str = ""
    better: str = ""
    values: dict[str, float | None] = Field(default_factory=dict)
    errors: dict[str, float | None] = Field(default_factory=dict)


class Result(Typed):
    """What a run was measured to be, see `results.figures_of`; numbers beside it may be missing."""

    steps: int | None = None
    evaluations: dict[str, dict[str, Figure]] = Field(default_factory=dict)
    data: list[list[Any]] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)


class Record(Typed):
    """What is known of a run.

    Attributes:
        reason: why it is in that state; empty where it is finished.
        killed: it has failed, as a signal ended it; another time it may not.
        seconds: of a machine or GPU, all attempts together.
        results: by the optimizer steps that were asked for, what was measured then; "all" for the
            whole run. See `results.figures_of`.
    """

    state: State = "waiting"
    reason: str = ""
    killed: bool = False
    seconds: float = 0.0
    results: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @field_validator("results")
    @classmethod
    def _are_results(cls, results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for steps, result in results.items():
            if steps != WHOLE and not (steps.isascii() and steps.isdecimal()):
                raise ValueError(f"{steps!r} is no number of steps")
            Result.model_validate(result)
        return results


class Journal(Typed):
    """The contents of `quantadapt-compare.json`.

    Attributes:
        comparison: see `Comparison.to_dict`.
        runs: by the names of their folders.
        rungs: the steps after which runs are dropped, the last being the whole; empty where none
            are, or where that is not decided yet.
        machine: on what it was begun: gpu, cpu, and the versions that matter.
        remarks: what a reader has to know before rows are compared.
    """

    version: str = ""
    started: str = ""
    state: Literal["running", "finished", "interrupted"] = "running"
    comparison: dict[str, Any] = Field(default_factory=dict)
    runs: dict[str, Record] = Field(default_factory=dict)
    rungs: list[int] = Field(default_factory=list)
    machine: dict[str, str] = Field(default_factory=dict)
    remarks: list[str] = Field(default_factory=list)

    @property
    def seconds(self) -> float:
        """What all runs have taken."""
        return sum(record.seconds for record in self.runs.values())


@dataclass
class CompareFolder:
    """A comparison's folder, which this process has alone. Make it with `opened`."""

    path: Path
    journal: Journal = field(default_factory=Journal)

    def run(self, name: str) -> Path:
        """Return the folder of a run."""
        return self.path / "runs" / name

    def spec(self, name: str) -> Path:
        """Return the file of what a run is told."""
        return self.path / "specs" / f"{name}.yaml"

    def log(self, name: str) -> Path:
        """Return the file of what a run says."""
        return self.path / "logs" / f"{name}.txt"

    def record(self, name: str) -> Record:
        """Return what is known of a run."""
        return self.journal.runs.setdefault(name, Record())

    def measures_base(self, name: str) -> bool:
        """Say whether a run is told to measure the dense base, for all, before it quantizes."""
        try:
            told = read_yaml(self.spec(name)).get("evaluate")
        except SpecError:  # it is not there yet
            return False
        return isinstance(told, dict) and told.get("unquantized") is True

    def save(self) -> None:
        """Write the journal, whole or not at all."""
        self.write(MARKER, _json(self.journal.model_dump()))

    def write(self, name: str, text: str) -> Path:
        """Write a file of the folder, whole or not at all."""
        write_atomic(self.path / name, text)
        return self.path / name


@contextmanager
def opened(path: Path, comparison: Comparison, *, overwrite: bool) -> Iterator[CompareFolder]:
    """Make the folder, or take up what was begun there; nobody else writes in it meanwhile.

    Raises:
        OutputError: it cannot be used. PlanRefused: it holds another comparison. FolderInUse.
    """
    folder = check(path, comparison, overwrite=overwrite)
    with in_words(folder.path):
        target = folder.path.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = take(target)
        try:
            clear_up(target)
            folder = check(path, comparison, overwrite=overwrite, locked=True)
            begun = folder.journal
            if overwrite or not begun.version:
                _start(folder, comparison)
            else:
                folder.journal.comparison = comparison.to_dict()
                folder.journal.state = "running"
                folder.save()
            for name in ("runs", "specs", "logs"):
                (folder.path / name).mkdir(exist_ok=True)
            yield folder
        finally:
            lock.release()


def check(
    path: Path, comparison: Comparison, *, overwrite: bool = False, locked: bool = False
) -> CompareFolder:
    """Return the folder with its journal, if it has one. Raises what `opened` would raise; touches
    nothing.

    Args:
        locked: the caller has the folder's lock.
    """
    found = Path(path).expanduser()
    if not locked:
        refuse_in_use(found)
    put_back(found)
    folder = CompareFolder(found, read(found) if found.is_dir() else Journal())
    with in_words(found):
        if found.exists() and not found.is_dir():
            raise OutputError("a file is in the way", fix=OTHER_OUTPUT, where=str(found))
        if not is_free(found) and not folder.journal.version:
            what = "the folder is not empty and holds no comparison"
            fix = f"{OTHER_OUTPUT}, or empty it yourself; --overwrite replaces only comparisons"
            raise OutputError(what, fix=fix, where=str(found))
        if overwrite:
            refuse_occupied(found, overwrite=True, names=_names(found))
        refuse_links_out(found, "runs", "specs", "logs")
        refuse_unwritable(found)
    refuse_overlap(found, comparison.spec.inputs)
    begun = folder.journal.comparison
    if begun and not overwrite and (other := [*_differences(begun, comparison.to_dict(), found)]):
        raise PlanRefused(other)
    return folder


def read(path: Path) -> Journal:
    """Return the journal of a folder; an empty one if it has none."""
    file = path / MARKER
    if not file.exists():
        return Journal()
    fix = "restore the file, or compare anew in another --output"
    values = read_object(file, OutputError, fix=fix)
    return validated(Journal, values, OutputError, fix=fix, where=str(file))


def _start(folder: CompareFolder, comparison: Comparison) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    version = installed_version("quantadapt") or "?"
    folder.journal = Journal(version=version, started=now, comparison=comparison.to_dict())
    text = _json(folder.journal.model_dump())
    if folder.path.exists() and is_free(folder.path):  # perhaps a mount point: stay in place
        folder.write(MARKER, text)
        return
    with unlocked_folder(folder.path.resolve()) as temporary:
        write_atomic(temporary / MARKER, text)


def _names(path: Path) -> Names:
    """Return what in the folder is ours."""
    runs = {run.name: RunFolder(run).names for run in (path / "runs").glob("*")}
    files: Names = {name: {} for name in (MARKER, *TABLES)}
    return {**files, "specs": {"*.yaml": {}}, "logs": {"*.txt": {}}, "runs": runs}


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> Iterator[Problem]:
    """Yield what makes it another comparison. Axes may get more values, unless there is a budget,
    which all cells have to share from the start."""
    fix = f"{OTHER_OUTPUT}, or replace it with --overwrite"
    before, after = _flat(_part(then, "spec")), _flat(json_ready(_part(now, "spec")))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            what = f"it is {_said(after, key)} now, and {_said(before, key)} in {path}"
            yield Problem(what, fix, where=key)
    axes, wanted = _part(then, "grid"), _part(json_ready(now), "grid")
    budget, given = (_part(each, "compare").get("budget") for each in (then, now))
    for key in sorted(axes.keys() | wanted.keys()):
        if key not in axes or key not in wanted:
            has = "no such axis" if key not in axes else "this axis, too"
            yield Problem(f"the comparison in {path} has {has}", fix, where=f"grid.{key}")
        elif gone := [value for value in axes[key] if value not in wanted[key]]:
            what = f"the comparison in {path} also has {gone[0]!r}"
            yield Problem(what, f"name it, too, or {fix}", where=f"grid.{key}")
        elif budget and axes[key] != wanted[key]:
            what = f"the comparison in {path} shares its budget among {axes[key]}"
            yield Problem(what, fix, where=f"grid.{key}")
    if (budget is None) != (given is None):
        has = "no budget" if budget is None else f"a budget of {budget:g} hours"
        yield Problem(f"the comparison in {path} has {has}", fix, where="compare.budget")


def _said(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "not set"


def _part(values: Any, key: str) -> Mapping[str, Any]:
    found = values.get(key) if isinstance(values, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _flat(values: Any, before: str = "") -> dict[str, Any]:
    """Return dotted key -> value."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{before}{key}.")
        else:
            found[f"{before}{key}"] = value
    return found


def _json(value: object) -> str:
    return json.dumps(json_ready(value), indent=1, ensure_ascii=False) + "\n"
