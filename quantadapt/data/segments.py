"""From examples to text: each becomes pieces, of which some are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .chats import plain_chat
from .formats import Example
from .pieces import Pieces, Segment
from .templated import template_chat
from .turns import read_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Found:
    """What an example comes to: texts, or the reason why it is dropped; and remarks on it."""

    texts: Sequence[Pieces]
    dropped: str = ""
    remarks: Sequence[str] = ()


def segments(example: Example, tokenizer: PreTrainedTokenizerBase) -> Found:
    """Return the text of an example in pieces; a chat may become several.

    Raises:
        DataError: it cannot be written.
    """
    values = example.values
    if example.shape == "text":
        return Found([Pieces([Segment(values["text"], True)])])
    if example.shape == "prompt-completion":
        pair = [Segment(values["prompt"], False), Segment(values["completion"], True)]
        return Found([Pieces(pair)])
    chat = read_chat(example)
    write = template_chat if tokenizer.chat_template else plain_chat
    texts = write(chat, tokenizer, example.where)
    return Found(texts, chat.dropped, chat.remarks)
