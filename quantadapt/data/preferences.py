"""Preference data: a prompt, an answer that was chosen, and one that was rejected.

The columns are TRL's: `prompt`, `chosen` and `rejected`, texts or lists of turns; without `prompt`
it is what both answers begin with. Each answer is written and tokenized as an answer that is to be
learnt, so that a pair is two examples of one prompt.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby, islice, takewhile
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ..errors import DataError
from ..spec import DataSpec
from .files import Row, kind_of
from .formats import Example, chat, checked_text, listed, named, pair, telling_unused
from .looking import Shown, first_shown
from .mistakes import all_told, each_done
from .report import DataReport
from .segments import segments
from .sets import Data, HeldOut, none_left, prompts_of, read_both, warn_of
from .tokens import tokenize

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

CHOSEN, REJECTED = ("input_ids", "completion_mask"), ("rejected_ids", "rejected_mask")
"""The columns of a data set of pairs: token ids, and 1 where they are of the answer."""
FORMAT = "preference"
_COLUMNS = ("chosen", "rejected")
_OPTIONAL = ("prompt", "tools")
_BATCH = 1000


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, each with that prompt.

    Attributes:
        unfit: why nothing can be learnt of it; empty where something may be.
        remark: what else is to be known about it.
    """

    chosen: Example
    rejected: Example
    unfit: str = ""
    remark: str = ""

    @property
    def answers(self) -> tuple[Example, ...]:
        """Both."""
        return self.chosen, self.rejected

    @property
    def where(self) -> str:
        """Its file and line."""
        return self.chosen.where

    @property
    def file(self) -> str:
        """The file, or the hub id and split."""
        return self.chosen.file


