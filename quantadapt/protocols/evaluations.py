"""What an evaluation implements: an `Evaluator`, and what it is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import Problem
from .options import Figure, Options

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn

    from ..data.reading import Prompt


@dataclass(frozen=True)
class Given:
    """What an evaluator is given beside the model.

    Attributes:
        examples: held-out examples, tokenized: columns `input_ids` and `completion_mask`, 1 where
            the loss counts.
        prompts: held-out prompts, each with its `text` and what the data says after it, its
            `reference`; none where the data came tokenized.
        tokenizer: the model's; None for a live module that has none.
        batch_size: how many examples or prompts to take at a time.
        max_new_tokens: longest answer, in tokens.
        split: whether each process of a run may take its part of the examples. All of them measure
            then, and each has to return the result of all.
    """

    examples: Dataset
    prompts: Sequence[Prompt] = ()
    tokenizer: Any = None
    batch_size: int = 8
    max_new_tokens: int = 64
    split: bool = False


class Evaluator(Options, ABC):
    """What measures; its fields are the evaluation's options."""

    def wants(self, model: str) -> bool:
        """Say whether to measure this model of a run: the "unquantized" base, the "quantized" one
        before training, the "tuned" one with its adapter, or the "merged" one."""
        return True

    def refusals(self) -> Iterable[Problem]:
        """Return what is wrong with the options beyond their types. Asked before any work starts,
        and only where what the evaluation requires is installed: look at files, download nothing,
        load no torch."""
        return ()

    @abstractmethod
    def measure(self, model: nn.Module, given: Given) -> Mapping[str, Figure]:
        """Return figures of `model` by name, the one that matters most first.

        The model keeps its weights, its mode and its device. What is raised here costs no run: it
        is told once, and the evaluation is left out from then on. Only where several processes
        measure together does the run end, with the trained adapter saved.
        """
        ...
