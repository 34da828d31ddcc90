"""How a server is to ask a tuned model: as its run learnt it, where the chat template does not."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..data.chats import PLAIN_TEMPLATE
from ..errors import DataError
from ..generation.prompts import Layout, PromptWriter, layout_in

if TYPE_CHECKING:
    from .tuned import Tuned

Talk = list[dict[str, str]]
_SAID = "Hello"
_HEADS = ("", "{{ bos_token }}", "{{ bos_token }} ")
"""What a template may have to begin with, so that tokens are those of a text: servers that ask
transformers add no special tokens to a chat, nor a space where a beginning of text stands."""


@dataclass(frozen=True)
class Asking:
    """How a server that works with the tokenizer's own chat templates asks as the run learnt.

    Attributes:
        path: of the API: chat/completions, or completions where no chat was learnt.
        body: a request, but for the name of the model.
        words: what has to be known of it; may be empty.
        template: a chat template that takes the place of the tokenizer's own; None: leave that.
        chats: chats (`messages`) with the token ids that they are to have (`prompt`).
    """

    path: str
    body: Mapping[str, Any]
    words: str = ""
    template: str | None = None
    chats: list[dict[str, Any]] = field(default_factory=list)


def learnt_layout(tuned: Tuned) -> Layout | None:
    """Return how the data of its run were written; None of what was not trained by a run."""
    metrics = tuned.metrics_so_far
    known = metrics.get("data") and tuned.tokenizer is not None
    return layout_in(metrics, tuned.tokenizer) if known else None


def asking_tokenizer(tuned: Tuned) -> Any:
    """Return its tokenizer, with a chat template that writes chats as the run learnt them: another
    one than its own where that was in alpaca's layout. What begins a text the template leaves out:
    llama.cpp and Ollama put it there."""
    if learnt_layout(tuned) != "instruction":
        return tuned.tokenizer
    found = copy.copy(tuned.tokenizer)
    found.chat_template = PLAIN_TEMPLATE
    return found


def asking(tuned: Tuned) -> Asking:
    """Return how a server that works with transformers' tokenizer is to ask a tuned model."""
    tokenizer, layout = tuned.tokenizer, learnt_layout(tuned)
    text, chat = {"prompt": _SAID}, {"messages": [{"role": "user", "content": _SAID}]}
    if layout == "text":
        words = "It learnt from texts as they stand; a chat template writes what it did not learn."
        return Asking("completions", text, words)
    if layout == "instruction":
        writer = PromptWriter(tokenizer, "instruction")
        if _as_learnt(tokenizer, tokenizer.chat_template):
            return Asking("chat/completions", chat, chats=_chats(writer))
        words = "It learnt instructions in alpaca's layout"
        for template in (head + PLAIN_TEMPLATE for head in _HEADS):
            if _as_learnt(tokenizer, template):
                words += ", by which this chat template writes chats."
                return Asking("chat/completions", chat, words, template, _chats(writer))
        words += ", of which no chat template makes the same tokens: leave chats alone."
        return Asking("completions", {"prompt": writer.text(_SAID)}, words)
    if not getattr(tokenizer, "chat_template", None):
        return Asking("completions", text)
    return Asking("chat/completions", chat, chats=_chats(PromptWriter(tokenizer, "chat")))


def _talks() -> list[Talk]:
    """Return chats to compare templates with."""
    said = (("user", "Add a and b."), ("assistant", "a + b"), ("user", "And\n\n {{ c }}?"))
    talk = [{"role": role, "content": content} for role, content in said]
    return [talk[:1], talk, [{"role": "system", "content": "Be brief."}, *talk]]


def _chats(writer: PromptWriter) -> list[dict[str, Any]]:
    """Return chats with their tokens; without those that a template refuses."""
    found = []
    for talk in _talks():
        try:
            found.append({"messages": talk, "prompt": writer.ids(talk)})
        except DataError:  # as of a system turn, which Gemma's template does not take
            continue
    return found


def _as_learnt(tokenizer: Any, template: str | None) -> bool:
    """Say whether chats by a template have the tokens of alpaca's layout."""
    if template is None:
        return False
    writer = PromptWriter(tokenizer, "instruction")
    how = {"chat_template": template, "add_generation_prompt": True, "return_dict": False}
    try:
        written = [tokenizer.apply_chat_template(talk, **how) for talk in _talks()]
    except Exception:  # templates raise what they like
        return False
    return written == [writer.ids(talk) for talk in _talks()]
