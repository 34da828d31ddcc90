"""The list of what we wrote into a folder, which lies in it. Nothing else there is ever deleted.

Of a checkpoint the list has checksums, too, so that damage shows before anything is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..inputs.documents import parsed

LIST = "quantadapt-files.json"

Names = Mapping[str, Any]
"""Pattern of a name -> Names, of what may lie in a folder of such a name besides its own list."""

LOCK = "quantadapt-lock"

_LEFTOVER = re.compile(
    rf"\.(?P<name>.+)\.([0-9a-f]{{8}}\.(?P<kind>tmp|old)|{LOCK}(\.\d+)?)|\.{LOCK}"
)


def write_list(
    folder: Path, *, checksums: bool = False, known: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """List the files below `folder` in it, with sizes in bytes; its last file.

    Args:
        checksums: note what is in them, too, and when they were written.
        known: what is known of some, which are not read.
    """
    listed: dict[str, dict[str, Any]] = {}
    for name in _files(folder):
        file = folder / name
        if known and name in known:
            listed[name] = dict(known[name])
            continue
        facts = file.lstat()
        listed[name] = {"size": facts.st_size}
        if checksums:
            listed[name] |= {"sha256": _checksum(file), "mtime_ns": facts.st_mtime_ns}
    text = json.dumps({"files": listed}, indent=1, ensure_ascii=False) + "\n"
    (folder / LIST).write_bytes(text.encode("utf-8", "surrogateescape"))


def read_list(folder: Path) -> dict[str, dict[str, Any]] | None:
    """Return the files that we wrote into `folder`, with what is known of each; None without a
    list that can be read."""
    try:
        text = (folder / LIST).read_bytes().decode("utf-8", "surrogateescape")
        files = parsed(text)["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    whole = isinstance(files, dict) and all(isinstance(facts, dict) for facts in files.values())
    return files if whole else None


def damage(folder: Path) -> str:
    """Say in words how the files of `folder` differ from its list with checksums, or ""."""
    listed = read_list(folder)
    if not listed:
        return f"{LIST} is missing or unreadable"
    for name, facts in listed.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if "sha256" not in facts:
            return f"{LIST} has no checksum of {name}"
        try:
            same = file.stat().st_size == facts.get("size") and _checksum(file) == facts["sha256"]
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if not same:
            return f"{name} is not what was written"
    return ""


def first_changed(folder: Path, listed: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the first file of `folder` that is not as a list says, which may be one of sizes
    alone; empty if all are. Raises FileNotFoundError where one is not there."""
    for name, facts in listed.items():
        file = folder / name
        if file.stat().st_size != facts.get("size"):
            return name
        if "sha256" in facts and _checksum(file) != facts["sha256"]:
            return name
    return ""


def altered(folder: Path, listed: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return which files of `folder` are not as a list says, or not there. What has the size and
    the time that were noted is taken to be as it was. What has another time is read, and given the
    noted one where its checksum is right, so that nobody reads it for that again."""
    found = []
    for name, facts in listed.items():
        try:
            now = (folder / name).stat()
            read = "sha256" in facts and now.st_mtime_ns != facts.get("mtime_ns")
            if now.st_size != facts.get("size") or (
                read and _checksum(folder / name) != facts["sha256"]
            ):
                found.append(name)
                continue
        except OSError:
            found.append(name)
            continue
        if read:
            with suppress(OSError, KeyError, TypeError, OverflowError):
                os.utime(folder / name, ns=(now.st_atime_ns, facts["mtime_ns"]))
    return found


def not_ours(folder: Path, names: Names | None = None) -> list[str]:
    """Return the files below `folder` that we did not write, or that were changed since.

    Args:
        names: what else is ours. A folder named there is looked at by its own list.
    """
    listed, found = read_list(folder) or {}, list[str]()
    for entry in sorted(folder.iterdir()):
        name, inner = entry.name, _match(entry.name, names or {})
        if is_leftover(name) or name == LIST:
            continue
        if entry.is_dir() and not entry.is_symlink() and inner is not None:
            found += [f"{name}/{file}" for file in not_ours(entry, inner)]
        elif inner is None:
            is_folder = entry.is_dir() and not entry.is_symlink()
            files = [f"{name}/{file}" for file in _files(entry)] if is_folder else [name]
            found += [file for file in files if not _is_as(listed, folder, file)]
    return found


def is_leftover(name: str) -> bool:
    """Say whether a file or folder of this name is a lock, or was being written or replaced when a
    process died."""
    return _LEFTOVER.fullmatch(name) is not None


def leftovers(folder: Path) -> Iterator[tuple[str, str, Path]]:
    """Yield (name that it was for, "tmp", "old" or "", path) of what lies in `folder` only while
    somebody writes, or because they died."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return
    for entry in entries:
        match = _LEFTOVER.fullmatch(entry.name)
        if match and match["name"]:
            yield match["name"], match["kind"] or "", entry


def _is_as(listed: Mapping[str, Mapping[str, Any]], folder: Path, file: str) -> bool:
    return file in listed and listed[file].get("size") == (folder / file).lstat().st_size


def _match(name: str, names: Names) -> Names | None:
    return next((inner for pattern, inner in names.items() if fnmatchcase(name, pattern)), None)


def _files(folder: Path) -> Iterator[str]:
    """Yield the files and links below `folder`, by their names from there, with slashes."""
    for root, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        for name in sorted([*names, *links]):
            path = Path(root, name).relative_to(folder).as_posix()
            if path != LIST:
                yield path
        folders.sort()


def _checksum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
