"""What held-out data ask, as somebody would write it: examples for whoever talks to a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ..data.formats import Example
from ..data.reading import held_out_examples
from ..spec import DataSpec

_BESIDE = ("input", "context")
"""Columns that stand beside an instruction."""
_BEGINNING = 80
"""Characters of a plain text that are given; the model is to go on from there."""


@dataclass(frozen=True)
class Question:
    """A question, and the answer that the data have for it; `system` comes before a chat."""

    text: str
    reference: str
    system: str = ""


def held_out_questions(spec: DataSpec, *, seed: int, most: int) -> list[Question]:
    """Return what the first held-out examples ask: of a chat its first turn; at most so many.

    Raises:
        DataError: as `data.load_data`.
    """
    return [*islice(_questions(held_out_examples(spec, seed=seed)), most)]


def _questions(found: Iterable[Example]) -> Iterator[Question]:
    for example in found:
        question = _MAKERS[example.shape](example.values)
        if question.text.strip():
            yield question


def _of_text(values: Mapping[str, Any]) -> Question:
    text = values["text"]
    return Question(text[:_BEGINNING], text[_BEGINNING:])


def _of_pair(values: Mapping[str, Any]) -> Question:
    """Return the instruction where there is one: it is written as the run learnt when it is
    asked."""
    asked = values["prompt"]
    if isinstance(instruction := values.get("instruction"), str) and "instances" not in values:
        beside = [values[name] for name in _BESIDE if isinstance(values.get(name), str)]
        asked = "\n\n".join(filter(None, [instruction, *beside]))
    return Question(asked, values["completion"])


def _of_chat(values: Mapping[str, Any]) -> Question:
    said: dict[str, str] = {}
    for turn in values["messages"]:
        if isinstance(turn, Mapping) and isinstance(content := turn.get("content"), str):
            said.setdefault(str(turn.get("role")), content)
    return Question(said.get("user", ""), said.get("assistant", ""), said.get("system", ""))


_MAKERS = {"text": _of_text, "prompt-completion": _of_pair, "messages": _of_chat}
