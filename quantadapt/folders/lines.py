"""JSON lines that are made one by one, and gone on with after an interruption.

They are written to `NAME.partial` as they are made; its first line says what with. The file gets
its name when all are there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import IO, Any

from ..errors import OutputError, Problem
from .atomic import in_words, locked, refuse_unwritable, write_atomic

_HEAD = b'{"made_with": '
"""How the first line of a `.partial` begins."""


@dataclass
class Lines:
    """A file of lines in the making.

    Attributes:
        done: how many there are.
    """

    done: int
    _file: IO[str]

    def add(self, values: Mapping[str, Any]) -> None:
        """Write a line."""
        self._file.write(f"{json.dumps(values, ensure_ascii=False, default=str)}\n")
        self._file.flush()
        self.done += 1


@contextmanager
def lines_file(
    path: Path, made_with: Mapping[str, Any], count: int, *, what: str, overwrite: bool = False
) -> Iterator[Lines]:
    """Yield the file to write `count` lines into; it gets its name if the body ends well.

    What an interrupted call that made them with the same has written is gone on with.

    Args:
        made_with: what the lines depend on.
        what: what they are, e.g. "answers".
        overwrite: replace an earlier file, or begin anew what was begun with something else.

    Raises:
        OutputError: it is there already, or was begun with something else, or by somebody else.
    """
    partial = _partial(path)
    head = json.dumps({"made_with": made_with}, sort_keys=True, default=str)
    with locked(path), in_words(path):
        if path.exists() and not overwrite:
            fix = "choose another name, or pass --overwrite"
            raise OutputError("the file is there already", fix=fix, where=str(path))
        begun = _begun(partial, head, what, overwrite)
        with partial.open("r+" if begun else "w", encoding="utf-8", newline="\n") as file:
            if begun:
                file.truncate(sum(map(len, begun)))  # half a line may follow
                file.seek(0, os.SEEK_END)
            else:
                file.write(f"{head}\n")
            lines = Lines(max(len(begun) - 1, 0), file)
            yield lines
        if lines.done != count:
            told = f"there are {lines.done} of {count} {what}"
            raise OutputError(told, fix="give the command again", where=str(partial))
        _finish(partial, path)


def problems_of(path: Path, reads: str | None, *, overwrite: bool = False) -> list[Problem]:
    """Return what keeps `path` from becoming lines that are made of the file `reads`, as far as
    that shows before anything is made."""
    taken, found = os.path.lexists(path), list[Problem]()
    if path.is_dir():
        found.append(Problem("a folder is in the way", "choose another name", str(path)))
    elif taken and not overwrite:
        fix = "choose another name, or pass --overwrite"
        found.append(Problem("the file is there already", fix, str(path)))
    read = Path(reads or "").expanduser()
    for ours in (path, _partial(path)):
        if reads and os.path.exists(ours) and os.path.exists(read) and ours.samefile(read):
            found.append(Problem("it is the file of prompts", "choose another name", str(ours)))
    try:
        refuse_unwritable(path.parent if taken else path)
        _lines_of(_partial(path))
    except OutputError as error:
        found += error.problems
    return found


def lines_in(path: Path) -> list[dict[str, Any]]:
    """Return what was written to `path` so far, whole or not."""
    if path.exists():
        return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    whole = takewhile(_is_whole, _lines_of(_partial(path))[1:])
    return [json.loads(line) for line in whole]


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _begun(partial: Path, head: str, what: str, overwrite: bool) -> list[bytes]:
    """Return the whole lines that an interrupted call wrote with the same."""
    lines = _lines_of(partial)
    if lines[:1] == [f"{head}\n".encode()]:
        return [lines[0], *takewhile(_is_whole, lines[1:])]
    if lines and not overwrite:
        told = f"{what} were begun with another model, other prompts or other options"
        fix = "go on with those, remove the file, or pass --overwrite"
        raise OutputError(told, fix=fix, where=str(partial))
    return []


def _lines_of(partial: Path) -> list[bytes]:
    """Return the whole lines of a file that was begun here; of one that is not there, none.

    Raises:
        OutputError: what lies there was not written here, and is not written over.
    """
    if not os.path.lexists(partial):
        return []
    begun = partial.read_bytes() if partial.is_file() else b"?"
    head, end, _ = begun.partition(b"\n")
    if _is_head(head) if end else head[: len(_HEAD)] == _HEAD[: len(head)]:
        return [line + b"\n" for line in begun.split(b"\n")[:-1]]
    what = "lines are written there as they are made, and something else is there"
    raise OutputError(what, fix="move it away, or choose another name", where=str(partial))


def _is_head(line: bytes) -> bool:
    return line.startswith(_HEAD) and _is_whole(line)


def _is_whole(line: bytes) -> bool:
    """Say whether a line is one; after a power failure it need not be."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _finish(partial: Path, path: Path) -> None:
    """Write all but the first line of `partial` under the name of `path`."""
    write_atomic(path, partial.read_bytes().partition(b"\n")[2])
    partial.unlink()
