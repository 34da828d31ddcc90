"""Batches: examples padded, or laid end to end, with labels where the loss counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .pixels import PICTURES, PIXELS, pixels, types_of
from .tokens import prompt_and_completion

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class CausalCollator:
    """Pads a batch, or lays packed rows end to end; the loss counts where the mask says so.

    Attributes:
        multiple: batches are padded to a multiple of so many tokens.
    """

    pad_token_id: int
    packed: bool
    multiple: int | None = None
    _trl: Any = field(default=None, init=False)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return tensors of [batch, length], and the number of labels that count, `counted`. Where
        there are pictures, `pixels`: what the model gets of those of each example."""
        if self._trl is None:
            from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

            self._trl = DataCollatorForLanguageModeling(
                pad_token_id=self.pad_token_id,
                padding_free=self.packed,
                pad_to_multiple_of=self.multiple,
            )
        import numpy as np

        rows = []
        for example in examples:
            ids = np.asarray(example["input_ids"])
            labels = np.where(example["completion_mask"], ids, -100)
            row = {"input_ids": ids, "labels": labels}
            if self.packed:
                row["seq_lengths"] = example["seq_lengths"]
            rows.append(row)
        batch: dict[str, Any] = self._trl(rows)
        if any(PICTURES in example for example in examples):
            # Of each example by itself: a batch may go through the model in parts.
            batch[PIXELS] = [pixels(example) for example in examples]
            batch |= types_of(examples, batch["input_ids"].shape[1])
        # Known here, it needs no waiting for a GPU.
        batch["counted"] = int((batch["labels"][:, 1:] != -100).sum())
        return batch


@dataclass
class EncoderDecoderCollator:
    """Prompts go to the encoder, completions become the labels."""

    pad_token_id: int
    eos_token_id: int | None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return what the model takes, padded, and the number of labels that count, `counted`."""
        pairs = [(e["input_ids"], e["completion_mask"]) for e in examples]
        batch = encoder_decoder_batch(pairs, self.pad_token_id, self.eos_token_id)
        return {**batch, "counted": int((batch["labels"] != -100).sum())}


@dataclass
class WithColumns:
    """Takes numbers along, beside what `inner` makes of the examples."""

    inner: Callable[[list[dict[str, Any]]], dict[str, Any]]
    names: Sequence[str]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch of `inner`, and a float32 tensor [batch] for each name."""
        batch = self.inner(examples)
        if self.names:
            import torch

            columns = {name: [float(e[name]) for e in examples] for name in self.names}
            batch |= {name: torch.tensor(values) for name, values in columns.items()}
        return batch


def encoder_decoder_batch(
    batch: Sequence[tuple[Sequence[int], Sequence[int]]], pad: int, eos: int | None
) -> dict[str, Tensor]:
    """Turn (input_ids, completion_mask) pairs into what encoder-decoder models take.

    Returns `input_ids` and `attention_mask` [b, source length] of the prompts, each ended by
    `eos` if there is one, and `labels` [b, target length], padded with -100.
    """
    sources, targets = [], []
    for ids, mask in batch:
        source, target = prompt_and_completion(ids, mask)
        sources.append(source if eos is None else [*source, eos])
        targets.append(target)
    return {
        "input_ids": padded(sources, pad),
        "attention_mask": padded([[1] * len(source) for source in sources], 0),
        "labels": padded(targets, -100),
    }


def padded(rows: Sequence[Sequence[int]], value: int, *, left: bool = False) -> Tensor:
    """Return an int64 tensor [rows, longest], padded with `value`."""
    import torch

    length = max(map(len, rows))
    fill = [[value] * (length - len(row)) for row in rows]
    pairs = zip(fill, rows, strict=True)
    return torch.tensor([[*f, *row] if left else [*row, *f] for f, row in pairs])
