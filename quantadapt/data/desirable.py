"""Answers with a label, whether they are desirable, as for KTO.

The columns are TRL's: `prompt`, `completion` and `label`, texts or lists of turns; other formats of
prompts and answers do as well. A pair of a chosen and a rejected answer is one of each kind.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import DataError
from ..spec import DataSpec
from .files import Row, kind_of
from .formats import Example, examples, listed
from .looking import Shown, first_shown
from .mistakes import all_told, each_done
from .preferences import (
    CHOSEN,
    holds_pairs,
    pairs,
    tokenized_answers,
    with_bundled,
)
from .report import DataReport
from .sets import Data, HeldOut, none_left, prompts_of, read_both, warn_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

ANSWER, MISMATCHED = CHOSEN, ("mismatched_ids", "mismatched_mask")
"""Columns of an answer after its prompt, and of that prompt with the answer to another one: token
ids, and 1 where they are of the answer."""
DESIRABLE = "desirable"
"""The column that says whether the answer is desirable, 0 or 1."""
_LABEL = "label"
_WORDS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


@dataclass(frozen=True)
class Judged:
    """An answer with its prompt, and whether it is desirable."""

    answer: Example
    desirable: bool
    unfit: ClassVar[str] = ""
    remark: ClassVar[str] = ""

    @property
    def answers(self) -> tuple[Example, ...]:
        """The one that it is."""
        return (self.answer,)

    @property
    def where(self) -> str:
        """Its file and line."""
        return self.answer.where

    @property
    def file(self) -> str:
        """The file, or the hub id and split."""
        return self.answer.file


def load_desirable(spec: DataSpec, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Data:
    """Read, split and tokenize the answers that `spec` names, those of the bundled pairs if it
    names nothing. Held out, cut and dropped is as with `load_data`.

    Returns:
        Data sets with the columns `ANSWER`, `MISMATCHED` and `DESIRABLE`.

    Raises:
        DataError: the data cannot be read or used, or all answers have one label.
    """
    spec, report = with_bundled(spec), DataReport(spec.max_length)
    train, held_out = read_both(spec, report, judged, seed)
    if len(kinds := {one.desirable for one in train}) == 1:
        what = f"all answers to learn from are {'' if kinds == {True} else 'un'}desirable"
        fix = "add some of the other kind: there is nothing to tell apart"
        raise DataError(what, fix=fix, where=spec.path or "data")
    made = partial(_tokenized, tokenizer=tokenizer, report=report)
    train_set, eval_set = each_done([lambda: made(train), lambda: made(held_out, held_out=True)])
    warn_of(report, "kto")
    asked = prompts_of([one.answer for one in held_out if one.desirable], tokenizer)
    return Data(train_set, eval_set, asked, report.files[0].format, report)


def look_at_answers(
    spec: DataSpec, tokenizer: PreTrainedTokenizerBase, limit: int
) -> tuple[list[Shown], DataReport]:
    """Return the first answers that are used, and the report. Raises DataError."""

    def show(
        rows: Iterable[Row], spec: DataSpec, report: DataReport, held_out: bool
    ) -> Iterator[list[Shown]]:
        found = islice(judged(rows, spec, report), spec.max_examples)
        for one, (text,) in tokenized_answers(found, report, tokenizer, held_out=held_out):
            title = "desirable" if one.desirable else "undesirable"
            against = not one.desirable
            yield [Shown.up_to(spec.max_length, one.where, *text, title=title, against=against)]

    return first_shown(with_bundled(spec), limit, show)


def holds_desirable(rows: Sequence[Row], columns: Collection[str]) -> bool:
    """Say whether the first row is an answer with a label."""
    there = {*columns, *(rows[0].values if rows else ())}
    return {"prompt", "completion", _LABEL} <= there


def held_out_desirable(
    rows: Sequence[Row], spec: DataSpec, tokenizer: PreTrainedTokenizerBase
) -> HeldOut:
    """Return all answers in rows, to measure on. Raises DataError."""
    report = DataReport(spec.max_length)
    found = [*all_told(rows, lambda some, counts: judged(some, spec, counts), report)]
    made = _tokenized(found, tokenizer, report, held_out=True)
    warn_of(report, "kto")
    return HeldOut(made, prompts_of([one.answer for one in found], tokenizer))


# From rows to answers -----------------------------------------------------------------------------


def judged(rows: Iterable[Row], spec: DataSpec, report: DataReport) -> Iterator[Judged]:
    """Yield the answers in rows, file by file, and count rows in `report`.

    Raises:
        DataError: columns are missing, or hold something else.
    """
    for _, group in groupby(rows, key=lambda row: row.file):
        ours = [*group]
        if holds_pairs(ours, spec.columns):
            for pair in pairs(ours, spec, report):
                yield Judged(pair.chosen, True)
                yield Judged(pair.rejected, False)
        else:
            yield from _labelled(ours, spec, report)


def _labelled(rows: Sequence[Row], spec: DataSpec, report: DataReport) -> Iterator[Judged]:
    columns = {str(ours): theirs for ours, theirs in spec.columns.items()}
    name = columns.pop(_LABEL, _LABEL)
    labels = {row.where: _label(row, name) for row in rows}
    rest = [replace(row, values={k: v for k, v in row.values.items() if k != name}) for row in rows]
    others: Any = columns
    for example in examples(rest, spec.model_copy(update={"columns": others}), report):
        yield Judged(_last_answer(example), labels[example.where])


def _label(row: Row, name: str) -> bool:
    if name not in row.values:
        what = f"no column {name!r}, found {listed(row.values)}"
        fix = "say of each answer whether it is desirable, label: true or false; or give pairs,"
        fix += " columns chosen and rejected; name your columns in data.columns"
        raise DataError(what, fix=fix, where=row.where)
    value = row.values[name]
    known = isinstance(value, bool | int | float | str) and value == value
    if known and (found := _WORDS.get(str(value).strip().lower())) is not None:
        return found
    what = f"{name!r} is {repr(value)[:40] if known else kind_of(value)}, neither true nor false"
    fix = "write true or false, or 1 or 0, or leave the row out"
    raise DataError(what, fix=fix, where=row.where)


def _last_answer(example: Example) -> Example:
    """Return an example of which only the last answer counts: it is what was judged."""
    if example.shape != "messages" or not isinstance(turns := example.values["messages"], list):
        return example
    given = [{**t, "weight": 0} if isinstance(t, dict) else t for t in turns[:-1]]
    return replace(example, values={**example.values, "messages": [*given, *turns[-1:]]})


# From answers to tokens ---------------------------------------------------------------------------


def _tokenized(
    found: Sequence[Judged],
    tokenizer: PreTrainedTokenizerBase,
    report: DataReport,
    *,
    held_out: bool = False,
) -> Dataset:
    """Return a data set of the answers that are used. Raises DataError where none is left."""
    import datasets

    read = partial(tokenized_answers, tokenizer=tokenizer, held_out=held_out)
    used = [*all_told(found, read, report)]
    if not used:
        fix = "raise data.max_length, shorten the prompts, or fill the empty completions"
        where = found[0].where if found else ""
        raise none_left("answer", fix, report, where, held_out=held_out)
    parts = [_parted(*tokens) for _, (tokens,) in used]
    columns: dict[str, list[Any]] = {name: [] for name in (*ANSWER, *MISMATCHED)}
    others = _others(parts, [one.desirable for one, _ in used])
    for (prompt, answer), other in zip(parts, others, strict=True):
        for (ids, mask), text in ((ANSWER, answer), (MISMATCHED, other)):
            columns[ids].append([*prompt, *text][: report.max_length])
            columns[mask].append(([0] * len(prompt) + [1] * len(text))[: report.max_length])
    columns[DESIRABLE] = [int(one.desirable) for one, _ in used]
    return datasets.Dataset.from_dict(columns)


_Parts = tuple[list[int], list[int]]


def _parted(ids: list[int], mask: list[int]) -> _Parts:
    """Return the tokens of the prompt and those of the answer."""
    start = mask.index(1)
    return ids[:start], ids[start:]


def _others(parts: Sequence[_Parts], desirable: Sequence[bool]) -> list[list[int]]:
    """Return for each prompt the answer to another one: that before it among those of its kind, the
    last for the first, as TRL has it. Where all prompts are the same, it is another answer."""
    order = sorted(range(len(parts)), key=lambda place: not desirable[place])
    prompts = [parts[place][0] for place in order]
    differs = (at for at in range(-1, -len(order), -1) if prompts[at] != prompts[0])
    found, other = [list[int]() for _ in parts], order[next(differs, -1)]
    alike = all(prompt == prompts[0] for prompt in prompts)
    for at, place in enumerate(order):
        if at and (alike or prompts[at] != prompts[at - 1]):
            other = order[at - 1]
        found[place] = parts[other][1]
    return found
