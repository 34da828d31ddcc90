"""Pairs: what two models answered to the same question."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..data.files import Row
from ..data.formats import text_in
from ..data.sources import read_source
from ..errors import DataError, OptionsError
from ..folders.atomic import write_atomic
from ..folders.metrics import many
from ..generation.files import ANSWER, asked_in, checksum
from ..generation.prompts import Turns

PAIRS = "pairs.jsonl"


@dataclass(frozen=True)
class Pair:
    """Two answers to one question.

    Attributes:
        a, b: what the models are called that gave `answer_a` and `answer_b`.
        reference: what the data say; empty where they say nothing.
    """

    prompt: str
    a: str
    b: str
    answer_a: str
    answer_b: str
    reference: str = ""

    @property
    def id(self) -> str:
        """What votes and verdicts name it by, the same for the same texts."""
        return checksum([asdict(self)])[:16]


@dataclass(frozen=True)
class Answered:
    """What one model was asked, and what it answered.

    Attributes:
        prompts: as text, however they were written for the model.
        references: what the data say, or empty.
    """

    name: str
    prompts: Sequence[str]
    answers: Sequence[str]
    references: Sequence[str] = ()


def as_text(asked: str | Turns) -> str:
    """Return what is asked as people read it."""
    if isinstance(asked, str):
        return asked
    return "\n\n".join(f"{turn.get('role', '?')}: {turn.get('content', '')}" for turn in asked)


def read_answers(source: str) -> Answered:
    """Return an answers file, as `quantadapt generate` writes it.

    Raises:
        DataError: a row has no answer, or does not say what was asked.
    """
    prompts, answers = [], []
    for row in _rows(source):
        if not isinstance(row.values.get(ANSWER), str):
            fix = "give a file that `quantadapt generate --file ... --out FILE` wrote"
            raise DataError(f"it has no text under {ANSWER!r}", fix=fix, where=row.where)
        prompts.append(as_text(asked_in(row)))
        answers.append(row.values[ANSWER])
    return Answered(source, prompts, answers)


def paired(one: Answered, other: Answered) -> list[Pair]:
    """Return the pairs of two models.

    Raises:
        DataError: they were not asked the same, in the same order.
    """
    if len(one.answers) != len(other.answers):
        what = (
            f"{one.name} has {many(len(one.answers), 'answer')}, {other.name} {len(other.answers)}"
        )
        raise DataError(what, fix="let both answer the same questions")
    names = one.name, other.name
    if names[0] == names[1]:
        names = f"{names[0]} (a)", f"{names[1]} (b)"
    references = one.references or other.references or [""] * len(one.answers)
    rows = zip(one.prompts, one.answers, other.answers, references, strict=True)
    a, b = names
    return [Pair(prompt, a, b, mine, theirs, said) for prompt, mine, theirs, said in rows]


def refuse_others(one: Answered, other: Answered) -> None:
    """Raise DataError at the first question that two files of answers do not share."""
    for number, (mine, theirs) in enumerate(zip(one.prompts, other.prompts, strict=False), 1):
        if mine != theirs:
            what = f"{other.name} was asked something else than {one.name}"
            raise DataError(what, fix="let both answer the same file", where=f"answer {number}")


def write_pairs(path: Path, pairs: Iterable[Pair]) -> None:
    """Write pairs, a line each."""
    lines = [json.dumps(asdict(pair), ensure_ascii=False) for pair in pairs]
    write_atomic(path, "".join(f"{line}\n" for line in lines))


def read_pairs(source: str) -> list[Pair]:
    """Return the pairs of a file, or of a folder that `quantadapt judge` wrote.

    Raises:
        OptionsError: there is no such file. DataError: a row is no pair.
    """
    path = Path(source).expanduser()
    path = path / PAIRS if path.is_dir() else path
    if not path.is_file():
        from ..errors import Problem

        what = f"there is no file {path}"
        fix = "give the file or the folder that `quantadapt judge` wrote"
        raise OptionsError([Problem(what, fix)])
    return [_pair(row) for row in _rows(str(path))]


def _pair(row: Row) -> Pair:
    fields = ("prompt", "a", "b", "answer_a", "answer_b")
    if missing := [name for name in fields if name not in row.values]:
        what = f"it is no pair: there is no {' and no '.join(missing)}"
        fix = "give the file that `quantadapt judge` wrote"
        raise DataError(what, fix=fix, where=row.where)
    texts = {name: text_in(row, name) for name in fields}
    reference: Any = row.values.get("reference") or ""
    return Pair(**texts, reference=str(reference))


def _rows(source: str) -> list[Row]:
    train, held_out = read_source(source)
    rows = [*train, *held_out]
    if not rows:
        raise DataError("there is nothing in it", where=source)
    return rows
