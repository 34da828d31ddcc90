"""Chats as the tokenizer's chat template writes them.

Every turn of the assistant is learnt as it stands when it is generated. Some templates write an
earlier turn in another way once the chat has gone on (they leave its reasoning out); such a chat
becomes several examples, each up to one of those turns.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from .files import first_line
from .formats import checked_text
from .pieces import Pieces, Segment, joined
from .pixels import reader_of
from .templates import written_by_template
from .turns import LINKS, Chat, Turn, function_of, unwritten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def template_chat(chat: Chat, tokenizer: PreTrainedTokenizerBase, where: str) -> list[Pieces]:
    """Render with the template; the loss counts on what each turn that is learnt adds.

    The example that holds the whole chat comes first. A turn of the assistant that opens the chat
    is learnt only if it is all there is: it answers nothing.

    Raises:
        DataError: the template refuses the chat.
    """
    if chat.dropped:
        return []
    if any(chat.pictures):
        reader_of(tokenizer, where)  # or its template would fail
    examples = _examples(chat, writer_of(chat, tokenizer, where))
    if chat.dropped:
        return []
    eos = str(tokenizer.eos_token or "")
    _remark(chat, examples, eos)
    return [
        Pieces(
            _cut_up(made.text, made.spans, eos),
            templated=True,
            pictures=chat.seen_up_to(made.last),
        )
        for made in reversed(examples)
    ]


@dataclass
class _Example:
    """A chat up to its turn `last`; the characters in `spans`, (first, end), are learnt."""

    text: str
    spans: list[tuple[int, int]]
    last: int


def _examples(chat: Chat, writer: Writer) -> list[_Example]:
    """Return the examples that a chat becomes, the shortest first; drop one whose calls of tools
    are not written."""
    examples: list[_Example] = []
    for index in chat.learnt:
        if index == 0 and len(chat.learnt) > 1:
            chat.remarks.append("a turn of the assistant that opens the chat is not learnt")
            continue
        after = writer.render(index + 1)
        asked = writer.render(index, ask=True) if index else _head(chat.turns[0], after)
        start = _common_prefix(asked, after)
        if start < len(asked):
            what = "the chat template opens an answer in another way than it writes one"
            if (rewritten := _begin(writer, index, asked, after, start)) is not None:
                start = rewritten
                what = (
                    "the chat template writes earlier turns in another way once they are answered"
                )
            chat.remarks.append(what)
        if why := _unwritten_calls(chat.turns[index], after[start:]):
            chat.dropped = why
            return []
        made = _Example(after, [(start, len(after))], index)
        before = examples[-1] if examples else None
        if before and after.startswith(before.text) and start >= len(before.text):
            made.spans = before.spans + made.spans
            examples.pop()
        examples.append(made)
    return examples


def _begin(writer: Writer, index: int, asked: str, after: str, start: int) -> int | None:
    """Return where the answer `index` begins in `after`, if the template has written turns before
    it otherwise than for the question, `asked`; None where it has not. What others said after
    `start`, where the two part, is not to be learnt."""
    before = writer.render(index) if index else ""
    if start >= (same := _common_prefix(before, asked)):
        return None
    opening = asked[same:]
    turns = [*writer.turns[:index], _otherwise(writer.turns[index])]
    try:
        end = _common_prefix(replace(writer, turns=turns).render(index + 1), after)
    except DataError:
        end = len(after)
    for size in range(len(opening), len(opening) // 2, -1):
        if (found := after.rfind(opening[:size], 0, end)) >= 0:
            return max(found + size, start)
    return max(end, start)


def _otherwise(turn: Turn) -> Turn:
    """Return a turn that says something else from its first character on."""

    def changed(value: Any) -> Any:
        if isinstance(value, list):
            return [p | {"text": f"…{p['text']}"} if "text" in p else p for p in value]
        return f"…{value}" if isinstance(value, str) and value else value

    made = {key: value if key in _NAMES else changed(value) for key, value in turn.items()}
    if made == turn and "tool_calls" in turn:
        made["tool_calls"] = [
            {**call, "function": {**function_of(call), "name": f"_{function_of(call)['name']}"}}
            for call in turn["tool_calls"]
        ]
    return made


_NAMES = LINKS - {"content"}


def _remark(chat: Chat, examples: Sequence[_Example], eos: str) -> None:
    """Note what is to be known of how a template has written a chat."""
    if len(examples) > 1:
        what = (
            "chats became several examples: the chat template writes earlier turns in another way"
        )
        chat.remarks.append(what)
    if eos and not any(eos in made.text[a:b] for made in examples for a, b in made.spans):
        what = f"the chat template does not end answers with the tokenizer's eos token {eos}"
        chat.remarks.append(what)
    written = "".join(made.text for made in examples)
    chat.remarks += unwritten(chat, "by the chat template", written)


@dataclass
class Writer:
    """Writes the turns of a chat with the tokenizer's template."""

    tokenizer: PreTrainedTokenizerBase
    turns: list[Turn]
    tools: list[Any] | None
    where: str

    def render(self, count: int, *, ask: bool = False) -> str:
        """Return the first `count` turns as text; `ask` opens an answer after them."""
        try:
            text = written_by_template(self.tokenizer, self.turns[:count], self.tools, ask=ask)
        except Exception as error:  # a template is a program and may raise anything
            what = f"the chat template refuses it: {first_line(error)}"
            fix = "reorder the turns, or use another format"
            raise DataError(what, fix=fix, where=self.where) from error
        return checked_text(text, "the chat as its template writes it", self.where)


