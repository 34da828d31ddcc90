"""Runs, each in a process of its own: started, watched, told to end.

A crash, an out-of-memory or a kill of one costs nobody else anything. There are no threads: one
loop looks at all that run, one or more on each GPU.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from ..errors import (
    ENDED_EARLY,
    EXIT_OUT_OF_TIME,
    SIGNALS,
    Interrupted,
    Problem,
)
from ..machine import Machine
from .planned import reason

POLL = 0.1
GRACE = 600.0
"""Seconds that runs get to write a checkpoint when they are told to end."""
_INTERRUPTED = 130


@dataclass(frozen=True)
class Job:
    """One process.

    Attributes:
        name: of the run.
        command: what to execute.
        folder: of the run.
        log: gets what it says.
        steps: to how many optimizer steps it trains; None: as many as its spec says.
    """

    name: str
    command: Sequence[str]
    folder: Path
    log: Path
    steps: int | None = None


@dataclass(frozen=True)
class Ending:
    """How a process ended, and the seconds it took; `reason` is a sentence where it did not end
    well, `killed` says that it had no say in it."""

    state: Literal["finished", "failed", "interrupted"]
    reason: str = ""
    seconds: float = 0.0
    killed: bool = False


class OutOfBudget(Exception):
    """The time that all runs may take together is over."""


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    document: IO[bytes]
    slot: int
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


Tell = Callable[[str, Mapping[str, Any]], None]
Done = Callable[[Job, Ending], None]
Look = Callable[[Job], "Job | Ending | None"]
Start = Callable[[Job, Mapping[str, str]], tuple[subprocess.Popen[bytes], IO[bytes]]]


class Processes:
    """Runs jobs, as many at a time as there are slots.

    Args:
        slots: what each adds to the environment of its processes, see `slots`.
        tell: told "start", "progress" and "stopping" with their facts.
        done: told how each has ended.
        seconds: what the jobs may take together; None: for ever.
        start: starts a job.
    """

    def __init__(
        self,
        slots: Sequence[Mapping[str, str]],
        tell: Tell,
        done: Done,
        *,
        seconds: float | None = None,
        start: Start | None = None,
    ) -> None:
        self.slots, self.tell, self.done, self.left = slots, tell, done, seconds
        self._start = start or start_process
        self._running: list[_Running] = []

    def run(self, jobs: Iterable[Job], look: Look = lambda job: job) -> None:
        """Run all jobs. Whatever stops this, Ctrl-C among it, has those that run write a checkpoint
        and end.

        Args:
            look: asked of a job before it begins, in their order: returns it as it is to begin,
                None if it waits for one that runs, or how it has ended already.

        Raises:
            OutOfBudget: after all have ended.
        """
        waiting = list(jobs)
        try:
            while waiting or self._running:
                self._fill(waiting, look)
                if self._collected():
                    continue
                if self.left is not None and sum(r.seconds for r in self._running) > self.left:
                    raise OutOfBudget
                self._tell_progress()
                time.sleep(POLL)
        finally:
            self.stop()

    def stop(self) -> None:
        """Have all that run write a checkpoint and end, and wait for it. A second Ctrl-C ends them
        at once."""
        running = list(self._running)
        if running:
            self.tell("stopping", {"count": len(running)})
        try:
            for each in running:
                with suppress(OSError):
                    each.process.terminate()
            deadline = time.monotonic() + GRACE
            while time.monotonic() < deadline and any(e.process.poll() is None for e in running):
                time.sleep(POLL)
        finally:
            for each in running:
                _kill(each.process)
                self._end(each)

    def _fill(self, waiting: list[Job], look: Look) -> None:
        """Begin of those that wait what can, while there are slots."""
        for job in list(waiting):
            free = [i for i in range(len(self.slots)) if i not in self._used()]
            if not free:
                return
            found = look(job)
            if found is None:
                continue
            waiting.remove(job)
            if isinstance(found, Ending):
                self.done(job, found)
            else:
                self._begin(found, free[0])

    def _used(self) -> list[int]:
        return [each.slot for each in self._running]

    def _begin(self, job: Job, slot: int) -> None:
        self.tell("start", {"job": job})
        process, document = self._start(job, self.slots[slot])
        self._running.append(_Running(job, process, document, slot))

    def _collected(self) -> bool:
        """Take note of those that have ended; whether there were any."""
        ended = [each for each in self._running if each.process.poll() is not None]
        for each in ended:
            _kill(each.process)  # and whatever it may have left behind
            self._end(each)
        return bool(ended)

    def _end(self, each: _Running) -> None:
        self._running.remove(each)
        with each.document as document:
            document.seek(0)
            text = document.read().decode("utf-8", "replace")
        ending = ending_of(each.process.returncode, text, each.job.log, each.seconds)
        if self.left is not None:
            self.left -= ending.seconds
        self.done(each.job, ending)

    def _tell_progress(self) -> None:
        for each in self._running:
            line = _last_line(each.job.folder / "metrics.jsonl", each.started)
            self.tell("progress", {"job": each.job, "seconds": each.seconds, **line})


@contextmanager
def obeying_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the body as Ctrl-C does, with their exit code, where nobody else
    obeys them and this is the main thread."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        free = [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
        before = {number: signal.signal(number, _interrupt) for number in free}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, _: Any) -> None:
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)  # one is enough
    raise Interrupted(f"by {signal.Signals(number).name}", 128 + number)


def slots(
    device: str, machine: Machine, gpus: int | None = None, at_once: int = 1
) -> list[dict[str, str]]:
    """Return what the environment of each process gets, of as many as may run at a time: its own
    GPU, where there are several and the spec names none of them, and its share of the CPU.

    Args:
        gpus: use so many; all by default.
        at_once: so many runs share each GPU, or the machine where there is none.
    """
    kind, _, index = device.partition(":")
    count = len(machine.cuda)
    places: list[dict[str, str]] = [{}]
    if not index and kind != "cpu" and count:
        given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = [name.strip() for name in given.split(",")] if given else [*map(str, range(count))]
        places = [{"CUDA_VISIBLE_DEVICES": name} for name in names[: gpus or count]]
    return [place | _threads(len(places) * at_once) for place in places * at_once]


def _threads(processes: int) -> dict[str, str]:
    """Return what has so many processes share the cores, where the user has not shared them."""
    if processes == 1 or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, _cores() // processes))}


def _cores() -> int:
    """Return how many cores this process may use, where the system tells; else all there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def start_process(
    job: Job, environment: Mapping[str, str]
) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
    """Start a job; what it prints to stdout goes to a file that is returned, all else to its
    log."""
    document: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
    with job.log.open("ab") as log:
        process = subprocess.Popen(
            list(job.command),
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=document,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for us: we tell them to write a checkpoint
            preexec_fn=_end_with_parent(),
        )
    return process, document


