"""Packing: several examples in one row, for models that keep them apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import TrainingError

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

    from ..data.batches import CausalCollator

_LENGTH = 8
_ROUNDING = 0.02
"""What of the logits may change with tokens elsewhere in the row by rounding alone; leaks are
above 0.03 even in tiny random models."""


def packed(dataset: Dataset) -> Dataset:
    """Put several examples into one row, as long as the longest example."""
    from trl import pack_dataset

    longest = max(map(len, dataset["input_ids"]))
    rows: Dataset = pack_dataset(dataset, seq_length=longest, strategy="bfd")
    return rows


def refuse_leaks(model: Any, collator: CausalCollator) -> None:
    """Raise TrainingError where examples of one row see each other.

    Not every architecture heeds where examples begin (BLOOM, OPT, MPT and state spaces do not), and
    none says so. So it is tried out: the second of two examples must not change with the first.
    """
    import torch

    one, other = (_second_logits(model, collator, token) for token in (3, 4))
    if torch.linalg.vector_norm(one - other) > _ROUNDING * torch.linalg.vector_norm(one):
        what = f"{type(model.get_base_model()).__name__} does not keep the examples of a row apart"
        raise TrainingError(what, fix="leave train.packing out", where="train.packing")


def _second_logits(model: Any, collator: CausalCollator, token: int) -> Tensor:
    """Return the logits of an example that follows one of nothing but `token`, in float32."""
    import torch

    from ..evaluation.predictions import evaluating

    row = {
        "input_ids": [token] * _LENGTH + list(range(_LENGTH)),
        "completion_mask": [1] * 2 * _LENGTH,
        "seq_lengths": [_LENGTH, _LENGTH],
    }
    batch = collator([row])
    device = model.get_input_embeddings().weight.device
    inputs = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
        if name not in ("labels", "counted")
    }
    with evaluating(model), torch.no_grad():
        logits: Tensor = model(**inputs, use_cache=False).logits
    return logits[:, _LENGTH : 2 * _LENGTH].float()
