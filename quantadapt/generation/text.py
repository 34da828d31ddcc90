"""From token ids to text, piece by piece, as the tokens come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextSoFar:
    """The text of an answer in the making, without special tokens, up to the first text that ends
    it. Half a character, and what may become the end of the answer, is kept back."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, [text for text in stop if text]
        self.tokens: list[int] = []
        self._begin = self._read = 0  # tokens before `_read` are text; `_begin` gives them context
        self._held = ""
        self.text = ""
        self.ended = False

    def add(self, tokens: Sequence[int], *, last: bool = False) -> str:
        """Take more tokens and return the text that is new; `last` keeps nothing back."""
        self.tokens += tokens
        before = self._decoded(self._begin, self._read)
        now = self._decoded(self._begin, len(self.tokens))
        if len(now) > len(before) and (last or not now.endswith(_UNFINISHED)):
            self._held += now[len(before) :]
            self._begin, self._read = self._read, len(self.tokens)
        return self._given(last)

    def _decoded(self, start: int, end: int) -> str:
        return str(self._tokenizer.decode(self.tokens[start:end], skip_special_tokens=True))

    def _given(self, last: bool) -> str:
        if self.ended:
            return ""
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            self.ended = True
            given, self._held = self._held[: min(found)], ""
        else:
            kept = 0 if last else max(map(self._beginning, self._stop), default=0)
            cut = len(self._held) - kept
            given, self._held = self._held[:cut], self._held[cut:]
        self.text += given
        return given

    def _beginning(self, stop: str) -> int:
        """Return how many of the last characters may be the first of `stop`."""
        sizes = range(min(len(stop) - 1, len(self._held)), 0, -1)
        return next((size for size in sizes if self._held.endswith(stop[:size])), 0)
