"""A disk that is full, or has no room for another file: a small file system, mounted for a trial.

Only root may mount; where that is not allowed, `may_mount` says so and there are no such trials.
What a library writes outside of Python meets the limit here as well.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .commands import Bench, Command, called_again, left_whole, unexpected
from .processes import SCRATCH, call
from .trials import Trial

PART = "full disk"
STEPS = 12
ROOM, MANY = 2**28, 10_000


def may_mount(folder: Path) -> bool:
    """Say whether a file system can be mounted at `folder`."""
    try:
        with _mounted(folder):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def _mount(folder: Path, options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", options, "quantadapt-faults", str(folder)]
    subprocess.run(command, check=True, capture_output=True)


@contextmanager
def _mounted(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    _mount(folder, f"size={ROOM},nr_inodes={MANY}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True, capture_output=True)


def trials(bench: Bench, command: Command) -> Iterator[Trial]:
    """Let the room end at so many bytes, and at so many files, more than there are before."""
    needed, files = command.needs
    for step in range(STEPS):
        room = (needed * step // STEPS) // 4096 * 4096
        yield _trial(bench, command, f"{room} bytes free", room, None)
    for count in range(0, files, 2):
        yield _trial(bench, command, f"{count} inodes free", None, count)


def _trial(bench: Bench, command: Command, name: str, room: int | None, count: int | None) -> Trial:
    def wrong() -> list[str]:
        with _mounted(bench.root):
            bench.fresh(command)
            (bench.root / SCRATCH).mkdir(exist_ok=True)
            there = os.statvfs(bench.root)
            inodes = there.f_files - there.f_ffree
            used = (there.f_blocks - there.f_bfree) * there.f_frsize
            size = ROOM if room is None else max(used + room, 4096)  # 0 would be no limit
            limit = MANY if count is None else inodes + count
            _mount(bench.root, f"remount,size={size},nr_inodes={limit}")
            ended = call(command.action, bench.root)
            _mount(bench.root, f"remount,size={ROOM},nr_inodes={MANY}")
            found = unexpected(ended)
            if ended.code not in (0, 1, 2):
                found.append(f"it ended with {ended.code}: {ended.text[-600:]}")
            if ended.code and "disk" not in ended.text:
                found.append(f"it does not speak of the disk: {ended.text[-600:]}")
            if ended.code == 0 and command.result(command.output) != command.expected:
                found.append("it ended well with another result")
            return found + left_whole(command, bench.root) + called_again(command, bench.root)

    return Trial(PART, command.name, name, wrong)