def _end_with_parent() -> Callable[[], None] | None:
    """Return what has a process told to end when this one is killed; only Linux can."""
    if sys.platform != "linux":
        return None
    parent, set_signal = os.getpid(), ctypes.CDLL(None).prctl

    def prepare() -> None:
        set_signal(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(128 + signal.SIGTERM)

    return prepare


def ending_of(code: int, document: str, log: Path, seconds: float) -> Ending:
    """Return how a process ended.

    Args:
        code: its exit code; below 0, the signal that killed it.
        document: what it printed to stdout: JSON, with the problems where it failed.
    """
    if code == 0:
        return Ending("finished", seconds=seconds)
    told = _problems(document)
    if code == EXIT_OUT_OF_TIME:
        return Ending("interrupted", "its train.max_time is over", seconds)
    if code in (*ENDED_EARLY, _INTERRUPTED) or -code in (signal.SIGTERM, signal.SIGINT):
        return Ending("interrupted", "it was told to end", seconds)
    if code < 0:
        hint = "; the machine may have run out of memory" if -code == signal.SIGKILL else ""
        what = f"it was killed by {signal.Signals(-code).name}{hint}{_last_words(log)}"
        return Ending("failed", what, seconds, killed=True)
    return Ending("failed", told or f"it ended with exit code {code}{_last_words(log)}", seconds)


def _problems(document: str) -> str:
    try:
        error = json.loads(document)["error"]
        found = [Problem(**problem) for problem in error["problems"]]
        return reason(found) or " ".join(str(error["message"]).split())
    except (ValueError, KeyError, TypeError):
        return ""


def _last_words(log: Path) -> str:
    """Return the last line that a process wrote; of a crash of Python, that which names it."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace")[-20_000:].splitlines()
    except OSError:
        return ""
    lines = [line.strip() for line in lines if line.strip()]
    fatal = [line for line in lines if line.startswith("Fatal Python")]
    return f": {[*lines, *fatal][-1][:300]}" if lines else ""


def _last_line(file: Path, since: float) -> dict[str, Any]:
    """Return the last line that training wrote, if it did in this process."""
    try:
        if file.stat().st_mtime < time.time() - (time.monotonic() - since):
            return {}
        lines = file.read_bytes()[-4096:].decode("utf-8", "replace").splitlines()
        found = json.loads(lines[-1])
    except (OSError, ValueError, IndexError):
        return {}
    return found if isinstance(found, dict) else {}


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the process and whatever it started."""
    with suppress(OSError):
        if os.name == "nt":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
