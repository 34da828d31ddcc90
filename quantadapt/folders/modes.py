"""The modes of what libraries write: safetensors makes its files for their owner alone."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def give_usual_modes(files: Iterable[Path], folder: Path) -> None:
    """Give `files`, made or copied, the mode of one that is opened for writing in `folder`, by the
    umask or the folder's access list; their owner may run what he could. One that has another name
    elsewhere keeps its mode, which is that of both. Where a file system has no modes to give,
    nothing is done.

    Raises:
        OSError: nothing can be written into `folder`.
    """
    own = [file for file in files if not file.is_symlink() and file.stat().st_nlink == 1]
    if os.name == "nt" or not own:
        return
    usual = _usual_mode(folder)
    for file in own:
        mode = stat.S_IMODE(file.stat().st_mode)
        if (wanted := usual | mode & stat.S_IXUSR) != mode:
            with suppress(OSError):
                file.chmod(wanted)


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
