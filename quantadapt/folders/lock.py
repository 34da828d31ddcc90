"""One writer for each folder: a lock file beside it says who that is.

The operating system's own lock (`flock`) decides wherever it can, for it ends with the process
that holds it. Where a file system has none, or other machines may not see it, the file itself
counts: its holder touches it, and what nobody has touched for `LEASE` seconds belongs to nobody.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from ..errors import FolderInUse, OutputError, warn
from ..inputs.documents import parsed
from .written import LOCK

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LEASE = 300.0
"""Seconds after which a lock that is not touched any more is that of a dead process."""

_SHARED = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "fuse", "9p", "afs", "gluster")


class LockTakenOver(UserWarning):
    """A process ended without giving its folder free, and another one goes on in it."""


@dataclass(frozen=True)
class Holder:
    """Who holds a folder: machine, process, when it took the folder, and when the process began
    (in ticks since boot, where the system tells), for process ids are used again."""

    host: str
    pid: int
    since: str
    born: str = ""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class Lock:
    """A lock that is held. `release` gives the folder free; so does the end of the process."""

    def __init__(self, file: Path, descriptor: int, *, touched: bool) -> None:
        self.file, self._descriptor = file, descriptor
        self._ended = threading.Event()
        if touched:
            threading.Thread(target=self._touch, daemon=True).start()

    def _touch(self) -> None:
        while not self._ended.wait(LEASE / 5):
            with contextlib.suppress(OSError):
                os.utime(self.file)

    def release(self) -> None:
        """Give the folder free; nothing if that is done."""
        if self._ended.is_set():
            return
        self._ended.set()
        with contextlib.suppress(OSError):  # a folder that was moved away, for one
            self.file.unlink()  # before it is unlocked: nobody can have taken it
        os.close(self._descriptor)


def take(folder: Path) -> Lock:
    """Lock `folder`, which need not exist; the folder above it has to.

    A lock that a process left behind when it died is taken over, with a `LockTakenOver` warning.

    Raises:
        FolderInUse: another process, or another thread, is writing there.
        OutputError: a link is where the lock has to be, and might lead anywhere.
    """
    file = lock_file(folder)
    while True:
        descriptor = _opened(file, os.O_CREAT)
        try:
            locked = _flock(descriptor)
            if locked is not False and not _is_at(descriptor, file):  # its holder has just gone
                os.close(descriptor)
                continue
            earlier = _read(descriptor)
            if locked is False or (earlier and _may_live(earlier, file, locked)):
                raise _in_use(folder, earlier, file)
            _write(descriptor)
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(descriptor)
            raise
        if earlier:
            text = f"{folder} was left by {earlier}, which does not run any more; going on in it"
            warn(text, LockTakenOver, stacklevel=2)
        return Lock(file, descriptor, touched=not locked or _is_shared(file))


def refuse_in_use(folder: Path) -> None:
    """Raise FolderInUse where `take` would; touches nothing."""
    file = lock_file(folder)
    try:
        descriptor = _opened(file)
    except OSError:
        return
    try:
        locked, earlier = _flock(descriptor), _read(descriptor)
        if locked is False or (earlier and _may_live(earlier, file, locked)):
            raise _in_use(folder, earlier, file)
    finally:
        os.close(descriptor)


def lock_file(folder: Path) -> Path:
    """Return where the lock of `folder` lies: beside it, for the folder itself may be replaced; in
    it where nothing beside it can be written, as with a mount point."""
    folder = folder.expanduser().resolve()
    beside = os.access(folder.parent, os.W_OK) or not folder.is_dir()
    return folder.with_name(f".{folder.name}.{LOCK}") if beside else folder / f".{LOCK}"


def _opened(file: Path, more: int = 0) -> int:
    if file.is_symlink():
        raise OutputError("it is a link, and no lock", fix="remove it", where=str(file))
    return os.open(file, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | more, 0o666)


def _flock(descriptor: int) -> bool | None:
    """Lock the file; False where somebody else has, None where that cannot be done here."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _read(descriptor: int) -> Holder | None:
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        found = Holder(**parsed(os.read(descriptor, 4096)))
    except (ValueError, TypeError):  # new, or cut off while it was written
        return None
    words = all(isinstance(text, str) for text in (found.host, found.since, found.born))
    return found if words and type(found.pid) is int and 0 < found.pid < 2**31 else None


def _write(descriptor: int) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    holder = Holder(socket.gethostname(), os.getpid(), now, _born(os.getpid()))
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.truncate(descriptor, 0)
    os.write(descriptor, json.dumps(asdict(holder)).encode())


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _may_live(holder: Holder, file: Path, locked: bool | None) -> bool:
    """Say whether the process that wrote the lock may still run; `locked`: we have the file."""
    if holder.host == socket.gethostname() and os.name != "nt":
        return not locked and _runs(holder)
    if locked and not _is_shared(file):
        return False
    return _age(file) < LEASE


def _runs(holder: Holder) -> bool:
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it runs, and is somebody else's
        pass
    return _born(holder.pid) == holder.born


def _born(pid: int) -> str:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]


def _age(file: Path) -> float:
    """Return the seconds since the file was touched, by the clock of its file system."""
    probe = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        probe.touch()
        return probe.stat().st_mtime - file.stat().st_mtime
    except OSError:
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


def _is_shared(file: Path) -> bool:
    """Say whether other machines may have the file, too; only Linux tells."""
    if sys.platform != "linux":
        return False
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    mounts = [(parts[1], parts[2]) for parts in map(str.split, lines) if len(parts) > 2]
    holding = [(m, kind) for m, kind in mounts if file.is_relative_to(m.replace("\\040", " "))]
    return max(holding, key=lambda mount: len(mount[0]), default=("", ""))[1].startswith(_SHARED)


def _in_use(folder: Path, holder: Holder | None, file: Path) -> FolderInUse:
    who = str(holder) if holder else "another process"
    what = f"{who} is writing there"
    fix = "wait until it has ended, or choose another --output"
    if holder and holder.host != socket.gethostname():
        fix += f"; if that machine is gone, wait {LEASE / 60:.0f} minutes, or delete {file}"
    return FolderInUse(what, fix=fix, where=str(folder))
