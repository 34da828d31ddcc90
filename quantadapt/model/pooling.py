"""Vectors of texts, of the last hidden states of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

POOLINGS = ("mean", "cls", "lasttoken")
"""sentence-transformers' names: the mean over all tokens, the first, the last."""


def vectors(model: Any, input_ids: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """Return a vector for each text, float32 [texts, hidden_size].

    Args:
        model: of transformers, perhaps with an adapter of PEFT; its head is not asked.
        input_ids, attention_mask: int64 [texts, length], padded on the right.
        pooling: one of `POOLINGS`.
    """
    base = getattr(model, "get_base_model", lambda: model)()
    more = {"use_cache": False} if hasattr(base.config, "use_cache") else {}
    output = base.base_model(input_ids=input_ids, attention_mask=attention_mask, **more)
    return pooled(output.last_hidden_state, attention_mask, pooling)


def pooled(hidden: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """Return vectors, float32 [texts, hidden_size], of hidden states [texts, length,
    hidden_size]."""
    if pooling == "mean":
        seen = attention_mask[..., None].to(hidden.dtype)
        return (hidden * seen).sum(1, dtype=torch.float32) / seen.sum(1, dtype=torch.float32)
    last = attention_mask.sum(1) - 1
    place = torch.zeros_like(last) if pooling == "cls" else last
    return hidden[torch.arange(len(hidden), device=hidden.device), place].float()
