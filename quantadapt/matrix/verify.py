"""`quantadapt matrix --verify`: the conformance suite for many backends, in isolated processes.

One process verifies one backend with several adapters, which share its imports and the quantized
base. A process that dies or hangs takes nothing with it: the adapter that it died of is tried
alone, the others go on without it, and every result so far is in the file. A later run
passes over what has a result already, with the same versions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from threading import Event, Lock
from typing import Any

import yaml

from ..dependencies import missing_requirements
from ..errors import MissingDependency, OptionsError, OutputError, PlanRefused, Problem
from ..folders.atomic import write_atomic
from ..machine import this_machine
from ..records import Adapter, Backend
from ..registry.discovery import registry
from .declared import declared_cell, dtype_for, obstacles, without_defaults
from .process import Ending, Job, Processes, Tell, pytest_command
from .results import Verified, VerifiedCell, origin_of, read_verified

TIMEOUT = 900.0
AT_ONCE = 10
"""Adapters that share one process, at most: what an interruption or a crash can cost."""


def parse_options(texts: Iterable[str]) -> dict[str, Any]:
    """Return the options in texts like `bits=3,group_size=32`; values are read as YAML."""
    found: dict[str, Any] = {}
    for text in texts:
        inner = text.strip()
        if inner.startswith("{") and inner.endswith("}"):
            inner = inner[1:-1]
        assigned = re.sub(r"(^|,)\s*([\w.]+)\s*=\s*", r"\1 \2: ", inner)
        try:
            values: dict[Any, Any] | None = yaml.safe_load(f"{{{assigned}}}")
        except yaml.YAMLError:
            values = None
        named = "=" in text or ":" in text
        if not named or not all(str(name).isidentifier() for name in values or {"": None}):
            fix = "write them as name=value, separated by commas: bits=3,group_size=32"
            raise OptionsError(
                [Problem(f"{text!r} names no options", fix, where="backend options")]
            )
        found |= values or {}
    return found


class Verification:
    """Verifies cells and keeps the file of results."""

    def __init__(
        self,
        file: Path,
        *,
        timeout: float = TIMEOUT,
        listener: Tell | None = None,
        start: Callable[[Job], list[str]] | None = None,
    ) -> None:
        """Read what the file holds already.

        Args:
            file: where results are kept.
            timeout: seconds without any sign of life after which a process counts as hanging.
            listener: told "planned", "job", "test", "ended" and "cell" with their facts.
            start: gives the command that verifies a job; pytest by default.
        """
        self.file = file
        self.cells = list(read_verified(file).cells) if file.exists() else []
        self._tell = listener or (lambda event, facts: None)
        self._lock, self._stop = Lock(), Event()
        self._processes = Processes(timeout, self._tell, self._stop, start or pytest_command)
        self._origins: dict[tuple[str, str], dict[str, Any]] = {}

    def run(
        self,
        backends: Sequence[Backend],
        adapters: Sequence[Adapter],
        *,
        options: Mapping[str, Any] | None = None,
        device: str = "cpu",
        dtype: str | None = None,
        fresh: bool = False,
        jobs: int = 1,
    ) -> list[VerifiedCell]:
        """Verify each of `backends` with each of `adapters`; return their cells.

        Args:
            backends: those to verify.
            adapters: with which adapters.
            options: of the backends, where they are not the defaults.
            device: on which device.
            dtype: in which compute dtype; `matrix.dtype_for` by default.
            fresh: verify again what has a result already.
            jobs: how many processes at a time.

        Raises:
            PlanRefused: the device or an option does not exist.
            MissingDependency: pytest is not there.
            OutputError: the file cannot be written.
        """
        if find_spec("pytest") is None:
            what = "the conformance suite needs pytest, which is not installed"
            raise MissingDependency(what, fix="pip install pytest")
        wanted, todo = self._plan(backends, adapters, options or {}, device, dtype, fresh)
        self._save()
        with ThreadPoolExecutor(max_workers=max(jobs, 1)) as pool:
            try:
                for done in [pool.submit(self._verify, job) for job in todo]:
                    done.result()
            finally:
                self._stop.set()
        keys = dict.fromkeys(wanted)
        found = {cell.key: cell for cell in self.cells}
        return [found[key] for key in keys if key in found]

    def _plan(
        self,
        backends: Sequence[Backend],
        adapters: Sequence[Adapter],
        options: Mapping[str, Any],
        device: str,
        dtype: str | None,
        fresh: bool,
    ) -> tuple[list[tuple[str, ...]], list[Job]]:
        """Return the keys of all cells, and what to do; what cannot be run is noted right away."""
        _check_device(device)
        wanted, todo = [], []
        for backend in backends:
            given = without_defaults(backend, options)
            job = Job(backend, (), given, device, dtype_for(backend, device, dtype))
            problems = obstacles(backend, given, device, job.dtype)
            if mistakes := [p for p in problems if p.where.startswith("backend.")]:
                raise PlanRefused(mistakes)
            names = []
            for adapter in adapters:
                cell = self._blank(job, adapter)
                wanted.append(cell.key)
                if missing := [*problems, *missing_requirements(adapter)]:
                    self._cannot_run(replace(cell, detail=missing[0].what))
                elif fresh or not self._has(cell):
                    names.append(adapter.name)
            parts = [tuple(names[i : i + AT_ONCE]) for i in range(0, len(names), AT_ONCE)]
            todo += [replace(job, adapters=part) for part in parts]
            self._tell("planned", {"job": job, "todo": len(names), "of": len(adapters)})
        return wanted, todo

    def _blank(self, job: Job, adapter: Adapter) -> VerifiedCell:
        facts = {"options": job.options, "device": job.device, "dtype": job.dtype}
        declared = declared_cell(job.backend, adapter, **facts).word  # type: ignore[arg-type]
        return VerifiedCell(
            job.backend.name,
            adapter.name,
            "not run",
            declared=declared,
            origin=self._origin(job),
            **facts,  # type: ignore[arg-type]
        )

    def _origin(self, job: Job) -> dict[str, Any]:
        key = (job.backend.name, job.device)
        if key not in self._origins:
            self._origins[key] = origin_of(job.backend, _device_in_words(job.device))
        return self._origins[key]

    def _cannot_run(self, cell: VerifiedCell) -> None:
        """Say so, but for a result that another machine left in the file."""
        if not any(other.key == cell.key and other.verified != "not run" for other in self.cells):
            self._note(cell)

    def _has(self, wanted: VerifiedCell) -> bool:
        """Say whether there is a result under the same circumstances."""
        names = ("device", "python", "versions")
        return any(
            cell.key == wanted.key
            and cell.verified != "not run"
            and cell.declared == wanted.declared
            and all(cell.origin.get(name) == wanted.origin.get(name) for name in names)
            for cell in self.cells
        )

    # Work --------------------------------------------------------------------------------------

    def _verify(self, job: Job) -> None:
        """Verify a job, whatever its processes do."""
        if self._stop.is_set():
            return
        ending = self._processes.run(job)
        self._keep(job, ending.cells)
        left = self._without(job, [cell.adapter for cell in ending.cells])
        if not left.adapters or self._stop.is_set():
            return
        if len(job.adapters) == 1 or not ending.died:
            self._crashed(left, ending.died or "the suite ended without a result for it")
        elif ending.part in left.adapters:
            self._verify(self._without(left, [ending.part]))
            self._verify(replace(left, adapters=(ending.part,)))
        elif ending.part == "rest":
            self._one_by_one(left)
        else:
            self._after_the_base(left, ending)

    def _after_the_base(self, job: Job, before: Ending) -> None:
        """Go on after a death before the first adapter: what happens twice concerns them all."""
        alone = replace(job, adapters=job.adapters[:1])
        again = self._processes.run(alone)
        if again.cells:
            self._keep(alone, again.cells)
            self._one_by_one(self._without(job, alone.adapters))
        elif again.part == before.part:
            self._crashed(job, again.died)
        else:
            self._crashed(alone, again.died)
            self._one_by_one(self._without(job, alone.adapters))

    def _one_by_one(self, job: Job) -> None:
        for name in job.adapters:
            self._verify(replace(job, adapters=(name,)))

    def _without(self, job: Job, names: Iterable[str]) -> Job:
        done = set(names)
        return replace(job, adapters=tuple(name for name in job.adapters if name not in done))

    def _keep(self, job: Job, cells: Iterable[VerifiedCell]) -> None:
        for cell in cells:
            self._note(replace(cell, origin=self._origin(job)))
        self._save()

    def _crashed(self, job: Job, why: str) -> None:
        if self._stop.is_set():  # it was us
            return
        for name in job.adapters:
            blank = self._blank(job, registry().adapter(name))
            self._note(replace(blank, verified="crashed", detail=why))
        self._save()

    def _note(self, cell: VerifiedCell) -> None:
        with self._lock:
            self.cells = [other for other in self.cells if other.key != cell.key] + [cell]
        self._tell("cell", {"cell": cell})

    def _save(self) -> None:
        with self._lock:
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                where = str(self.file.parent)
                raise OutputError(f"cannot make it: {error.strerror}", where=where) from None
            write_atomic(self.file, Verified.of(self.cells).to_json())


def _check_device(device: str) -> None:
    if device.startswith("cuda") and not this_machine().cuda:
        what = "there is no CUDA device here, or torch was built without CUDA"
        fix = "`quantadapt doctor` looks; results of other machines are read with --verified"
        raise PlanRefused([Problem(what, fix, where="device")])


@cache
def _device_in_words(device: str) -> str:
    """Return the card's name; torch is asked in a process of its own."""
    if not device.startswith("cuda"):
        return device
    from ..machine import run_python

    code = "import sys, torch; print(torch.cuda.get_device_name(sys.argv[1]))"
    problem, output = run_python(code, [device], 120)
    return device if problem else output.strip().splitlines()[-1]
