"""Files of prompts become files of answers, which can be gone on with after an interruption.

Answers are written to `NAME.partial` as they are made; its first line says what with. The file gets
its name when all are there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import IO, Any

from ..data.files import Row, kind_of
from ..data.formats import text_in
from ..data.sources import read_source
from ..errors import DataError, OutputError, Problem
from ..folders.atomic import in_words, locked, refuse_unwritable, write_atomic
from .answers import Answer
from .prompts import Turns

ANSWER = "answer"
_HEAD = b'{"answers_to": "'
"""How the first line of a `.partial` begins."""
_COLUMNS = "recognized columns are: prompt; messages; instruction (+ input)"


def read_prompts(source: str) -> list[tuple[Row, str | Turns]]:
    """Return the rows of a data file and what each asks: `prompt` (a text or turns), `messages` (an
    answer at their end is left out), or `instruction` and `input`. Files of text ask with each
    of their examples.

    Raises:
        DataError: no such file, no rows, no such columns, or a row that has no text there.
    """
    train, held_out = read_source(source)
    rows = [*train, *held_out]
    if not rows:
        raise DataError("there is nothing in it", fix="write a prompt a line", where=source)
    return [(row, _asked(row)) for row in rows]


def _asked(row: Row) -> str | Turns:
    values = row.values
    if ANSWER in values:
        what = f"there is a column {ANSWER!r} already, which would be written over"
        raise DataError(what, fix="rename it", where=row.where)
    for name in ("messages", "prompt"):
        if isinstance(turns := values.get(name), list):
            return _open(turns, name, row.where)
    for name in ("prompt", "text"):
        if name in values:
            return text_in(row, name)
    if "instruction" in values:
        given = text_in(row, "input") if values.get("input") else ""
        instruction = text_in(row, "instruction")
        return f"{instruction}\n\n{given}" if given else instruction
    found = ", ".join(map(repr, values)) or "none"
    raise DataError(f"no known columns, found {found}", fix=_COLUMNS, where=row.where)


def _open(turns: list[Any], name: str, where: str) -> Turns:
    for turn in turns:
        if not isinstance(turn, dict):
            fix = 'write {"role": "user", "content": "..."}'
            raise DataError(f"a turn of {name!r} is {kind_of(turn)}", fix=fix, where=where)
    last = turns[-1] if turns else {}
    return turns[:-1] if last.get("role") == "assistant" else turns


def problems_of(path: Path, prompts: str | None, *, overwrite: bool = False) -> list[Problem]:
    """Return what keeps `path` from becoming the answers to the file `prompts`, as far as that
    shows before anything is answered."""
    taken, found = os.path.lexists(path), list[Problem]()
    if path.is_dir():
        found.append(Problem("a folder is in the way", "choose another name", str(path)))
    elif taken and not overwrite:
        fix = "choose another name, or pass --overwrite"
        found.append(Problem("the file is there already", fix, str(path)))
    read = Path(prompts or "").expanduser()
    for ours in (path, _partial(path)):
        if prompts and os.path.exists(ours) and os.path.exists(read) and ours.samefile(read):
            found.append(Problem("it is the file of prompts", "choose another name", str(ours)))
    try:
        refuse_unwritable(path.parent if taken else path)
        _lines_of(_partial(path))
    except OutputError as error:
        found += error.problems
    return found


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


@dataclass
class AnswerFile:
    """An answers file in the making.

    Attributes:
        done: how many rows it has.
    """

    done: int
    _file: IO[str]

    def add(self, row: Row, answer: Answer) -> None:
        """Write a row with its answer."""
        more = {ANSWER: answer.text, "answer_tokens": answer.tokens, "finish": answer.finish}
        line = json.dumps({**row.values, **more}, ensure_ascii=False, default=str)
        self._file.write(f"{line}\n")
        self._file.flush()
        self.done += 1


@contextmanager
def answer_file(
    path: Path, rows: Sequence[Row], made_with: Mapping[str, Any], *, overwrite: bool = False
) -> Iterator[AnswerFile]:
    """Yield the file to write answers to `rows` into; it gets its name if the body ends well.

    What an interrupted call with the same rows and options has written is gone on with.

    Args:
        path: a JSONL file.
        made_with: what the answers depend on: model and options.
        overwrite: replace an earlier file, or begin anew what was begun with something else.

    Raises:
        OutputError: it is there already, or was begun with something else, or by somebody else.
    """
    partial = _partial(path)
    made = {"answers_to": _checksum(rows), "made_with": made_with}
    head = json.dumps(made, sort_keys=True, default=str)
    with locked(path), in_words(path):
        if path.exists() and not overwrite:
            fix = "choose another name, or pass --overwrite"
            raise OutputError("the file is there already", fix=fix, where=str(path))
        begun = _begun(partial, head, overwrite)
        with partial.open("r+" if begun else "w", encoding="utf-8", newline="\n") as file:
            if begun:
                file.truncate(sum(map(len, begun)))  # half a line may follow
                file.seek(0, os.SEEK_END)
            else:
                file.write(f"{head}\n")
            answers = AnswerFile(max(len(begun) - 1, 0), file)
            yield answers
        if answers.done != len(rows):
            what = f"there are {answers.done} answers to {len(rows)} prompts"
            raise OutputError(what, fix="give the command again", where=str(partial))
        _finish(partial, path)


def _begun(partial: Path, head: str, overwrite: bool) -> list[bytes]:
    """Return the whole lines that an interrupted call wrote with the same prompts and options."""
    lines = _lines_of(partial)
    if lines[:1] == [f"{head}\n".encode()]:
        return [lines[0], *takewhile(_is_answer, lines[1:])]
    if lines and not overwrite:
        what = "answers were begun with another model, other prompts or other options"
        fix = "go on with those, remove the file, or pass --overwrite"
        raise OutputError(what, fix=fix, where=str(partial))
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
        return begun.splitlines(keepends=True)[: begun.count(b"\n")]
    what = "answers are written there as they are made, and something else is there"
    raise OutputError(what, fix="move it away, or choose another name", where=str(partial))


def _is_head(line: bytes) -> bool:
    return line.startswith(_HEAD) and _object(line) is not None


def _is_answer(line: bytes) -> bool:
    """Say whether a line is whole; after a power failure it need not be."""
    found = _object(line)
    return found is not None and ANSWER in found


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _finish(partial: Path, path: Path) -> None:
    """Write all but the first line of `partial` under the name of `path`."""
    write_atomic(path, partial.read_bytes().partition(b"\n")[2])
    partial.unlink()


def _checksum(rows: Sequence[Row]) -> str:
    text = json.dumps([row.values for row in rows], sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()
