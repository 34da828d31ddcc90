"""Write files and folders whole or not at all.

What is made appears under its final name only when it is complete and on disk. A full disk, a name
that is taken or a folder that cannot be written is an OutputError in words.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import OutputError, QuantadaptError
from ..memory.cards import size_words
from ..paths import path_problem
from .lock import take
from .modes import give_usual_modes
from .written import Names, is_leftover, leftovers, not_ours, write_list

OTHER_OUTPUT = "choose another --output"

_FULL = (errno.ENOSPC, errno.EDQUOT)
_WRITING = (*_FULL, errno.EFBIG, errno.EROFS)
"""Nothing that is read fails with these."""
_CUT_OFF = re.compile(r"\d+ requested and \d+ written")
_QUOTED = re.compile(r"(?:os error |\[Errno )(\d+)")
"""How safetensors and shutil.copytree tell of the system's errors, the latter of many at once."""


@contextmanager
def atomic_folder(
    final: str | Path,
    *,
    overwrite: bool = False,
    needed: int | None = None,
    listed: bool = True,
    checksums: bool = False,
) -> Iterator[Path]:
    """Yield a temporary folder that becomes `final` if the body succeeds, and is removed if not.

    Nobody else can write `final` meanwhile. What processes that died have left of it is put back or
    removed first.

    Args:
        final: the folder to make. What is there stays untouched until the new one is on disk.
        overwrite: replace a folder that we wrote. Files in it that are not ours are never deleted.
        needed: bytes that will be written, where known; refused at once if they do not fit.
        listed: put a list of the files into it, by which it can be replaced another time.
        checksums: of what is in them, too.

    Raises:
        OutputError: `final` is taken, cannot be written, or the disk is full.
        FolderInUse: somebody else is writing it.
    """
    target = Path(final).expanduser().resolve()
    refuse_occupied(target, overwrite)
    refuse_unwritable(target)
    _refuse_if_too_small(target, needed)
    with locked(target):
        refuse_occupied(target, overwrite)
        with unlocked_folder(target, needed=needed) as temporary:
            yield temporary
            with in_words(target):
                refuse_occupied(target, overwrite)
                if listed:
                    write_list(temporary, checksums=checksums)


