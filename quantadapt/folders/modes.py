"""The modes of what libraries write: safetensors makes its files for their owner alone."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def give_usual_modes(files: Iterable[Path], folder: Path) -> None:
    """Let all read and write `files` who may do so with a file that is opened for writing in
    `folder`, by the umask or the folder's access list. No rights are taken away; where a file
    system has none to give, nothing is done.

    Raises:
        OSError: nothing can be written into `folder`.
    """
    own = [file for file in files if not file.is_symlink()]
    if os.name == "nt" or not own:
        return
    usual = _usual_mode(folder)
    for file in own:
        if (mode := stat.S_IMODE(file.stat().st_mode)) | usual != mode:
            with suppress(OSError):
                file.chmod(mode | usual)


def _usual_mode(folder: Path) -> int:
    """Return the mode of a new file: the umask cannot be asked for without setting it, for all
    threads."""
    probe = folder / f".mode.{secrets.token_hex(4)}.tmp"  # a name that is a leftover's
    descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
        probe.unlink()
