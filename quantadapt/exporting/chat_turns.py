"""A chat template taken apart: what stands around the turns of each role.

Templates are programs; most come to a text before and a text after each turn. That is found by
what a template makes of a few conversations, and checked on others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Messages = Sequence[Mapping[str, str]]
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Turns:
    """What stands around turns.

    Attributes:
        around: role -> text before and after what is said; a role that is missing is not taken.
        start: what a conversation begins with that has no system turn.
        answer: what an answer begins with.
    """

    around: Mapping[str, tuple[str, str]]
    start: str = ""
    answer: str = ""

    def text(self, messages: Messages) -> str:
        """Return a conversation as the model is to read it before it answers."""
        begin = "" if messages and messages[0]["role"] == "system" else self.start
        turns = [
            before + message["content"] + after
            for message in messages
            for before, after in [self.around[message["role"]]]
        ]
        return begin + "".join(turns) + self.answer


_SAID = {role: {"role": role, "content": f"<{role}-said>"} for role in ROLES}
"""A message of each role."""
_THREE = ("user", "assistant", "user")


def turns_of(render: Callable[[list[dict[str, str]]], str]) -> Turns | None:
    """Return what a chat template puts around turns; None where it does anything else.

    Args:
        render: makes of messages (role, content) the text before an answer. May raise where it does
            not take a role.
    """
    try:
        one, three = render([_SAID["user"]]), render([_SAID[role] for role in _THREE])
    except Exception:  # templates raise what they like
        return None
    if (parts := _parted(one, three)) is None:
        return None
    system, without_system = _system(render), None
    for found in _candidates(parts, system):
        if _holds(found, render):
            if system is None or "system" in found.around:
                return found
            without_system = without_system or found
    return without_system


class _Parts(NamedTuple):
    """What stands around what is said, in a user's turn and in user, assistant, user.

    Attributes:
        head: before a user who begins.
        between: after the user and before the assistant.
        again: after the assistant and before the user.
        end: after the last user.
    """

    head: str
    between: str
    again: str
    end: str


def _parted(one: str, three: str) -> _Parts | None:
    """Return the parts of a user's turn alone and of three turns; None where they do not begin and
    end alike, or say something twice or not at all."""
    user, assistant = _SAID["user"]["content"], _SAID["assistant"]["content"]
    if one.count(user) != 1 or three.count(user) != 2:
        return None
    head, _, end = one.partition(user)
    if not three.startswith(head + user) or assistant not in three:
        return None
    between, _, rest = three[len(head + user) :].partition(assistant)
    again, _, last = rest.partition(user)
    return _Parts(head, between, again, end) if last == end else None


def _candidates(parts: _Parts, system: str | None) -> Iterator[Turns]:
    """Yield what turns may be, as it is not seen where one ends and the next begins: head is start
    and `before` a user, again is `after` an assistant and `before`; between and end begin with
    `after` a user."""
    head, between, again, end = parts
    for before in _ends_of(again, head):
        for after in _starts_of(end, between):
            around = {
                "user": (before, after),
                "assistant": (between.removeprefix(after), again.removesuffix(before)),
            }
            if system is not None and system.endswith(before):
                begin, _, close = system.removesuffix(before).partition(_SAID["system"]["content"])
                around["system"] = begin, close
            yield Turns(around, head.removesuffix(before), end.removeprefix(after))


def _system(render: Callable[[list[dict[str, str]]], str]) -> str | None:
    """Return what stands in front of the first user's turn where there is a system turn."""
    try:
        text = render([_SAID["system"], _SAID["user"]])
    except Exception:
        return None
    before, found, _ = text.partition(_SAID["user"]["content"])
    return before if found and before.count(_SAID["system"]["content"]) == 1 else None


def _ends_of(text: str, other: str) -> list[str]:
    """Return the ends that both have, the longest first."""
    count = next((i for i in range(len(text)) if not other.endswith(text[i:])), len(text))
    first = next((i for i in range(len(text) + 1) if other.endswith(text[i:])), count)
    return [text[i:] for i in range(first, len(text) + 1)]


def _starts_of(text: str, other: str) -> list[str]:
    """Return the beginnings that both have, the longest first."""
    last = next((i for i in range(len(text), -1, -1) if other.startswith(text[:i])), 0)
    return [text[:i] for i in range(last, -1, -1)]


def _holds(found: Turns, render: Callable[[list[dict[str, str]]], str]) -> bool:
    """Say whether turns are what a template makes of other conversations."""
    user, other = _message("user", "Is it 4?\nOr 5"), _message("user", "and {{ x }}")
    answer = _message("assistant", "No: 'six'")
    talks = [[user], [user, answer, other], [other, answer, user, answer, other]]
    if "system" in found.around:
        talks += [[_message("system", "Be brief."), *talk] for talk in talks]
    try:
        return all(found.text(talk) == render(talk) for talk in talks)
    except Exception:
        return False


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def chat_turns(tokenizer: Any) -> Turns | None:
    """Return what the chat template of a tokenizer puts around turns, without the beginning of text
    that the tokenizer adds itself; None where it has none, or one that does anything else."""
    if not isinstance(getattr(tokenizer, "chat_template", None), str):
        return None
    begin = tokenizer.bos_token or ""
    adds = bool(begin) and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]

    def render(messages: list[dict[str, str]]) -> str:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return text.removeprefix(begin) if adds else text

    return turns_of(render)
