"""`quantadapt run --gpus N`: start one process for each GPU and watch over them.

The processes get the environment that torchrun would give them. Only the first one shows anything;
when one fails, the others are stopped and its error is shown. It imports nothing heavy.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..errors import ENDED_EARLY, SIGNALS
from .talking import PeerLost

GRACE = 10.0
"""Seconds that the processes get to end by themselves once one has failed."""

SAVING = 600.0
"""Seconds that they get to write a checkpoint when the run is told to end."""

ERROR = "Error: "
"""How the command line begins to say what went wrong."""

_POLL = 0.05


@dataclass
class Failure:
    """The process that failed first, or that was told to end early.

    Attributes:
        rank: its number.
        exit_code: what the command should end with, never 0.
        text: what it wrote to stderr, or how it died.
    """

    rank: int
    exit_code: int
    text: str


def launch(command: Sequence[str], count: int) -> Failure | None:
    """Run `command` in `count` processes; return which failed first, or None."""
    before = {number: signal.signal(number, _exit) for number in SIGNALS}
    try:
        return _launched(command, count)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit(number: int, _: object) -> None:
    """Leave nobody behind: as an exception it stops the processes on its way out."""
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)  # one is enough
    raise SystemExit(128 + number)


def _launched(command: Sequence[str], count: int) -> Failure | None:
    with tempfile.TemporaryDirectory(prefix="quantadapt-") as folder:
        logs = [Path(folder) / f"stderr-{rank}" for rank in range(count)]
        port = _free_port()
        processes = [_start(command, rank, count, port, log) for rank, log in enumerate(logs)]
        tail = _Tail(logs[0])
        try:
            codes = _watch(processes, tail)
        except KeyboardInterrupt:  # which they have got as well
            _wait(processes, GRACE)
            raise
        except SystemExit as told:  # each of them writes its part of a checkpoint
            for process in processes:
                process.send_signal(int(told.code or 0) - 128)
            _wait(processes, SAVING)
            tail()
            raise
        finally:
            _stop(processes)
        failed = [rank for rank, code in enumerate(codes) if code]
        if not failed:
            return None
        # those that only lost another process know nothing of why
        first = min(failed, key=lambda rank: (codes[rank] in _CONSEQUENCES, rank))
        return _failure(first, codes[first] or 1, logs[first])


_CONSEQUENCES = (PeerLost.exit_code, -signal.SIGTERM)


def _start(
    command: Sequence[str], rank: int, count: int, port: int, log: Path
) -> subprocess.Popen[bytes]:
    who = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    given = {name: str(value) for name, value in (who | where).items()}
    given.setdefault("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    output: IO[bytes] | None = None if rank == 0 else open(os.devnull, "wb")  # noqa: SIM115
    with log.open("wb") as errors:
        return subprocess.Popen(
            list(command),
            env=os.environ | given,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
        )


class _Tail:
    """Shows what the first process writes to stderr as it comes, up to an error."""

    def __init__(self, log: Path) -> None:
        self.log, self.shown = log, 0

    def __call__(self) -> None:
        text = self.log.read_bytes()[self.shown :].decode("utf-8", "replace")
        lines = text[: text.rfind("\n") + 1].splitlines(keepends=True)
        for line in lines:
            if line.startswith(ERROR):
                return
            sys.stderr.write(line)
            self.shown += len(line.encode())


def _watch(processes: list[subprocess.Popen[bytes]], tail: _Tail) -> list[int | None]:
    """Return the exit codes once all have ended, or some time after one has failed."""
    deadline, told = None, 0
    while True:
        codes = [process.poll() for process in processes]
        tail()
        if None not in codes or (deadline and time.monotonic() > deadline):
            # One that was about to end does not listen any more, and dies of what it is told.
            return [128 + told if told and code == -told else code for code in codes]
        if any(codes) and deadline is None:
            early = [code for code in codes if code in ENDED_EARLY]  # the others save, too
            told = _tell(processes, early)
            deadline = time.monotonic() + (SAVING if early else GRACE)
        time.sleep(_POLL)


def _tell(processes: list[subprocess.Popen[bytes]], codes: Sequence[int | None]) -> int:
    """Send the signal that has ended one process to those that work on, and do not miss it; return
    its number, 0 for none."""
    number = next((code - 128 for code in codes if code and code > 128), 0)
    for process in processes if number else ():
        process.send_signal(number)  # of one that has ended, nothing comes
    return number


def _wait(processes: list[subprocess.Popen[bytes]], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(p.poll() is None for p in processes):
        time.sleep(_POLL)


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _failure(rank: int, code: int, log: Path) -> Failure:
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; the machine may have run out of memory" if -code == signal.SIGKILL else ""
        return Failure(rank, 1, f"Error: it was killed by {name}{hint}")
    start = f"\n{text}".find(f"\n{ERROR}")
    return Failure(rank, code, text[max(start, 0) :])


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
