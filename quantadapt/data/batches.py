"""Batches: examples padded, or laid end to end, with labels where the loss counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

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
        """Return tensors of [batch, length], and the number of labels that count, `counted`."""
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
        # Known here, it needs no waiting for a GPU.
        batch["counted"] = int((batch["labels"][:, 1:] != -100).sum())
        return batch


@dataclass
class EncoderDecoderCollator:
    """Prompts go to the encoder, completions become the labels."""

    pad_token_id: int
    eos_token_id: int | None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return what the model takes, padded."""
        from ..evaluation.predictions import encoder_decoder_batch

        pairs = [(e["input_ids"], e["completion_mask"]) for e in examples]
        return encoder_decoder_batch(pairs, self.pad_token_id, self.eos_token_id)
