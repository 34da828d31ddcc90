"""Write files and folders whole or not at all.

What is made appears under its final name only when it is complete and on disk. A full disk, a name
that is taken or a folder that cannot be written is an OutputError in words.
"""

from __future__ import annotations

import errno
import math
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import OutputError

OTHER_OUTPUT = "choose another --output"

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def atomic_folder(
    final: str | Path, *, overwrite: bool = False, needed: int | None = None
) -> Iterator[Path]:
    """Yield a temporary folder that becomes `final` if the body succeeds, and is removed if not.

    Args:
        final: the folder to make. What is there stays untouched until the new one is on disk.
        overwrite: replace a folder that is not empty.
        needed: bytes that will be written, where known; refused at once if they do not fit.

    Raises:
        OutputError: `final` is taken, cannot be written, or the disk is full.
    """
    target = Path(final).expanduser().resolve()
    refuse_occupied(target, overwrite)
    _refuse_if_too_small(target, needed)
    temporary = _beside(target, "tmp")
    try:
        with in_words(target):
            temporary.mkdir(parents=True)
        yield temporary
        with in_words(target):
            _sync_tree(temporary)
            refuse_occupied(target, overwrite)
            _swap_in(temporary, target)
    except BaseException as error:
        full, written = _is_full(error, temporary), folder_size(temporary)
        shutil.rmtree(temporary, ignore_errors=True)
        if full and isinstance(error, Exception):
            raise _disk_full(target, written, needed) from error
        raise


def write_atomic(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    temporary = _beside(path, "tmp")
    with in_words(path):
        try:
            with temporary.open("xb") as file:
                file.write(text.encode("utf-8", "backslashreplace"))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def folder_size(path: Path) -> int:
    """Return the bytes in all files below `path`; 0 if it does not exist."""
    files = (Path(root, name) for root, _, names in os.walk(path) for name in names)
    return sum(file.lstat().st_size for file in files)


def is_free(path: Path) -> bool:
    """Say whether nothing is at `path`, or only an empty folder."""
    return not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir()))


def refuse_occupied(final: Path, overwrite: bool) -> None:
    """Raise OutputError unless nothing is at `final`, or a folder that may be replaced."""
    with in_words(final):
        free = is_free(final)
    if free or (overwrite and final.is_dir()):
        return
    if final.is_dir():
        what = "the folder is not empty"
        fix = "choose another folder, or replace it: --overwrite, in Python overwrite=True"
    else:
        what, fix = "a file is in the way", "choose another folder"
    raise OutputError(what, fix=fix, where=str(final))


def refuse_unwritable(path: Path) -> None:
    """Raise OutputError where nothing can be made at `path`; tries nothing out."""
    nearest = next(p for p in (path.absolute(), *path.absolute().parents) if os.path.lexists(p))
    if not nearest.is_dir():
        what = f"cannot write it: {nearest} is a file"
        raise OutputError(what, fix=OTHER_OUTPUT, where=str(path))
    effective = os.access in os.supports_effective_ids
    if not os.access(nearest, os.W_OK | os.X_OK, effective_ids=effective):
        fix = f"make {nearest} writable, or {OTHER_OUTPUT}"
        raise OutputError("cannot write it: permission denied", fix=fix, where=str(path))


def _beside(path: Path, ending: str) -> Path:
    """Return a new hidden name in the same folder, thus on the same file system."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{ending}")


def _refuse_if_too_small(final: Path, needed: int | None) -> None:
    free = _free_space(final)
    if needed is not None and free is not None and needed > free:
        raise _disk_full(final, 0, needed)


def _sync_tree(folder: Path) -> None:
    """Flush every file and folder to disk, so that the rename cannot come before the contents."""
    for root, _, names in os.walk(folder, topdown=False):
        for file in (Path(root, name) for name in names):
            if not file.is_symlink():
                descriptor = os.open(file, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        _sync_folder(Path(root))


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be flushed there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap_in(new: Path, final: Path) -> None:
    """Put `new` at `final`; what was there is deleted last, or put back if that fails."""
    old = _beside(final, "old")
    try:
        if final.exists():
            os.rename(final, old)
        os.rename(new, final)
        _sync_folder(final.parent)
    finally:
        if old.exists() and not new.exists():
            shutil.rmtree(old, ignore_errors=True)
        elif old.exists() and not final.exists():
            os.rename(old, final)


@contextmanager
def in_words(path: Path) -> Iterator[None]:
    """Turn an OSError about `path` into an OutputError."""
    try:
        yield
    except OSError as error:
        if _is_full(error, path):
            raise _disk_full(path, 0, None) from error
        reason = (error.strerror or str(error)).lower()
        fix = f"make {_existing(path)} writable, or {OTHER_OUTPUT}"
        raise OutputError(f"cannot write it: {reason}", fix=fix, where=str(path)) from error


def _is_full(error: BaseException | None, path: Path) -> bool:
    """Say whether a full disk or quota is behind `error`, whichever library reports it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        text = str(error)  # safetensors quotes the system, torch.save says only that it failed
        if "No space left on device" in text or "os error 28" in text:
            return True
        if "inline_container.cc" in text and (_free_space(path) or 0) < 2**20:
            return True
        error = error.__cause__ or error.__context__
    return False


def _disk_full(path: Path, written: int, needed: int | None) -> OutputError:
    free = _free_space(path)
    facts = [
        f"{_bytes(needed)} are needed" if needed is not None else "",
        f"{_bytes(written)} had been written" if written else "",
        f"{_bytes(free)} are free" if free is not None else "",
    ]
    what = "not enough disk space: " + ", ".join(fact for fact in facts if fact)
    more = f"{_bytes(needed - (free or 0))} more" if needed and needed > (free or 0) else "space"
    fix = f"free {more} on the disk that holds {_existing(path)}, or {OTHER_OUTPUT}"
    return OutputError(what, fix=fix, where=str(path))


def _existing(path: Path) -> Path:
    """Return the nearest folder above `path` that exists."""
    parents = path.absolute().parents
    return next((parent for parent in parents if os.path.isdir(parent)), parents[-1])


def _free_space(path: Path) -> int | None:
    try:
        return shutil.disk_usage(_existing(path)).free
    except OSError:
        return None


def _bytes(count: int) -> str:
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    power = min(int(math.log2(count) // 10), 4) if count > 0 else 0
    return f"{count / 1024**power:.1f} {units[power]}" if power else f"{count} bytes"
