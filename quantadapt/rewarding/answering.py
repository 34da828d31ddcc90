"""A model answers prompts, and its answers are scored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..data.prompts import Asked
from ..generation import Sampling, answers
from .scoring import Scorer

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Rollout:
    """An answer that a model gave.

    Attributes:
        asked: the prompt.
        ids: the tokens of the answer, with the one that ended it.
        text: what they say.
        ended: whether the model ended it; else it was cut at the longest length.
    """

    asked: Asked
    ids: tuple[int, ...]
    text: str
    ended: bool

    @property
    def completion(self) -> Any:
        """The answer as reward functions get it: a text, or a chat's turn."""
        if isinstance(self.asked.prompt, str):
            return self.text
        return [{"role": "assistant", "content": self.text}]


def rollouts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Asked],
    sampling: Sampling,
    *,
    batch_size: int,
    first: int = 0,
) -> list[Rollout]:
    """Let the model answer each prompt, by its weights as they are now.

    Args:
        first: the number of the first prompt, which its draws depend on.
    """
    ids = [one.ids for one in asked]
    made = answers(model, tokenizer, ids, sampling, batch_size=batch_size, first=first)
    return [
        Rollout(one, answer.ids, answer.text, answer.finish == "stop")
        for one, answer in zip(asked, made, strict=True)
    ]


def scored(scorer: Scorer, made: Sequence[Rollout]) -> Tensor:
    """Return what each function gives each answer, as `Scorer.scores`. Raises RewardError."""
    columns: dict[str, list[Any]] = {name: [] for name in _names(one.asked.columns for one in made)}
    for name, values in columns.items():
        values += [one.asked.columns.get(name) for one in made]
    return scorer.scores(
        [one.asked.prompt for one in made],
        [one.completion for one in made],
        [list(one.ids) for one in made],
        columns,
    )


def _names(columns: Iterable[Mapping[str, Any]]) -> list[str]:
    return [*dict.fromkeys(name for found in columns for name in found)]