@contextmanager
def locked(final: Path) -> Iterator[None]:
    """Be the one who writes the folder `final`, and clear up what is left of those who died.

    Raises:
        FolderInUse: somebody else is.
    """
    with in_words(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        lock = take(final)
    try:
        clear_up(final)
        yield
    finally:
        lock.release()


@contextmanager
def unlocked_folder(target: Path, *, needed: int | None = None) -> Iterator[Path]:
    """Do what `atomic_folder` does, for those who have the lock and may replace what is there."""
    temporary = _beside(target, "tmp")
    try:
        with in_words(target):
            temporary.mkdir(parents=True)
        yield temporary
        with in_words(target):
            sync_tree(temporary)
            put_in_place(temporary, target)
    except Exception as error:
        failed, written = _failed_write(error, temporary), folder_size(temporary)
        shutil.rmtree(temporary, ignore_errors=True)
        if failed is not None and failed.errno in _FULL:
            raise _disk_full(target, written, needed) from error
        if failed is not None and not isinstance(error, QuantadaptError):
            raise _not_written(target, failed) from error
        raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def clear_up(final: Path) -> None:
    """Put back what was at `final` when a process died that replaced it, and remove what such
    processes had not finished. The caller has the lock."""
    mine = [(kind, path) for name, kind, path in leftovers(final.parent) if name == final.name]
    for kind, path in mine:
        if kind == "old" and not os.path.lexists(final):
            os.rename(path, final)
            sync_folder(final.parent)
        elif kind and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif kind:
            path.unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Delete a folder that we wrote; of a process that dies meanwhile, nothing with its name is
    left. Raises FolderInUse."""
    with locked(folder), in_words(folder):
        gone = _beside(folder, "tmp")
        os.rename(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def tidy(final: Path) -> None:
    """Do what `clear_up` does, unless somebody is at work there or nothing can be written."""
    with suppress(OSError, OutputError), locked(final):
        pass


def put_back(folder: str | Path) -> Path:
    """Return `folder`, for those who are about to read it. If a process died while it replaced the
    folder, or one in it, what was there before is put back."""
    path = Path(os.path.expanduser(folder))
    resolved = path.resolve()
    for above in (resolved.parent, resolved):
        for name, kind, _ in list(leftovers(above)):
            wanted = above == resolved or name == resolved.name
            if kind == "old" and wanted and not os.path.lexists(above / name):
                tidy(above / name)
    return path


def write_atomic(path: Path, contents: str | bytes) -> None:
    """Write a file, whole or not at all; text as UTF-8."""
    if isinstance(contents, str):
        contents = contents.encode("utf-8", "backslashreplace")
    temporary = _beside(path, "tmp")
    with in_words(path):
        try:
            with temporary.open("xb") as file:
                file.write(contents)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def folder_size(path: Path) -> int:
    """Return the bytes in all files below `path`; 0 if it does not exist."""
    files = (Path(root, name) for root, _, names in os.walk(path) for name in names)
    return sum(file.lstat().st_size for file in files)


def is_free(path: Path) -> bool:
    """Say whether nothing is at `path`, or an empty folder; what processes left as they died is
    nothing."""
    if not os.path.lexists(path):
        return True
    return path.is_dir() and all(is_leftover(entry.name) for entry in path.iterdir())


def refuse_occupied(final: Path, overwrite: bool, names: Names | None = None) -> None:
    """Raise OutputError unless nothing is at `final`, or a folder that may be replaced.

    Args:
        names: what is ours in it besides the files on its list.
    """
    with in_words(final):
        free = is_free(final)
    if free:
        return
    where = str(final)
    if not final.is_dir():
        raise OutputError("a file is in the way", fix="choose another folder", where=where)
    if not overwrite:
        fix = "choose another folder, or replace it: --overwrite, in Python overwrite=True"
        raise OutputError("the folder is not empty", fix=fix, where=where)
    with in_words(final):
        if Path.cwd().is_relative_to(final.resolve()):
            what = f"replacing the folder would delete {Path.cwd()}, which is in use"
            raise OutputError(what, fix=OTHER_OUTPUT, where=where)
        others = not_ours(final, names)
    if others:
        shown = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if others[3:] else "")
        what = f"replacing the folder would delete what quantadapt did not write there: {shown}"
        fix = "choose another folder, or move that away or delete it yourself"
        raise OutputError(what, fix=fix, where=where)


def refuse_overlap(final: Path, inputs: Iterable[str | Path | None]) -> None:
    """Raise OutputError where one of `inputs` lies in the output folder, or that in one of them.

    Args:
        inputs: files, folders, and hub ids, of which no folder is here.
    """
    target = Path(os.path.expanduser(final)).resolve()
    for given in inputs:
        path = os.path.expanduser(given or "")
        if path_problem(path) or not os.path.exists(path):
            continue
        used = Path(path).resolve()
        if _lies_in(used, target):
            what = f"writing the folder would replace {given}, which is read"
        elif _lies_in(target, used):
            what = f"the folder is inside {given}, which is read"
        else:
            continue
        raise OutputError(what, fix="choose another folder", where=str(final))


def _lies_in(path: Path, folder: Path) -> bool:
    """Say whether a resolved path is `folder` or below it, whatever the file system makes of upper
    and lower case, or where it is mounted twice."""
    if path.is_relative_to(folder):
        return True
    above = [place for place in (path, *path.parents) if place.exists()]
    return folder.exists() and any(os.path.samefile(place, folder) for place in above)


def refuse_links_out(folder: Path, *inner: str) -> None:
    """Raise OutputError where an entry of `folder`, or of one of those `inner` to it, is a link
    that leads out of it: a folder may come from elsewhere, and what is written stays in it."""
    for place in (folder, *(folder / name for name in inner)):
        for entry in place.iterdir() if place.is_dir() else ():
            if entry.is_symlink() and not entry.resolve().is_relative_to(folder.resolve()):
                what = f"{entry.relative_to(folder)} is a link that leads out of the folder"
                fix = "put what it names into the folder, or start anew in another --output"
                raise OutputError(what, fix=fix, where=str(folder))


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
    free = free_space(final)
    if needed is not None and free is not None and needed > free:
        raise _disk_full(final, 0, needed)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder to disk, so that the rename cannot come before the contents;
    whatever wrote the files, they get the usual modes."""
    for root, _, names in os.walk(folder, topdown=False):
        files = [Path(root, name) for name in names]
        give_usual_modes(files, Path(root))
        for file in files:
            if not file.is_symlink():
                descriptor = os.open(file, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        sync_folder(Path(root))


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk."""
    if os.name == "nt":  # folders cannot be flushed there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(new: Path, final: Path) -> None:
    """Put `new` at `final`; what was there is deleted last, or put back if that fails."""
    old = _beside(final, "old")
    try:
        if final.exists():
            os.rename(final, old)
        os.rename(new, final)
        sync_folder(final.parent)
    finally:
        if old.exists() and not new.exists():
            shutil.rmtree(old, ignore_errors=True)
        elif old.exists() and not final.exists():
            os.rename(old, final)


@contextmanager
def in_words(path: Path) -> Iterator[None]:
    """Turn what goes wrong as `path` is written, whichever library tells it, into an OutputError;
    so any OSError."""
    try:
        yield
    except Exception as error:
        failed = _failed_write(error, path) or (error if isinstance(error, OSError) else None)
        if failed is None or isinstance(error, QuantadaptError):
            raise
        if failed.errno in _FULL:
            raise _disk_full(path, 0, None) from error
        raise _not_written(path, failed) from error


def _failed_write(error: BaseException | None, path: Path) -> OSError | None:
    """Return the system's error behind `error` if it kept something below `path` from being
    written, whichever library reports it."""
    while error is not None:
        text = str(error)
        number = int(found[1]) if (found := _QUOTED.search(text)) else 0
        if number in _WRITING or ("os error" in text and "serializ" in text):
            return OSError(number, os.strerror(number))
        if isinstance(error, OSError) and (error.errno in _WRITING or str(path) in text):
            return error
        # torch.save says only that it failed, and numpy how much it wrote
        torchs = "inline_container.cc" in text and "PytorchStreamReader" not in text
        torchs = torchs or "basic_ios::clear" in text  # torch 2.11
        if torchs or (isinstance(error, OSError) and _CUT_OFF.fullmatch(text)):
            number = errno.ENOSPC if _is_full(path) else errno.EIO
            return OSError(number, os.strerror(number))
        error = error.__cause__ or error.__context__
    return None


def _not_written(path: Path, error: OSError) -> OutputError:
    reason = (error.strerror or str(error)).lower()
    fix = f"make {_existing(path)} writable, or {OTHER_OUTPUT}"
    return OutputError(f"cannot write it: {reason}", fix=fix, where=str(path))


def _disk_full(path: Path, written: int, needed: int | None) -> OutputError:
    free = free_space(path)
    facts = [
        f"{size_words(needed)} are needed" if needed is not None else "",
        f"{size_words(written)} had been written" if written else "",
        f"{size_words(free)} are free" if free is not None else "",
        "there is no room for another file, of any size" if _has_no_inodes(path) else "",
    ]
    what = "not enough disk space: " + ", ".join(fact for fact in facts if fact)
    more = (
        f"{size_words(needed - (free or 0))} more" if needed and needed > (free or 0) else "space"
    )
    fix = f"free {more} on the disk that holds {_existing(path)}, or {OTHER_OUTPUT}"
    return OutputError(what, fix=fix, where=str(path))


def _existing(path: Path) -> Path:
    """Return the nearest folder above `path` that exists."""
    parents = path.absolute().parents
    return next((parent for parent in parents if os.path.isdir(parent)), parents[-1])


def free_space(path: Path) -> int | None:
    """Return the bytes that are free on the disk that holds `path`, which need not be there; None
    where it does not tell."""
    try:
        return shutil.disk_usage(_existing(path)).free
    except OSError:
        return None


def _is_full(path: Path) -> bool:
    """Say whether the disk has next to no space, or no room for another file."""
    return (free_space(path) or 0) < 2**20 or _has_no_inodes(path)


def _has_no_inodes(path: Path) -> bool:
    if not hasattr(os, "statvfs"):
        return False
    disk = os.statvfs(_existing(path))
    return disk.f_files > 0 and disk.f_favail == 0
