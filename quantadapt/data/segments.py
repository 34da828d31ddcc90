"""From rows to text: each becomes segments, of which some are trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from ..spec import DataSpec
from .files import FORMATS, RECOGNIZED, Row, first_line, kind_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Segment:
    """A piece of text, and whether the loss counts on it."""

    text: str
    trained: bool


def format_of(spec: DataSpec, rows: Sequence[Row]) -> str:
    """Return the format to read `rows` in. Raises DataError where no columns are known."""
    if spec.format != "auto":
        return spec.format
    found = rows[0].values
    for name, columns in FORMATS.items():
        if all(column in found for column in columns):
            return name
    names = ", ".join(map(repr, found)) or "none"
    fix = f"rename them; {RECOGNIZED}"
    raise DataError(f"no known columns, found {names}", fix=fix, where=rows[0].where)


def segments(row: Row, name: str, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """Return the text of a row in pieces. `name` is its format.

    Raises:
        DataError: a column is missing or holds no text.
    """
    if name == "text":
        return [Segment(_text(row, "text"), True)]
    if name == "prompt-completion":
        return [Segment(_text(row, "prompt"), False), Segment(_text(row, "completion"), True)]
    if name == "alpaca":
        return [Segment(_alpaca_prompt(row), False), Segment(_text(row, "output"), True)]
    return _chat(_messages(row), tokenizer, row.where)


def _alpaca_prompt(row: Row) -> str:
    instruction = _text(row, "instruction")
    given = _text(row, "input") if row.values.get("input") is not None else ""
    if given:
        return f"### Instruction:\n{instruction}\n\n### Input:\n{given}\n\n### Response:\n"
    return f"### Instruction:\n{instruction}\n\n### Response:\n"


def _text(row: Row, column: str) -> str:
    if column not in row.values:
        found = ", ".join(map(repr, row.values)) or "none"
        fix = "every example needs the same columns; set data.format if they were misread"
        what = f"the column {column!r} is missing, found {found}"
        raise DataError(what, fix=fix, where=row.where)
    return _checked(row.values[column], repr(column), row.where)


def _checked(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        fix = "write text in double quotes, or leave the example out"
        raise DataError(f"{name} is {kind_of(value)}, expected text", fix=fix, where=where)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{name} holds half a surrogate pair", where=where) from None
    return value


def _messages(row: Row) -> list[dict[str, str]]:
    """Return the checked turns of a chat, up to and including the last of the assistant."""
    messages = row.values.get("messages")
    if not isinstance(messages, list) or not messages:
        what = "'messages' is missing or no list of turns"
        fix = 'write [{"role": "user", "content": "..."}, {"role": "assistant", ...}]'
        raise DataError(what, fix=fix, where=row.where)
    turns = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            what = f"turn {number} of 'messages' is {kind_of(message)}, expected an object"
            fix = 'write {"role": "user", "content": "..."}'
            raise DataError(what, fix=fix, where=row.where)
        keys = ("role", "content")
        values = [_checked(message.get(k), f"{k!r} of turn {number}", row.where) for k in keys]
        turns.append(dict(zip(keys, values, strict=True)))
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    if not turns:
        fix = "add a turn with the role 'assistant'; only those are learnt"
        raise DataError("no turn of the assistant", fix=fix, where=row.where)
    return turns


def _chat(
    turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, where: str
) -> list[Segment]:
    if not tokenizer.chat_template:
        return _plain_chat(turns, tokenizer)
    try:
        return _template_chat(turns, tokenizer)
    except Exception as error:  # a template is a program and may raise anything
        what = f"the chat template refuses it: {first_line(error)}"
        fix = "reorder the turns, or use another format"
        raise DataError(what, fix=fix, where=where) from error


def _plain_chat(turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """Lay a chat out as alpaca does; the loss counts on every turn of the assistant."""
    eos = str(tokenizer.eos_token or "")
    heads = {"user": "### Instruction:\n", "assistant": "### Response:\n"}
    result = []
    for index, turn in enumerate(turns):
        result.append(Segment(heads.get(turn["role"], ""), False))
        last = index == len(turns) - 1
        trained = turn["role"] == "assistant"
        end = eos if trained and not last else ""
        result.append(Segment(turn["content"] + end, trained))
        result.append(Segment("" if last else "\n\n", False))
    return _joined(result)


def _template_chat(
    turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase
) -> list[Segment]:
    """Render with the template; the loss counts on what each turn of the assistant adds.

    Some templates render earlier turns differently (they drop reasoning). Turns that are no
    continuation of one another cannot be told apart, and then only the last one counts. Nor is an
    assistant's turn that opens the chat told from its head: it counts only if it is all there is.
    """

    def render(count: int, ask: bool) -> str:
        if not count:
            return ""
        text = tokenizer.apply_chat_template(
            turns[:count], tokenize=False, add_generation_prompt=ask
        )
        return str(text)

    whole = render(len(turns), False)
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if len(turns) > 1:
        answers = [i for i in answers if i > 0]
    spans = [(render(index, True), render(index + 1, False)) for index in answers]
    spans = [(a, b) for a, b in spans if whole.startswith(b) and b.startswith(a)]
    if not spans or spans[-1][1] != whole:
        start = _common_prefix(render(len(turns) - 1, True), whole)
        spans = [(whole[:start], whole)]
    result, position = [], 0
    for before, after in spans:
        result.append(Segment(whole[position : len(before)], False))
        result += _up_to_eos(whole[len(before) : len(after)], str(tokenizer.eos_token or ""))
        position = len(after)
    return _joined(result)


def _joined(pieces: Iterable[Segment]) -> list[Segment]:
    """Return the pieces with neighbours of one kind as one piece: tokens may span them."""
    groups = groupby((p for p in pieces if p.text), key=lambda piece: piece.trained)
    return [Segment("".join(p.text for p in group), trained) for trained, group in groups]


def _up_to_eos(text: str, eos: str) -> list[Segment]:
    """Leave what a template writes after the end of the turn out of the loss."""
    end = text.rfind(eos) + len(eos) if eos and eos in text else len(text)
    if text[end:].strip():
        end = len(text)
    return [Segment(text[:end], True), Segment(text[end:], False)]


def _common_prefix(one: str, other: str) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
