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

from ..errors import OutputError, Problem, QuantadaptError
from ..inputs.documents import parsed, reason
from .atomic import in_words, locked, refuse_unwritable, write_atomic

_TEXT: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace", "newline": "\n"}
"""Half a pair of surrogates becomes an escape, as JSON has it."""
_OTHER = "put it back as it was, or name another"
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
        if os.path.lexists(path) and not overwrite:
            fix = "choose another name, or pass --overwrite"
            raise OutputError("the file is there already", fix=fix, where=str(path))
        begun = _begun(partial, head, what, overwrite)
        with partial.open("r+" if begun else "w", **_TEXT) as file:
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
    """Return what was written to `path` so far, whole or not.

    Raises:
        OutputError: there is something else.
    """
    if os.path.lexists(path):
        lines = [line for line in lines_of(path, OutputError) if line]
        return [_object(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]
    return [parsed(line) for line in takewhile(_is_whole, _lines_of(_partial(path))[1:])]


def lines_of(path: Path, error: type[QuantadaptError]) -> list[bytes]:
    """Return the lines of a file; the last one is half, or empty. Raises `error` where there is no
    file that can be read."""
    if not path.is_file():  # reading a pipe may never end
        raise error("it is no file", fix=_OTHER, where=str(path))
    try:
        return path.read_bytes().split(b"\n")
    except OSError as failure:
        raise error(f"cannot read it: {reason(failure)}", fix=_OTHER, where=str(path)) from None


def _object(line: bytes, where: str) -> dict[str, Any]:
    if not _is_whole(line):
        raise OutputError("it is no JSON object", fix=_OTHER, where=where)
    found: dict[str, Any] = parsed(line)
    return found


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
    is_ours = partial.is_file() and not partial.is_symlink()  # which might lead anywhere
    begun = partial.read_bytes() if is_ours else b"?"
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
        return isinstance(parsed(line), dict)
    except ValueError:
        return False


def _finish(partial: Path, path: Path) -> None:
    """Write all but the first line of `partial` under the name of `path`."""
    write_atomic(path, partial.read_bytes().partition(b"\n")[2])
    partial.unlink()
