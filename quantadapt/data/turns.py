"""Chats as data files have them: read, and checked turn by turn."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from ..errors import DataError
from .files import kind_of
from .formats import Example, checked_text, from_json
from .pictures import Picture

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
    turns = [checked_turn(message, number, row.where) for number, message in enumerate(messages, 1)]
    weights = [_weight(turn, number, row.where) for number, turn in enumerate(turns, 1)]
    learnt = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and weights[i]]
    turns = turns[: learnt[-1] + 1] if learnt else []
    chat = Chat(turns, learnt, _tools(row), pictures=list(map(take_pictures, turns)))
    for turn in (turns[i] for i in learnt):
        if not any(map(turn.get, ("content", *_SPEAKS))):
            chat.remarks.append("an empty answer is learnt")
    if not learnt:
        answers = any(isinstance(m, dict) and m.get("role") == "assistant" for m in messages)
        none = "with no turn of the assistant"
        chat.dropped = f"{none} that has weight 1" if answers else none
    return chat


def checked_turn(message: Any, number: int, where: str) -> Turn:
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
        isinstance(call, dict) and isinstance(function_of(call).get("name"), str) for call in calls
    )
    if not named:
        fix = 'write [{"type": "function", "function": {"name": "...", "arguments": {...}}}]'
        raise DataError(f"'tool_calls' of turn {number} are no calls", fix=fix, where=where)
    return list(calls)


def function_of(call: dict[str, Any]) -> dict[str, Any]:
    """Return what a call or a tool says of its function; empty where it is no object."""
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


def take_pictures(turn: Turn) -> list[Picture]:
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


def unwritten(chat: Chat, who: str, text: str) -> list[str]:
    """Return what is said in a chat and stands nowhere in its text."""
    lost = [
        key
        for index, turn in enumerate(chat.turns)
        if turn["role"] != "assistant" or index in chat.learnt
        for key, value in turn.items()
        if key not in LINKS and isinstance(value, str) and value.strip() not in text
    ]
    names = [str(function_of(tool).get("name", "")) for tool in chat.tools or ()]
    if not all(name in text for name in names):
        lost.append("tools")
    silent = [
        t["role"] for i, t in enumerate(chat.turns) if _is_unwritten(t, i in chat.learnt, text)
    ]
    told = [
        f"what a turn of the {role} says is not written {who}" for role in dict.fromkeys(silent)
    ]
    return told + [f"{key!r} is not written {who}" for key in dict.fromkeys(lost)]


def _is_unwritten(turn: Turn, learnt: bool, text: str) -> bool:
    """Say whether the content of a turn is not in the text that is to hold it, but for space, and
    quoted as JSON at most. Answers that are not learnt may be shortened."""
    content = turn["content"]
    if not isinstance(content, str) or (turn["role"] == "assistant" and not learnt):
        return False
    bare, *ways = (
        "".join(t.split()) for t in (text, content, json.dumps(content, ensure_ascii=False)[1:-1])
    )
    return not any(way in bare for way in ways)
