"""A command in a forked process, with a fault at one of its changes of the disk.

An audit hook counts what changes files below the folder that is watched: a file opened for writing,
rename, remove, mkdir, ... What libraries write outside of Python is not seen by it; limits of a
file's size (`Fault.size`) and small disks (`full`) stop that as well.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate")
MAKING = ("open", "os.mkdir")
SCRATCH = "tmp"
"""The folder in the root for temporary files; what changes there is nobody's result."""
LIMIT = 300.0
"""Seconds that a command may take, on a machine that others use as well."""

Action = Callable[[], int]
"""What a process does; returns its exit code."""


@dataclass(frozen=True)
class Fault:
    """What befalls a process.

    Attributes:
        at: before which of its changes, from 1; 0 for none.
        signal: which it gets then.
        error: the errno with which that change fails instead.
        lasting: whether files and folders made later fail as well.
        size: bytes that a file may have; more fails, or kills with `signal.SIGXFSZ`.
    """

    at: int = 0
    signal: int = 0
    error: int = 0
    lasting: bool = False
    size: int | None = None


NOTHING = Fault()


@dataclass
class Ended:
    """How a process ended: exit code (negative: a signal; None: it took too long), what it changed
    ("event path"), what it printed."""

    code: int | None
    changes: list[str]
    text: str


def cli(*arguments: str) -> Action:
    """Return the action of a command line."""

    def act() -> int:
        from quantadapt import cli

        try:
            cli.main(list(arguments))
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        return 0

    return act


def changed_path(event: str, args: tuple[Any, ...]) -> str | None:
    """Return the path that an audit event changes, or None."""
    if event == "open":
        path, _, flags = args
        return path if isinstance(path, str) and flags & WRITES else None
    if event not in CHANGES or (event == "os.mkdir" and os.path.isdir(args[0])):
        return None
    path, folder = os.fsdecode(args[0]) if not isinstance(args[0], int) else "", args[-1]
    if isinstance(folder, int) and folder >= 0 and not os.path.isabs(path):
        return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
    return path


def _watch(root: Path, fault: Fault, report: int) -> None:
    """Tell the changes below `root` to the pipe `report` from now on, and let the fault happen."""
    count = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        path = os.path.abspath(changed_path(event, args) or os.sep)
        if not path.startswith(f"{root}{os.sep}") or path.startswith(f"{root / SCRATCH}{os.sep}"):
            return
        count += 1
        os.write(report, f"{event} {os.path.relpath(path, root)}\n".encode())
        if count == fault.at and fault.signal:
            os.kill(os.getpid(), fault.signal)
        again = fault.lasting and count > fault.at and event in MAKING
        if fault.error and (count == fault.at or again):
            raise OSError(fault.error, os.strerror(fault.error), path)

    sys.addaudithook(hook)


class Process:
    """An action in a process of its own, forked from this one."""

    def __init__(self, action: Action, root: Path, fault: Fault = NOTHING) -> None:
        self._changes, writing = os.pipe()
        self._text, printing = os.pipe()
        self._read: dict[int, bytearray] = {self._changes: bytearray(), self._text: bytearray()}
        self.pid = os.fork()
        if self.pid == 0:
            try:
                _be(action, root, fault, writing, printing)
            finally:
                os._exit(70)  # whatever happens, it must not go on as its parent
        os.close(writing)
        os.close(printing)

    def stopped(self) -> bool:
        """Wait until it has stopped itself, and say so, or whether it ended before."""
        while True:
            self._drain(0.01)
            pid, status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED)
            if pid and os.WIFSTOPPED(status):
                return True
            if pid:
                self._status = status
                return False

    _status: int | None = None

    def go_on(self) -> None:
        """Let it go on where it has stopped."""
        os.kill(self.pid, signal.SIGCONT)

    def ended(self) -> Ended:
        """Wait for its end."""
        deadline, code = time.monotonic() + LIMIT, None
        while self._status is None and time.monotonic() < deadline:
            self._drain(0.01)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = status if pid else None
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        else:
            code = os.waitstatus_to_exitcode(self._status)
        self._drain(0.0)
        for pipe in self._read:
            os.close(pipe)
        changes, text = (bytes(found).decode(errors="replace") for found in self._read.values())
        return Ended(code, changes.splitlines(), text)

    def _drain(self, seconds: float) -> None:
        """Read what is there, so that the process does not wait for us."""
        while ready := select.select(list(self._read), [], [], seconds)[0]:
            found = [(pipe, os.read(pipe, 65536)) for pipe in ready]
            for pipe, more in found:
                self._read[pipe] += more
            if not all(more for _, more in found):  # one end is closed
                time.sleep(seconds)
                return


def _be(action: Action, root: Path, fault: Fault, report: int, printing: int) -> None:
    """Be the process: act, and end."""
    os.dup2(printing, 1)
    os.dup2(printing, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
    scratch = root / SCRATCH
    scratch.mkdir(exist_ok=True)
    os.environ["TMPDIR"] = tempfile.tempdir = str(scratch)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    if fault.size is not None:
        if fault.signal == signal.SIGXFSZ:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.size, resource.RLIM_INFINITY))
    _watch(root, fault, report)
    code = 70
    try:
        code = action()
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def call(action: Action, root: Path, fault: Fault = NOTHING) -> Ended:
    """Let a process act, with a fault, to its end."""
    return Process(action, root, fault).ended()
