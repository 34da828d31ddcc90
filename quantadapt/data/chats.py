"""From turns of a chat to text: as the tokenizer's chat template writes it, or in alpaca's layout.

Every turn of the assistant is learnt as it stands when it is generated. Some templates write an
earlier turn in another way once the chat has gone on (they leave its reasoning out); such a chat
becomes several examples, each up to one of those turns.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from .files import first_line, kind_of
from .formats import Example, checked_text, from_json
from .pictures import Picture, placed
from .pieces import Pieces, Segment, joined
from .pixels import reader_of
from .templates import written_by_template
from .tokens import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = dict[str, Any]
LINKS = frozenset({"role", "content", "tool_calls", "tool_call_id", "id", "index", "type"})
"""Keys of a turn that need not show in the text under their own name."""
_SPEAKS = ("tool_calls", "reasoning_content", "reasoning", "thinking")
"""What a turn of the assistant may say beside its content."""


@dataclass
class Chat:
    """A checked chat.

    Attributes:
        turns: up to the last that is learnt, as the template gets them.
        learnt: the indices of those that are learnt.
        tools: what the template gets as tools, if anything.
        dropped: why there is nothing to learn in it; empty where there is.
        remarks: what else is to be known about it.
        pictures: of each turn, in the order in which they stand there.
    """

    turns: list[Turn]
    learnt: list[int]
    tools: list[Any] | None
    dropped: str = ""
    remarks: list[str] = field(default_factory=list)
    pictures: list[list[Picture]] = field(default_factory=list)

    def seen_up_to(self, index: int) -> tuple[Picture, ...]:
        """Return the pictures of all turns up to this one."""
        return tuple(picture for turn in self.pictures[: index + 1] for picture in turn)


def read_chat(row: Example) -> Chat:
    """Return the chat in a row. Raises DataError where it is none."""
    messages = from_json(row.values.get("messages"), "'messages'", row.where)
    if not isinstance(messages, list) or not messages:
        what = "'messages' is missing or no list of turns"
        fix = 'write [{"role": "user", "content": "..."}, {"role": "assistant", ...}]'
        raise DataError(what, fix=fix, where=row.where)
    turns = [_turn(message, number, row.where) for number, message in enumerate(messages, 1)]
    weights = [_weight(turn, number, row.where) for number, turn in enumerate(turns, 1)]
    learnt = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and weights[i]]
    turns = turns[: learnt[-1] + 1] if learnt else []
    chat = Chat(turns, learnt, _tools(row), pictures=list(map(_taken, turns)))
    for turn in (turns[i] for i in learnt):
        if not any(map(turn.get, ("content", *_SPEAKS))):
            chat.remarks.append("an empty answer is learnt")
    if not learnt:
        answers = any(isinstance(m, dict) and m.get("role") == "assistant" for m in messages)
        none = "with no turn of the assistant"
        chat.dropped = f"{none} that has weight 1" if answers else none
    return chat


def _turn(message: Any, number: int, where: str) -> Turn:
    """Return a turn with all that it says, under the names that templates know."""
    if not isinstance(message, dict):
        what = f"turn {number} of 'messages' is {kind_of(message)}, expected an object"
        fix = 'write {"role": "user", "content": "..."}'
        raise DataError(what, fix=fix, where=where)
    turn = {key: value for key, value in message.items() if value is not None}
    turn["role"] = checked_text(turn.get("role"), f"'role' of turn {number}", where)
    if call := turn.pop("function_call", None):
        turn["tool_calls"] = [{"type": "function", "function": call}]
    calls = from_json(turn.pop("tool_calls", None), f"'tool_calls' of turn {number}", where)
    if calls:
        turn["tool_calls"] = _calls(calls, number, where)
    turn["content"] = _content(turn, number, where)
    return turn


def _calls(calls: Any, number: int, where: str) -> list[Any]:
    named = isinstance(calls, list) and all(
        isinstance(call, dict) and isinstance(_function(call).get("name"), str) for call in calls
    )
    if not named:
        fix = 'write [{"type": "function", "function": {"name": "...", "arguments": {...}}}]'
        raise DataError(f"'tool_calls' of turn {number} are no calls", fix=fix, where=where)
    return list(calls)


def _function(call: dict[str, Any]) -> dict[str, Any]:
    found = call.get("function", call)
    return found if isinstance(found, dict) else {}


def _content(turn: Turn, number: int, where: str) -> str | list[dict[str, Any]] | None:
    """Return the text of a turn, or its parts where it has pictures; None where it only calls tools
    or thinks."""
    content, name = turn.get("content"), f"'content' of turn {number}"
    if content is None and turn["role"] == "assistant" and any(map(turn.get, _SPEAKS)):
        return None
    if isinstance(content, list) and content:
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else kind_of(part)
            if kind != "text" and not _is_picture(part):
                fix = 'only text and pictures are read: {"type": "text", "text": "..."}'
                raise DataError(f"{name} has a part of type {kind!r}", fix=fix, where=where)
        texts = [p if _is_picture(p) else checked_text(p.get("text"), name, where) for p in content]
        if any(map(_is_picture, content)):
            return [{"type": "text", "text": t} if isinstance(t, str) else t for t in texts]
        return "".join(texts)
    return checked_text(content, name, where)


def _is_picture(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("picture"), Picture)


def _taken(turn: Turn) -> list[Picture]:
    """Take the pictures out of a turn, and leave their places, which is what templates want."""
    content = turn["content"]
    if not isinstance(content, list):
        return []
    found = [part["picture"] for part in content if _is_picture(part)]
    turn["content"] = [{"type": "image"} if _is_picture(part) else part for part in content]
    return found


def _weight(turn: Turn, number: int, where: str) -> bool:
    weight = turn.pop("weight", 1)
    if weight not in (0, 1):
        what = f"'weight' of turn {number} is {weight!r}"
        raise DataError(what, fix="write 1 to learn the turn, 0 to leave it out", where=where)
    return bool(weight)


def _tools(row: Example) -> list[Any] | None:
    tools = from_json(row.values.get("tools") or None, "'tools'", row.where)
    if tools and not (isinstance(tools, list) and all(isinstance(t, dict) for t in tools)):
        fix = 'write [{"type": "function", "function": {"name": "...", ...}}]'
        raise DataError("'tools' is no list of objects", fix=fix, where=row.where)
    return tools or None


def open_chat(
    turns: Sequence[Turn],
    tokenizer: PreTrainedTokenizerBase,
    *,
    plain: bool = False,
    root: Path | None = None,
) -> Prompt:
    """Return the prompt that a chat is up to an answer, as it stands in training data.

    Args:
        turns: dicts with `role` and `content`; checked as those of data files are.
        plain: alpaca's layout, even where the tokenizer has a chat template.
        root: the folder that pictures are named in; without it they come as bytes or data: URLs.

    Raises:
        DataError: they are no chat, or the template refuses them.
    """
    where = "messages"
    placed_ = placed(turns, [], root=root, where=where)
    checked = [_turn(turn, number, where) for number, turn in enumerate(placed_, 1)]
    pictures = [picture for turn in checked for picture in _taken(turn)]
    if pictures:
        reader_of(tokenizer, where)
    if not checked:
        raise DataError("the chat has no turns", fix="ask something", where=where)
    if tokenizer.chat_template and not plain:
        writer = _writer(Chat(checked, [], None), tokenizer, where)
        text = writer.render(len(checked), ask=True)
        return Prompt(text, "", templated=True, pictures=tuple(pictures))
    answer = {"role": "assistant", "content": ""}
    whole = Chat([*checked, answer], [len(checked)], None)
    pieces = plain_chat(whole, tokenizer, where)
    if whole.dropped:
        raise DataError(f"it is a chat {whole.dropped}", where=where)
    return Prompt("".join(piece.text for piece in pieces[0].segments), "")


# Without a template -----------------------------------------------------------------------------

_HEADS = {
    "user": "### Instruction:\n",
    "assistant": "### Response:\n",
    **dict.fromkeys(("system", "developer"), ""),
}


def plain_chat(chat: Chat, tokenizer: PreTrainedTokenizerBase, where: str) -> list[Pieces]:
    """Lay a chat out as alpaca does."""
    if chat.dropped:
        return []
    if any(isinstance(turn["content"], list) for turn in chat.turns):
        what, fix = "it holds pictures, and there is no chat template", "use an image-text model"
        raise DataError(what, fix=fix, where=where)
    if any("tool_calls" in turn or turn["role"] == "tool" for turn in chat.turns):
        chat.dropped = "with calls of tools, for which the tokenizer has no chat template"
        return []
    eos = str(tokenizer.eos_token or "")
    pieces = []
    for index, turn in enumerate(chat.turns):
        if turn["role"] not in _HEADS:
            what = f"turn {index + 1} has the role {turn['role']!r}"
            fix = f"use one of {', '.join(_HEADS)}, or a model with a chat template"
            raise DataError(what, fix=fix, where=where)
        pieces.append(Segment(_HEADS[turn["role"]], False))
        last = index == len(chat.turns) - 1
        end = eos if turn["role"] == "assistant" and not last else ""
        pieces.append(Segment((turn["content"] or "") + end, index in chat.learnt))
        pieces.append(Segment("" if last else "\n\n", False))
    text = "".join(piece.text for piece in pieces)
    chat.remarks += _unwritten(chat, "without a chat template", text)
    return [Pieces(joined(pieces))]


# With a template --------------------------------------------------------------------------------


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
    writer = _writer(chat, tokenizer, where)
    texts: list[tuple[str, list[tuple[int, int]]]] = []
    ends: list[int] = []
    for index in chat.learnt:
        if index == 0 and len(chat.learnt) > 1:
            chat.remarks.append("a turn of the assistant that opens the chat is not learnt")
            continue
        after = writer.render(index + 1)
        asked = writer.render(index, ask=True) if index else _head(chat.turns[0], after)
        start = _common_prefix(asked, after)
        if start < len(asked):
            what = "the chat template opens an answer in another way than it writes one"
            chat.remarks.append(what)
        if why := _unwritten_calls(chat.turns[index], after[start:]):
            chat.dropped = why
            return []
        before, spans = texts[-1] if texts else ("", [])
        if spans and after.startswith(before) and start >= len(before):
            texts[-1], ends[-1] = (after, [*spans, (start, len(after))]), index
        else:
            texts.append((after, [(start, len(after))]))
            ends.append(index)
    if len(texts) > 1:
        what = (
            "chats became several examples: the chat template writes earlier turns in another way"
        )
        chat.remarks.append(what)
    eos = str(tokenizer.eos_token or "")
    if eos and not any(eos in text[a:b] for text, spans in texts for a, b in spans):
        what = f"the chat template does not end answers with the tokenizer's eos token {eos}"
        chat.remarks.append(what)
    written = "".join(text for text, _ in texts)
    chat.remarks += _unwritten(chat, "by the chat template", written)
    return [
        Pieces(_cut_up(text, spans, eos), templated=True, pictures=chat.seen_up_to(end))
        for (text, spans), end in zip(reversed(texts), reversed(ends), strict=True)
    ]


@dataclass
class _Writer:
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


def _writer(chat: Chat, tokenizer: PreTrainedTokenizerBase, where: str) -> _Writer:
    """Return what writes the chat in the first of its `_variants` that the template writes well."""
    refused: DataError | None = None
    poor: _Writer | None = None
    in_parts = "image" in str(tokenizer.chat_template)
    for turns in _variants(chat.turns, in_parts=in_parts):
        writer = _Writer(tokenizer, turns, chat.tools, where)
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
        function = dict(_function(call))
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
        _function(call).get("arguments") for turn in turns for call in turn.get("tool_calls", ())
    ]
    for given in arguments:
        quoted = json.dumps(given, ensure_ascii=False)
        if isinstance(given, str) and quoted != f'"{given}"' and quoted in text:
            return False
    own = json.dumps([turns, tools], ensure_ascii=False, default=str).count("None")
    silent = any(turn["content"] is None for turn in turns)
    return not silent or text.count("None") <= own


def _is_lost(turns: list[Turn], text: str) -> bool:
    """Say whether a template has written nothing of what is said: it looks for parts."""
    said = [turn["content"].strip() for turn in turns if isinstance(turn["content"], str)]
    return any(said) and not any(content in text for content in said if content)


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


# What a template leaves out ---------------------------------------------------------------------


def _unwritten_calls(turn: Turn, text: str) -> str:
    names = [_function(call)["name"] for call in turn.get("tool_calls", ())]
    if all(name in text for name in names):
        return ""
    return "with calls of tools, which the chat template does not write"


def _unwritten(chat: Chat, who: str, text: str) -> list[str]:
    """Return what is said in a chat and stands nowhere in its text."""
    lost = [
        key
        for index, turn in enumerate(chat.turns)
        if turn["role"] != "assistant" or index in chat.learnt
        for key, value in turn.items()
        if key not in LINKS and isinstance(value, str) and value.strip() not in text
    ]
    names = [str(_function(tool).get("name", "")) for tool in chat.tools or ()]
    if not all(name in text for name in names):
        lost.append("tools")
    return [f"{key!r} is not written {who}" for key in dict.fromkeys(lost)]
