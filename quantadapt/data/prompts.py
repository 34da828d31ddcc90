"""Prompts that a model is to answer by itself, and what reward functions are told beside.

The column is TRL's `prompt`, a text or a list of turns. Other formats, with answers, do as well:
the model is asked what they ask, and the answer is the `reference`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..errors import DataError
from ..spec import DataSpec
from .chats import open_chat
from .files import FORMATS, Row, kind_of
from .formats import Example, chat, checked_text, examples, named, pair
from .looking import Shown, first_shown
from .mistakes import all_told, each_done
from .report import DataReport
from .segments import segments
from .sets import Data, HeldOut, none_left, read_both, warn_of
from .tokens import Prompt, encode_prompt, tokenize

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

PROMPT_IDS, ROW = "prompt_ids", "row"
"""Columns of a data set of prompts: token ids, and what else is known, as JSON."""
FORMAT = "prompt"
REFERENCE = "reference"
_TOLD = 200
"""Characters that are shown of what reward functions get."""
_RESERVED = ("prompt", "prompts", "completion", "completions", "completion_ids", "messages")
"""Columns that reward functions do not get under their names, as TRL has it."""


@dataclass(frozen=True)
class Asked:
    """A prompt.

    Attributes:
        ids: its tokens.
        prompt: a text, or the turns of a chat.
        columns: what reward functions get beside it, by name.
    """

    ids: list[int]
    prompt: Any
    columns: Mapping[str, Any]

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Asked:
        """Return that of a row of a data set."""
        known = json.loads(row[ROW])
        return cls(list(row[PROMPT_IDS]), known["prompt"], known["columns"])


@dataclass(frozen=True)
class _Question:
    """A prompt before it is tokenized; `example` has its answer, too, where there is one."""

    prompt: Any
    columns: Mapping[str, Any]
    where: str
    example: Example | None = None

    @property
    def file(self) -> str:
        """The file, or the hub id and split."""
        return self.where.rpartition(":")[0]


def load_prompts(spec: DataSpec, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Data:
    """Read, split and tokenize the prompts that `spec` names, those of the demo if it names
    nothing. Prompts longer than `max_length` are dropped.

    Returns:
        Data sets with the columns `PROMPT_IDS`, `ROW`, `input_ids` and `completion_mask`: with the
        answer in the data where there is one, else of the prompt.

    Raises:
        DataError: the data cannot be read or used.
    """
    report = DataReport(spec.max_length)
    train, held_out = read_both(spec, report, questions, seed)
    made = partial(_tokenized, tokenizer=tokenizer, report=report)
    (train_set, _), (eval_set, prompts) = each_done(
        [lambda: made(train), lambda: made(held_out, held_out=True)]
    )
    warn_of(report, "grpo")
    return Data(train_set, eval_set, prompts, report.files[0].format, report)


def holds_prompts(rows: Sequence[Row], columns: Mapping[Any, str]) -> bool:
    """Say whether the first row holds a prompt and nothing that the other formats know."""
    values = rows[0].values if rows else {}
    there, prompt = {*columns, *values}, values.get(columns.get("prompt", "prompt"))
    known = any(there.issuperset(names) for names in FORMATS.values())
    return isinstance(prompt, str | list) and not known


def held_out_prompts(
    rows: Sequence[Row], spec: DataSpec, tokenizer: PreTrainedTokenizerBase
) -> HeldOut:
    """Return all prompts in rows, to measure answers to them; without an answer in the data no
    token is to be predicted. Raises DataError."""
    report = DataReport(spec.max_length)
    found = [*all_told(rows, lambda some, counts: questions(some, spec, counts), report)]
    made, prompts = _tokenized(found, tokenizer, report, held_out=True, predicted=0)
    warn_of(report, "grpo")
    return HeldOut(made, prompts)


def look_at_prompts(
    spec: DataSpec, tokenizer: PreTrainedTokenizerBase, limit: int
) -> tuple[list[Shown], DataReport]:
    """Return the first prompts that are used, with what reward functions get beside each, and the
    report. Raises DataError."""

    def show(
        rows: Iterable[Row], spec: DataSpec, report: DataReport, held_out: bool
    ) -> Iterator[list[Shown]]:
        found = islice(questions(rows, spec, report), spec.max_examples)
        for one, asked in _asked(found, report, tokenizer, held_out=held_out):
            told = json.dumps(dict(one.columns), default=str, ensure_ascii=False)
            told = told if len(told) <= _TOLD else f"{told[:_TOLD]}…"
            note = f"reward functions get {told}" if one.columns else ""
            yield [Shown(one.where, asked.ids, [0] * len(asked.ids), 0, "prompt", note=note)]

    return first_shown(spec, limit, show)


def questions(rows: Iterable[Row], spec: DataSpec, report: DataReport) -> Iterator[_Question]:
    """Yield the prompts in rows, file by file, and count rows in `report`.

    Raises:
        DataError: columns are missing, or hold something else.
    """
    for file, group in groupby(rows, key=lambda row: row.file):
        ours = [*group]
        columns = {str(k): v for k, v in spec.columns.items()}
        first = ours[0].values
        has = {*first, *columns}
        if "prompt" not in has or spec.format != "auto":
            yield from map(_of_example, examples(ours, spec, report))
            continue
        found = report.of(file)
        found.format = FORMAT
        for row in named(ours, columns, found):
            yield _question(row)


def _question(row: Row) -> _Question:
    """Return what the column `prompt` asks; a `completion` beside it is the reference."""
    prompt, columns = _prompt(row), _columns(row.values)
    completion = row.values.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        example = pair(row, prompt, checked_text(completion, "'completion'", row.where))
        return _Question(prompt, {REFERENCE: completion, **columns}, row.where, example)
    if isinstance(prompt, list) and isinstance(completion, list):
        example = chat(row, prompt, completion)
        last = completion[-1] if completion else None
        said = last.get("content") if isinstance(last, Mapping) else None
        return _Question(prompt, {REFERENCE: said, **columns}, row.where, example)
    return _Question(prompt, columns, row.where)


def _prompt(row: Row) -> Any:
    prompt = row.values.get("prompt")
    if isinstance(prompt, list):
        return prompt
    if "prompt" not in row.values:
        what = "the column 'prompt' is missing"
        raise DataError(what, fix="every row needs one", where=row.where)
    return checked_text(prompt, "'prompt'", row.where)


def _columns(values: Mapping[str, Any]) -> dict[str, Any]:
    return {str(name): value for name, value in values.items() if name not in _RESERVED}


def _of_example(example: Example) -> _Question:
    values = example.values
    if example.shape == "text":
        what = "plain text asks nothing"
        fix = "use data with prompts: a column prompt, and whatever the reward functions need"
        raise DataError(what, fix=fix, where=example.where)
    if example.shape == "prompt-completion":
        prompt, reference = values["prompt"], values["completion"]
    else:
        prompt, reference = _turns(example)
    columns = {REFERENCE: reference, **_columns(values)}
    if columns.get("tools", "") is None:  # a chat without any has it, too
        del columns["tools"]
    return _Question(prompt, columns, example.where, example)


def _turns(example: Example) -> tuple[Any, Any]:
    """Return the turns before the last answer, and that."""
    turns = example.values["messages"]
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        what = f"'messages' is {kind_of(turns)}, no list of turns"
        raise DataError(what, fix='write [{"role": "user", "content": "..."}]', where=example.where)
    bare = [{k: v for k, v in turn.items() if k != "weight"} for turn in turns]
    if bare and bare[-1].get("role") == "assistant":
        return bare[:-1], bare[-1].get("content")
    return bare, None


def _tokenized(
    found: Sequence[_Question],
    tokenizer: PreTrainedTokenizerBase,
    report: DataReport,
    *,
    held_out: bool = False,
    predicted: Literal[0, 1] = 1,
) -> tuple[Dataset, list[Prompt]]:
    """Return a data set of the prompts that are used. Raises DataError where none is left.

    Args:
        predicted: whether the tokens of a prompt without an answer count where perplexity is
            measured.
    """
    import datasets

    columns: dict[str, list[Any]] = {
        name: [] for name in (PROMPT_IDS, ROW, "input_ids", "completion_mask")
    }
    prompts = []
    limit = report.max_length
    read = partial(_asked, tokenizer=tokenizer, held_out=held_out, predicted=predicted)
    for one, asked in all_told(found, read, report):
        row = json.dumps({"prompt": one.prompt, "columns": dict(one.columns)}, default=str)
        values = (asked.ids, row, asked.whole[:limit], asked.mask[:limit])
        for name, value in zip(columns, values, strict=True):
            columns[name].append(value)
        prompts.append(asked.written)
    if not columns[ROW]:
        fix = "raise data.max_length, or shorten the prompts"
        where = found[0].where if found else "data"
        raise none_left("prompt", fix, report, where, held_out=held_out)
    return datasets.Dataset.from_dict(columns), prompts


class _Tokens(NamedTuple):
    """A prompt as the model reads it and its tokens; and those with the answer in the data."""

    written: Prompt
    ids: list[int]
    whole: list[int]
    mask: list[int]


def _asked(
    found: Iterable[_Question],
    report: DataReport,
    tokenizer: PreTrainedTokenizerBase,
    *,
    held_out: bool,
    predicted: Literal[0, 1] = 1,
) -> Iterator[tuple[_Question, _Tokens]]:
    """Yield the prompts that are used, and count what is kept and dropped."""
    limit = report.max_length
    for one in found:
        counts, written = report.of(one.file), _written(one, tokenizer)
        ids = encode_prompt(tokenizer, written) if written.text.strip() else []
        if not ids or len(ids) > limit:
            why = f"with prompts of more than {limit} tokens" if ids else "with an empty prompt"
            counts.dropped[why] += 1
            continue
        counts.keep([0] * len(ids), max_length=limit, held_out=held_out)
        yield one, _Tokens(written, ids, *_whole(one, ids, tokenizer, predicted))


def _written(one: _Question, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Return the prompt as the model reads it."""
    reference = one.columns.get(REFERENCE)
    reference = reference if isinstance(reference, str) else ""
    if isinstance(one.prompt, str):
        return Prompt(one.prompt, reference)
    try:
        return replace(open_chat(one.prompt, tokenizer), reference=reference)
    except DataError as error:
        problem = error.problems[0]
        raise DataError(problem.what, fix=problem.fix, where=one.where) from None


def _whole(
    one: _Question, ids: list[int], tokenizer: PreTrainedTokenizerBase, predicted: Literal[0, 1]
) -> tuple[list[int], list[int]]:
    """Return tokens and mask of the prompt with the answer in the data, or of the prompt alone,
    then with `predicted` as its mask."""
    texts = [] if one.example is None else segments(one.example, tokenizer).texts
    for tokens, mask in tokenize(texts[-1:], tokenizer):
        if any(mask[1:]):
            return tokens, mask
    return ids, [predicted] * len(ids)
