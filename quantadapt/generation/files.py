"""Files of prompts become files of answers, which can be gone on with after an interruption."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.files import Row, kind_of
from ..data.formats import text_in
from ..data.pictures import COLUMNS, pictures_in, placed
from ..data.sources import read_source
from ..errors import DataError
from ..folders.lines import Lines, lines_file
from .answers import Answer
from .prompts import Turns

ANSWER = "answer"
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
    for row in rows:
        if ANSWER in row.values:
            what = f"there is a column {ANSWER!r} already, which would be written over"
            raise DataError(what, fix="rename it", where=row.where)
    return [(row, asked_in(row)) for row in rows]


def asked_in(row: Row) -> str | Turns:
    """Return what a row asks. Raises DataError where it has no columns that are known."""
    values = row.values
    for name in ("messages", "prompt"):
        if isinstance(turns := values.get(name), list):
            pictures = [one for column in COLUMNS for one in pictures_in(values.get(column))]
            root = Path(row.file).parent
            return _open([*placed(turns, pictures, root=root, where=row.where)], name, row.where)
    for column in ("prompt", "text"):
        if column in values:
            return text_in(row, column)
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


@dataclass(frozen=True)
class AnswerFile:
    """An answers file in the making."""

    _lines: Lines

    @property
    def done(self) -> int:
        """How many rows it has."""
        return self._lines.done

    def add(self, row: Row, answer: Answer) -> None:
        """Write a row with its answer."""
        more = {ANSWER: answer.text, "answer_tokens": answer.tokens, "finish": answer.finish}
        # The bytes of pictures are no JSON, and in the file that was read.
        kept = {k: v for k, v in row.values.items() if not (k in COLUMNS and _holds_bytes(v))}
        self._lines.add({**kept, **more})


def _holds_bytes(value: Any) -> bool:
    return any(
        isinstance(one.get("bytes") if isinstance(one, dict) else one, bytes)
        for one in pictures_in(value)
    )


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
        OutputError: it is there already, or was begun with something else.
    """
    made_with = {**made_with, "prompts": checksum([row.values for row in rows])}
    with lines_file(path, made_with, len(rows), what="answers", overwrite=overwrite) as lines:
        yield AnswerFile(lines)


def checksum(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return by what rows are known again."""
    text = json.dumps(rows, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()
