"""From what a user asks to token ids: as the chat template writes a chat, in the layout of the
data that a run learnt from, or as the text stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ..data.chats import open_chat
from ..data.files import kind_of
from ..data.formats import checked_text
from ..data.pixels import encoded
from ..data.tokens import Prompt
from ..errors import DataError
from ..inputs.documents import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Layout = Literal["chat", "instruction", "text"]
Turns: TypeAlias = Sequence[Mapping[str, Any]]

LAYOUTS: dict[Layout, str] = {
    "chat": "as the chat template writes a chat",
    "instruction": "as an instruction in alpaca's layout",
    "text": "as the text stands",
}
_OF_FORMATS: dict[str, Layout] = {
    "messages": "chat",
    "sharegpt": "chat",
    "oasst": "chat",
    "self-instruct": "instruction",
    "alpaca": "instruction",
    "dolly": "instruction",
    "prompt-completion": "text",
    "text": "text",
}
_IN_A_RUN = ("adapter", "base", "merged")
"""Folders of a run that hold what answers."""


@dataclass(frozen=True)
class PromptWriter:
    """Writes prompts for one model.

    Attributes:
        layout: how a text is written; `layout_of` finds what the model learnt. None leaves it as
            it stands, and writes chats by the template, or in alpaca's layout where there is none.
        root: the folder in which chats may name pictures, `ANYWHERE` for one's own; without it they
            hold them as bytes or data: URLs.
    """

    tokenizer: PreTrainedTokenizerBase
    layout: Layout | None
    root: Path | None = None

    def __post_init__(self) -> None:
        if self.layout == "chat" and not self.tokenizer.chat_template:
            what = "the tokenizer has no chat template"
            raise DataError(what, fix="choose the layout instruction or text", where="layout")

    def ids(self, asked: str | Turns | Prompt) -> list[int]:
        """Return the token ids of a text, or of the turns of a chat.

        Raises:
            DataError: the turns are no chat, the text is no text that can be encoded, or there is
                nothing to go on from.
        """
        found = encoded(self.tokenizer, self._prompt(asked))
        if not found:
            raise DataError("the prompt is empty", fix="write something", where="prompt")
        return found

    def text(self, asked: str | Turns) -> str:
        """Return what `ids` encodes, without the special tokens that a tokenizer adds; raises what
        that does."""
        found = self._prompt(asked)
        return found if isinstance(found, str) else found.text

    def _prompt(self, asked: str | Turns | Prompt) -> str | Prompt:
        if isinstance(asked, Prompt):
            return asked
        if isinstance(asked, str):
            checked_text(asked, "the text", "prompt")
            if self.layout in ("text", None):
                return asked
            asked = [{"role": "user", "content": asked}]
        given = asked if isinstance(asked, Sequence) else [asked]
        turns = [dict(turn) for turn in given if isinstance(turn, Mapping)]
        if given is not asked or len(turns) < len(given):
            fix = 'write a text, or turns: [{"role": "user", "content": "..."}]'
            raise DataError(f"it is {kind_of(asked)}, and no prompt", fix=fix, where="prompt")
        plain = self.layout == "instruction"
        return open_chat(turns, self.tokenizer, plain=plain, root=self.root)


def layout_of(path: str | Path, tokenizer: PreTrainedTokenizerBase) -> Layout:
    """Return how to ask the model at `path`, a run folder or the adapter or merged model in one: as
    the data were written that its run learnt from, or what a model without a run has a chat
    template for."""
    folder = Path(path).expanduser()
    if folder.is_dir() and (inside := folder.resolve()).name in _IN_A_RUN:
        folder = folder if (folder / "metrics.json").is_file() else inside.parent
    file = folder / "metrics.json"
    return layout_in(read_object(file) if file.is_file() else {}, tokenizer)


def layout_in(metrics: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Layout:
    """Return what `layout_of` does, by what is in the run's `metrics.json`."""
    found = metrics.get("data", {})
    for one in found.get("files", ()) if isinstance(found, dict) else ():
        if layout := _OF_FORMATS.get(one.get("format", "")):
            without = layout == "chat" and not tokenizer.chat_template
            return "instruction" if without else layout
    return "chat" if tokenizer.chat_template else "text"
