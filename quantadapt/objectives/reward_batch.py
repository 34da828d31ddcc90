"""Batches of answers that are rewarded: their columns, and how a batch begins, of prompts alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .answers import answer_batch

if TYPE_CHECKING:
    from .rewarded import RewardTask

PLACE = "place"
"""The column with the place of each prompt in the data."""
WEIGHT, ADVANTAGE, OLD, REFERENCE = "weight", "advantage", "old", "reference"
"""In a batch: how much each answer weighs, and how much better it is than the others, [answers];
log-probabilities before the step, and by the reference, [answers, length - 1]."""


@dataclass
class PromptCollator:
    """Makes a batch of prompts with answers of the longest length, whose tokens are padding."""

    task: RewardTask
    pad_token_id: int
    multiple: int | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch, one answer to a prompt, and the places of the prompts."""
        import torch

        from ..data.prompts import PROMPT_IDS

        length = self.task.max_completion_length
        rows = [
            ([*e[PROMPT_IDS], *[self.pad_token_id] * length],
             [0] * len(e[PROMPT_IDS]) + [1] * length)
            for e in examples
        ]  # fmt: skip
        batch = answer_batch(rows, self.pad_token_id, self.multiple)
        batch[PLACE] = torch.tensor([int(e.get(PLACE, 0)) for e in examples])
        batch[ADVANTAGE] = torch.zeros(len(examples))
        batch[WEIGHT] = torch.ones(len(examples))
        if self.task.beta or self.task.num_iterations > 1:
            shape = (len(examples), batch["input_ids"].shape[1] - 1)
            batch[OLD] = batch[REFERENCE] = torch.zeros(shape)
        return batch