def writer_of(chat: Chat, tokenizer: PreTrainedTokenizerBase, where: str) -> Writer:
    """Return what writes the chat in the first of its `_variants` that the template writes well."""
    refused: DataError | None = None
    poor: Writer | None = None
    in_parts = "image" in str(tokenizer.chat_template)
    for turns in _variants(chat.turns, in_parts=in_parts):
        writer = Writer(tokenizer, turns, chat.tools, where)
        try:
            text = writer.render(len(turns))
        except DataError as error:
            refused = refused or error
            continue
        if _well_written(turns, chat.tools, text):
            return writer
        poor = poor or writer
    if poor is not None:
        return poor
    assert refused is not None
    raise refused


def _variants(turns: list[Turn], *, in_parts: bool = False) -> Iterator[list[Turn]]:
    """Yield a chat as it stands; with arguments of calls as objects, not as JSON text, or the
    other way round; and with empty text for none. Templates differ in what they take.

    Args:
        in_parts: whether the template may want texts as parts; chats with pictures come so first.
    """
    if in_parts and any(isinstance(turn["content"], list) for turn in turns):
        yield [_in_parts(turn) for turn in turns]
    yield turns
    if in_parts:
        yield [_in_parts(turn) for turn in turns]
    calls = any("tool_calls" in turn for turn in turns)
    silent = any(turn["content"] is None for turn in turns)
    if calls:
        yield [_other_arguments(turn) for turn in turns]
    if silent:
        yield [_spoken(turn) for turn in turns]
    if calls and silent:
        yield [_spoken(_other_arguments(turn)) for turn in turns]


def _in_parts(turn: Turn) -> Turn:
    content = turn["content"]
    if not isinstance(content, str):
        return turn
    return {**turn, "content": [{"type": "text", "text": content}]}


def _spoken(turn: Turn) -> Turn:
    return {**turn, "content": turn["content"] or ""}


def _other_arguments(turn: Turn) -> Turn:
    if "tool_calls" not in turn:
        return turn
    calls = []
    for call in turn["tool_calls"]:
        function = dict(function_of(call))
        if "arguments" in function:
            function["arguments"] = _other_form(function["arguments"])
        calls.append({**call, "function": function} if "function" in call else function)
    return {**turn, "tool_calls": calls}


def _other_form(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return json.dumps(arguments, ensure_ascii=False)
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


def _well_written(turns: list[Turn], tools: list[Any] | None, text: str) -> bool:
    """Whether no JSON text was quoted once more, no missing text came out as `None`, and none that
    is in parts is missing."""
    parts = [p for t in turns if isinstance(t["content"], list) for p in t["content"]]
    if not all(part.get("text", "").strip() in text for part in parts):
        return False
    if _is_lost(turns, text):
        return False
    arguments = [
        function_of(call).get("arguments") for turn in turns for call in turn.get("tool_calls", ())
    ]
    for given in arguments:
        quoted = json.dumps(given, ensure_ascii=False)
        if isinstance(given, str) and quoted != f'"{given}"' and quoted in text:
            return False
    own = json.dumps([turns, tools], ensure_ascii=False, default=str).count("None")
    silent = any(turn["content"] is None for turn in turns)
    return not silent or text.count("None") <= own


def _is_lost(turns: list[Turn], text: str) -> bool:
    """Say whether a template has not written what is said, as it looks for parts. The longest text
    tells: a short one, such as the answer A, may stand in any. What tools say may be quoted."""
    said = [t["content"].strip() for t in turns if isinstance(t["content"], str)
            and t["role"] != "tool"]  # fmt: skip
    return max(said, key=len, default="") not in text


def _head(turn: Turn, text: str) -> str:
    """Return what a template writes before the content of a turn that opens the chat."""
    content = turn["content"]
    return text[: max(text.find(content), 0)] if content and isinstance(content, str) else ""


def _cut_up(text: str, spans: Sequence[tuple[int, int]], eos: str) -> list[Segment]:
    pieces, position = [], 0
    for start, end in spans:
        pieces.append(Segment(text[position:start], False))
        pieces += _up_to_eos(text[start:end], eos)
        position = end
    return joined(pieces)


def _up_to_eos(text: str, eos: str) -> list[Segment]:
    """Leave what a template writes after the end of the turn out of the loss."""
    end = text.rfind(eos) + len(eos) if eos and eos in text else len(text)
    if text[end:].strip():
        end = len(text)
    return [Segment(text[:end], True), Segment(text[end:], False)]


def _common_prefix(one: str, other: str) -> int:
    if other.startswith(one):
        return len(one)
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _unwritten_calls(turn: Turn, text: str) -> str:
    names = [function_of(call)["name"] for call in turn.get("tool_calls", ())]
    if all(name in text for name in names):
        return ""
    return "with calls of tools, which the chat template does not write"