def load_preferences(spec: DataSpec, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Data:
    """Read, split and tokenize the pairs that `spec` names, the bundled ones if it names nothing.

    Held out, cut and dropped is as with `load_data`; a pair goes as a whole.

    Returns:
        Data sets with the columns `CHOSEN` and `REJECTED`.

    Raises:
        DataError: the data cannot be read or used; says where, and what to do.
    """
    spec, report = with_bundled(spec), DataReport(spec.max_length)
    train, held_out = read_both(spec, report, pairs, seed)
    made = partial(tokenized_pairs, tokenizer=tokenizer, report=report)
    train_set, eval_set = each_done([lambda: made(train), lambda: made(held_out, held_out=True)])
    warn_of(report, "dpo")
    prompts = prompts_of([pair.chosen for pair in held_out], tokenizer)
    return Data(train_set, eval_set, prompts, FORMAT, report)


def look_at_pairs(
    spec: DataSpec, tokenizer: PreTrainedTokenizerBase, limit: int
) -> tuple[list[Shown], DataReport]:
    """Return both texts of the first pairs that are used, and the report. Raises DataError."""

    def show(
        rows: Iterable[Row], spec: DataSpec, report: DataReport, held_out: bool
    ) -> Iterator[list[Shown]]:
        found = islice(pairs(rows, spec, report), spec.max_examples)
        for one, (chosen, rejected) in tokenized_answers(
            found, report, tokenizer, held_out=held_out
        ):
            length, where = spec.max_length, one.where
            yield [
                Shown.up_to(length, where, *chosen, title="chosen"),
                Shown.up_to(length, where, *rejected, title="rejected", against=True),
            ]

    return first_shown(with_bundled(spec), limit, show)


def with_bundled(spec: DataSpec) -> DataSpec:
    """Return `spec` with the bundled pairs as its data where it names none."""
    from ..demo import PREFERENCES

    return spec if spec.path else spec.model_copy(update={"path": str(PREFERENCES)})


def holds_pairs(rows: Sequence[Row], columns: Collection[str]) -> bool:
    """Say whether the first row has the columns of a pair, some perhaps under other names; and
    nobody asks for columns of something else."""
    there = {*columns, *(rows[0].values if rows else ())}
    return {*_COLUMNS, *_OPTIONAL}.issuperset(columns) and there.issuperset(_COLUMNS)


def held_out_pairs(
    rows: Sequence[Row], spec: DataSpec, tokenizer: PreTrainedTokenizerBase
) -> HeldOut:
    """Return all pairs in rows, to measure on. Raises DataError."""
    report = DataReport(spec.max_length)
    found = [*all_told(rows, lambda some, counts: pairs(some, spec, counts), report)]
    made = tokenized_pairs(found, tokenizer, report, held_out=True)
    warn_of(report, "dpo")
    return HeldOut(made, prompts_of([pair.chosen for pair in found], tokenizer))


# From rows to pairs -------------------------------------------------------------------------------


def pairs(rows: Iterable[Row], spec: DataSpec, report: DataReport) -> Iterator[Pair]:
    """Yield the pairs in rows, file by file, and count rows in `report`.

    Raises:
        DataError: columns are missing, or hold something else.
    """
    if spec.format != "auto":
        what = f"{spec.format!r} is no format of pairs"
        raise DataError(what, fix="leave it out: pairs have one", where="data.format")
    for file, group in groupby(rows, key=lambda row: row.file):
        found, columns = report.of(file), {str(k): v for k, v in spec.columns.items()}
        ours = named(group, columns, found)
        first = next(ours)
        if missing := [column for column in _COLUMNS if column not in first.values]:
            what = f"no column {listed(missing)}, found {listed(first.values)}"
            fix = "preferences need a chosen and a rejected answer; name your columns in"
            fix += " data.columns, e.g. {chosen: better, rejected: worse}"
            raise DataError(what, fix=fix, where=first.where)
        found.format = FORMAT
        known = {*_COLUMNS, *_OPTIONAL}
        yield from map(_pair, telling_unused(chain([first], ours), known, found))


def _pair(row: Row) -> Pair:
    prompt, answers = row.values.get("prompt"), [_answer(row, column) for column in _COLUMNS]
    kinds = {type(answer) for answer in answers}
    if len(kinds) > 1:
        what = f"'chosen' is {kind_of(answers[0])} and 'rejected' {kind_of(answers[1])}"
        raise DataError(what, fix="write both as text, or both as lists of turns", where=row.where)
    if kinds == {str}:
        if isinstance(prompt, list):
            turns = [[{"role": "assistant", "content": answer}] for answer in answers]
            return Pair(chat(row, prompt, turns[0]), chat(row, prompt, turns[1]))
        remark = ""
        if prompt is None:
            prompt, answers = _common_text(*answers)
            remark = "" if prompt else "pairs have no prompt, as their answers begin differently"
        elif prompt and all(str(answer).startswith(str(prompt)) for answer in answers):
            remark = "pairs repeat the prompt in both answers, so that it stands there twice"
        text = checked_text(prompt, "'prompt'", row.where)
        chosen, rejected = (pair(row, text, answer) for answer in answers)
        return Pair(chosen, rejected, remark=remark)
    if isinstance(prompt, str) and any(_opens(answer, "assistant") for answer in answers):
        prompt = [{"role": "user", "content": prompt}]
    elif not isinstance(prompt, list) or all(a[: len(prompt)] == prompt for a in answers):
        # What stands beside whole chats is what they begin with.
        shared = _common(*answers)
        prompt, answers = answers[0][:shared], [answer[shared:] for answer in answers]
    differ = [answer[_common(*answers) :] for answer in answers]
    unfit = all(differ) and not all(_opens(answer, "assistant") for answer in differ)
    chosen, rejected = (chat(row, prompt, answer) for answer in answers)
    return Pair(chosen, rejected, "with answers to different prompts" if unfit else "")


def _answer(row: Row, column: str) -> Any:
    answer = row.values.get(column)
    if isinstance(answer, list):
        return answer
    if column not in row.values:
        what = f"the column {column!r} is missing, found {listed(row.values)}"
        raise DataError(what, fix="every pair needs both answers", where=row.where)
    return checked_text(answer, repr(column), row.where)


def _opens(turns: Sequence[Any], role: str) -> bool:
    first = turns[0] if turns else None
    return isinstance(first, Mapping) and first.get("role") == role


_ANSWERS = "\n\nAssistant:"
"""What stands before an answer in chats that are one text, as Anthropic's HH-RLHF has them."""


def _common_text(chosen: str, rejected: str) -> tuple[str, list[Any]]:
    """Return what both texts begin with, and what follows. It ends where an answer begins, or after
    a space: half a word has other tokens than the whole."""
    shared = chosen[: _common(chosen, rejected)]
    end = shared.rfind(_ANSWERS) + len(_ANSWERS)
    if _ANSWERS not in shared:
        end = max(shared.rfind(" "), shared.rfind("\n")) + 1
    return shared[:end], [chosen[end:], rejected[end:]]


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return how many elements both begin with."""
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(one, other, strict=False)))


# From pairs to tokens -----------------------------------------------------------------------------


def tokenized_pairs(
    found: Sequence[Pair],
    tokenizer: PreTrainedTokenizerBase,
    report: DataReport,
    *,
    held_out: bool = False,
) -> Dataset:
    """Return a data set of the pairs that are used. Raises DataError where none is left."""
    import datasets

    columns: dict[str, list[list[int]]] = {name: [] for name in (*CHOSEN, *REJECTED)}
    read = partial(tokenized_answers, tokenizer=tokenizer, held_out=held_out)
    for _, both in all_told(found, read, report):
        for name, values in zip(columns, chain(*both), strict=True):
            columns[name].append(values[: report.max_length])
    if not columns[CHOSEN[0]]:
        fix = "give two answers of the assistant to one prompt that differ within data.max_length"
        fix += " tokens: shorten the prompts, raise it, or mend the rows"
        where = found[0].where if found else ""
        raise none_left("pair", fix, report, where, held_out=held_out)
    return datasets.Dataset.from_dict(columns)


class HasAnswers(Protocol):
    """A row with one answer to a prompt, or several that are to differ."""

    @property
    def answers(self) -> tuple[Example, ...]:
        """Each with the prompt."""
        ...

    @property
    def where(self) -> str:
        """Its file and line."""
        ...

    @property
    def file(self) -> str:
        """The file, or the hub id and split."""
        ...

    @property
    def unfit(self) -> str:
        """Why nothing can be learnt of it; empty where something may be."""
        ...

    @property
    def remark(self) -> str:
        """What else is to be known about it."""
        ...


Tokens = tuple[list[int], list[int]]
"""Token ids of a prompt and its answer, and 1 where they are of the answer."""
_Row = TypeVar("_Row", bound=HasAnswers)


def tokenized_answers(
    found: Iterable[_Row], report: DataReport, tokenizer: PreTrainedTokenizerBase, *, held_out: bool
) -> Iterator[tuple[_Row, list[Tokens]]]:
    """Yield each row that is used with all tokens of its answers, and count what is kept, cut and
    dropped."""
    found, limit = iter(found), report.max_length
    while batch := [*islice(found, _BATCH)]:
        written = []
        for one in batch:
            counts = report.of(one.file)
            read = [segments(example, tokenizer) for example in one.answers]
            remarks = [*chain(*(f.remarks for f in read)), *([one.remark] if one.remark else [])]
            counts.remarks.update(dict.fromkeys(remarks, 1))
            why = next((f.dropped for f in read if f.dropped), "") or one.unfit
            if not why and any(len(f.texts) != 1 for f in read):
                why = "of several turns, which the chat template writes in another way later on"
            counts.dropped.update([why] if why else ())
            written += [] if why else [(one, [f.texts[0] for f in read])]
        encoded = tokenize([text for _, texts in written for text in texts], tokenizer)
        for one, texts in written:
            counts, answers = report.of(one.file), [*islice(encoded, len(texts))]
            if why := _useless(answers, limit):
                counts.dropped[why] += 1
                continue
            counts.keep(*(mask for _, mask in answers), max_length=limit, held_out=held_out)
            yield one, answers


def _useless(answers: Sequence[Tokens], limit: int) -> str:
    """Return why nothing can be learnt of answers; empty where something can."""
    if not all(any(mask[1:]) for _, mask in answers):
        return "with an empty answer"
    if not all(any(mask[1:limit]) for _, mask in answers):
        return f"with nothing to learn within {limit} tokens"
    if len(answers) == 1:
        return ""
    if answers[0][0] == answers[1][0]:
        return "with equal answers"
    if answers[0][0][:limit] == answers[1][0][:limit]:
        return f"with answers that are equal within {limit} tokens"
    return ""
