"""The runs in a folder, and the one that was started here: a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from ..errors import FolderInUse, OutputError
from ..folders.lock import refuse_in_use
from ..folders.run_folder import MARKER, RunFolder

Kind = Literal["starting", "running", "elsewhere", "finished", "failed", "interrupted", "ended"]
_TAIL = 4000
"""Characters of what a run prints that are shown."""


@dataclass(frozen=True)
class State:
    """How far a run is; `words` and, where there is more to say, `more`."""

    kind: Kind
    more: str = ""

    @property
    def words(self) -> str:
        """The state in two words."""
        return {"elsewhere": "running elsewhere", "ended": "killed"}.get(self.kind, self.kind)


@dataclass(eq=False)
class _Child:
    folder: Path
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    told: bool = False

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None


class Runs:
    """The runs in a folder.

    Args:
        root: the folder; it need not exist.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._child: _Child | None = None
        self._turn = threading.Lock()

    # What there is ----------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Return the names of the runs, the latest first."""
        begun = {}
        for entry in self.root.iterdir() if self.root.is_dir() else ():
            if (entry / MARKER).is_file():
                begun[entry.name] = str(RunFolder(entry).marker.get("started", ""))
        if self._child is not None:  # also one that ended before it made its folder
            begun.setdefault(self._child.folder.name, "~")
        return sorted(begun, key=lambda name: (begun[name], name), reverse=True)

    def folder(self, name: str | None) -> RunFolder | None:
        """Return a run by its name; None where there is none of that name."""
        return RunFolder(self.root / name) if name and name in self.names() else None

    def state(self, folder: RunFolder) -> State:
        """Say how far a run is."""
        if self.is_mine(folder):
            return State("running" if folder.marker else "starting")
        if not folder.marker:
            return State("failed", "it ended before it had a folder; what it said is below")
        kind = folder.marker.get("state")
        if kind in ("finished", "failed", "interrupted"):
            return State(kind)
        try:
            refuse_in_use(folder.path)
        except FolderInUse as error:
            return State("elsewhere", error.problems[0].what)
        return State("ended")

    def is_mine(self, folder: RunFolder) -> bool:
        """Whether it was started here and still runs."""
        child = self._child
        return child is not None and child.runs and child.folder == folder.path

    def printed(self, folder: RunFolder) -> str:
        """Return the end of what a run that was started here has printed."""
        child = self._child
        if child is None or child.folder != folder.path:
            return ""
        size = child.output.seek(0, os.SEEK_END)
        text = os.pread(child.output.fileno(), _TAIL, max(0, size - _TAIL))
        return text.decode("utf-8", "replace").strip()

    @property
    def running(self) -> tuple[Path, int] | None:
        """The folder and the process of the run that was started here and still runs."""
        child = self._child
        return (child.folder, child.process.pid) if child is not None and child.runs else None

    # Start and stop ---------------------------------------------------------------------------

    def start(self, arguments: Sequence[str], folder: Path) -> None:
        """Start `quantadapt` with the arguments of a run into `folder`.

        Raises:
            OutputError: another run that was started here goes on.
        """
        with self._turn:
            if self._child is not None and self._child.runs:
                what = f"the run {self._child.folder.name!r} goes on"
                raise OutputError(what, fix="wait until it has ended, or stop it")
            self.root.mkdir(parents=True, exist_ok=True)
            output = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the run is shown
            process = subprocess.Popen(
                [sys.executable, "-m", "quantadapt", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # it goes on where this process is ended
                env={**os.environ, "COLUMNS": "62", "QUANTADAPT_TOKEN": ""},
            )
            self._child = _Child(folder, process, output)

    def stop(self, folder: RunFolder) -> None:
        """Have a run that was started here write a checkpoint and end; the second time, at once.
        Nothing happens to others."""
        with self._turn:
            child = self._child
            if child is None or not child.runs or child.folder != folder.path:
                return
            number = signal.SIGKILL if child.told else signal.SIGTERM
            with suppress(ProcessLookupError):
                if child.told:
                    os.killpg(child.process.pid, number)
                else:
                    child.process.send_signal(number)
            child.told = True

    def is_told_to_stop(self, folder: RunFolder) -> bool:
        """Whether a run that still runs was told to end."""
        return self.is_mine(folder) and self._child is not None and self._child.told
