"""Chats in alpaca's layout, where there is no chat template; and prompts that end in an answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DataError
from .pictures import placed
from .pieces import Pieces, Segment, joined
from .pixels import reader_of
from .templated import writer_of
from .tokens import Prompt
from .turns import Chat, Turn, checked_turn, take_pictures, unwritten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_HEADS = {
    "user": "### Instruction:\n",
    "assistant": "### Response:\n",
    **dict.fromkeys(("system", "developer"), ""),
}
PLAIN_TEMPLATE = (
    f"{{% set heads = {_HEADS!r} %}}"
    "{% for message in messages %}{% if message['role'] not in heads %}"
    "{{ raise_exception('There is no turn of ' + message['role'] + ' here.') }}{% endif %}"
    "{{ heads[message['role']] + (message['content'] or '') }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if add_generation_prompt or not loop.last %}{{ '\\n\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ heads['assistant'] }}{% endif %}"
)
"""A chat template of that layout, for what asks by one. It writes no beginning of text."""


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
    chat.remarks += unwritten(chat, "without a chat template", text)
    return [Pieces(joined(pieces))]


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
    checked = [checked_turn(turn, number, where) for number, turn in enumerate(placed_, 1)]
    pictures = [picture for turn in checked for picture in take_pictures(turn)]
    if pictures:
        reader_of(tokenizer, where)
    if not checked:
        raise DataError("the chat has no turns", fix="ask something", where=where)
    if tokenizer.chat_template and not plain:
        writer = writer_of(Chat(checked, [], None), tokenizer, where)
        text = writer.render(len(checked), ask=True)
        return Prompt(text, "", templated=True, pictures=tuple(pictures))
    answer = {"role": "assistant", "content": ""}
    whole = Chat([*checked, answer], [len(checked)], None)
    pieces = plain_chat(whole, tokenizer, where)
    if whole.dropped:
        raise DataError(f"it is a chat {whole.dropped}", where=where)
    return Prompt("".join(piece.text for piece in pieces[0].segments), "")
