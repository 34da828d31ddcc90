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
from pathlib import Path
from typing import IO, Any

from ..errors import OutputError
from .atomic import in_words, locked, sync_folder


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
        OutputError: it is there already, or was begun with something else.
    """
    partial = path.with_name(f"{path.name}.partial")
    head = json.dumps(made_with, sort_keys=True, default=str)
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


def lines_in(path: Path) -> list[dict[str, Any]]:
    """Return what was written to `path` so far, whole or not."""
    partial = path.with_name(f"{path.name}.partial")
    if path.exists():
        lines = path.read_bytes().split(b"\n")
    elif partial.exists():
        lines = partial.read_bytes().split(b"\n")[1:]
    else:
        return []
    return [json.loads(line) for line in lines[:-1]]


def _begun(partial: Path, head: str, what: str, overwrite: bool) -> list[bytes]:
    """Return the whole lines that an interrupted call wrote with the same."""
    if not partial.exists():
        return []
    lines = [line + b"\n" for line in partial.read_bytes().split(b"\n")[:-1]]
    if lines and lines[0] == f"{head}\n".encode():
        return lines
    if lines and not overwrite:
        told = f"{what} were begun with another model, other prompts or other options"
        fix = "go on with those, remove the file, or pass --overwrite"
        raise OutputError(told, fix=fix, where=str(partial))
    return []


def _finish(partial: Path, path: Path) -> None:
    """Write all but the first line of `partial` under the name of `path`."""
    whole = path.with_name(f".{path.name}.tmp")
    with partial.open("rb") as source, whole.open("wb") as target:
        source.readline()
        for line in source:
            target.write(line)
        target.flush()
        os.fsync(target.fileno())
    os.replace(whole, path)
    sync_folder(path.parent)
    partial.unlink()
