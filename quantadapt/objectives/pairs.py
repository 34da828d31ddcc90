"""What objectives share that learn from pairs of a chosen and a rejected answer.

Both go through the model in one batch, as neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .answers import AnswerTask, answer_batch

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from ..data.looking import Shown
    from ..data.reading import Data
    from ..data.report import DataReport
    from ..spec import DataSpec
    from ..training.trainer import Setup

REFERENCE = ("reference_chosen", "reference_rejected")
"""Columns with the log-likelihoods of both answers by the reference model, in nats."""


class PairTask(AnswerTask):
    """Reads pairs, and makes batches of them: `input_ids`, `attention_mask` and `labels` [2 pairs,
    length], the chosen answer of each pair before the rejected one."""

    sequences: ClassVar[int] = 2

    def read(self, spec: DataSpec, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Data:
        """Return pairs, as `load_preferences` makes them."""
        from ..data.preferences import load_preferences

        return load_preferences(spec, tokenizer, seed=seed)

    def survey(self, spec: DataSpec) -> DataReport | None:
        """Return the rows of each file."""
        from ..data.preferences import pairs, with_bundled
        from ..data.reading import survey

        return survey(with_bundled(spec), pairs)

    def look(
        self, spec: DataSpec, tokenizer: PreTrainedTokenizerBase, limit: int
    ) -> tuple[list[Shown], DataReport]:
        """Return the texts of the first pairs."""
        from ..data.preferences import look_at_pairs

        return look_at_pairs(spec, tokenizer, limit)

    def collator(self, setup: Setup) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Return what pads the answers of pairs."""
        return PairCollator(setup.pad_token_id, setup.length_multiple)

    def lengths(self, dataset: Dataset) -> list[int]:
        """Return how many tokens the longer answer of each pair has, with its prompt."""
        import pyarrow.compute as pc

        from ..data.preferences import CHOSEN, REJECTED

        found: list[int] = []
        for table in dataset.with_format("arrow").iter(10_000):
            both = (pc.list_value_length(table[name]) for name in (CHOSEN[0], REJECTED[0]))
            found += pc.max_element_wise(*both).to_pylist()
        return found


@dataclass
class PairCollator:
    """Pads the answers of pairs on the right.

    Attributes:
        multiple: batches are padded to a multiple of so many tokens.
    """

    pad_token_id: int
    multiple: int | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch, the number of labels that count, `counted`, and `reference` [2 pairs]
        where the data have it."""
        import torch

        from ..data.preferences import CHOSEN, REJECTED

        rows = [(e[ids], e[mask]) for e in examples for ids, mask in (CHOSEN, REJECTED)]
        batch = answer_batch(rows, self.pad_token_id, self.multiple)
        if REFERENCE[0] in examples[0]:
            reference = [e[name] for e in examples for name in REFERENCE]
            batch["reference"] = torch.tensor(reference, dtype=torch.float32)
        return batch


def logged(likelihoods: Tensor) -> dict[str, Tensor]:
    """Return TRL's figures of the log-likelihoods of a batch, [2 pairs]."""
    chosen, rejected = likelihoods.detach().view(-1, 2).unbind(1)
    return {"logps/chosen": chosen, "logps/rejected": rejected}


def rewards(ratios: Tensor, beta: float) -> dict[str, Tensor]:
    """Return TRL's figures of pairs: rewards, their margins, and how often the chosen one's is the
    higher.

    Args:
        ratios: log-likelihoods less those of the reference, [pairs, 2].
    """
    chosen, rejected = (beta * ratios.detach()).unbind(1)
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).float(),
    }
