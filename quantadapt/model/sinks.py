"""Attention with sinks (gpt-oss and others) as one call of torch's `scaled_dot_product_attention`.

A sink is a logit that each head has beside those of the keys: it takes its share of the softmax and
gives no value (Xiao et al., 2023, https://arxiv.org/abs/2309.17453; learnt in gpt-oss). For models
that have them transformers knows attention that holds all logits, [batch, heads, queries, keys],
several times, and kernels that have to be downloaded.

Here the sink is one more key, which comes first and whose value is zero. Queries and keys get one
more number: 1 for the sink's key and 0 for others; in the queries of a head, its sink. Where
nothing but the order of tokens says who sees whom, one more query comes first, so that the mask
stays the triangle that the fast kernels know.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from .attention import STOCK, computed_by, configs_of

NAME = "quantadapt_sinks"
WIDTH_MULTIPLE = 8
"""Kernels that hold no logits want queries, keys and values of a multiple of so many numbers."""


@contextmanager
def fused_sinks(model: nn.Module) -> Iterator[None]:
    """Let attention with sinks be one call where transformers would hold all logits.

    What users chose themselves (flash or flex attention) stays.
    """
    with _computed_here(configs_of(model, "eager", has_sinks)):
        yield


@contextmanager
def fused_groups(model: nn.Module) -> Iterator[None]:
    """Let attention of one query see keys that heads share as they are, where transformers would
    repeat them for each head."""
    with _computed_here(configs_of(model, STOCK)):
        yield


@contextmanager
def _computed_here(configs: list[Any]) -> Iterator[None]:
    if configs:
        _register()
    with computed_by(NAME, configs):
        yield


def has_sinks(model: nn.Module) -> bool:
    """Say whether some head of it has a sink."""
    return any(isinstance(getattr(m, "sinks", None), Tensor) for m in model.modules())


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(NAME, attention_with_sinks)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[STOCK])


def attention_with_sinks(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return the attention [batch, queries, heads, head_dim], as transformers' interface wants it.

    Args:
        query: [batch, heads, queries, head_dim]; `key` and `value` may have fewer heads.
        attention_mask: True where a query sees a key, or what is added to the logits, [batch, 1 or
            heads, queries, keys]; None where it sees all that came before.
        s_aux: the sinks, [heads]; none where a layer has none.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    heads, queries, size = query.shape[1], query.shape[2], value.shape[-1]
    groups = 1 if queries > 1 else heads // key.shape[1]
    key, value = (repeated(tensor, heads // groups) for tensor in (key, value))
    triangle = attention_mask is None and queries == key.shape[2] > 1
    if s_aux is not None:
        width = -(-max(query.shape[-1] + 1, size) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        place = query.shape[-1]  # of the number that is the sink's
        query, key = (pad(tensor, (0, width - place)) for tensor in (query, key))
        query[..., place] = (s_aux / scaling).to(query.dtype)[:, None]
        key = pad(key, (0, 0, 1, 0))
        key[..., 0, place] = 1.0
        value = pad(value, (0, width - size, 1, 0))
        if triangle:
            query = pad(query, (0, 0, 1, 0))
        elif attention_mask is not None:
            seen = True if attention_mask.dtype == torch.bool else 0.0
            attention_mask = pad(attention_mask, (1, 0), value=seen)
    if groups > 1:  # one query: the heads of a group are rows of one, and nothing is repeated
        query = query.reshape(len(query), -1, groups, query.shape[-1])
        if attention_mask is not None:
            attention_mask = _by_group(attention_mask, groups)
    found = scaled_dot_product_attention(
        *(query, key, value, attention_mask, dropout), is_causal=triangle, scale=scaling
    )
    if groups > 1:
        found = found.flatten(1, 2).unsqueeze(2)
    return found[:, :, -queries:, :size].transpose(1, 2).contiguous(), None


def _by_group(mask: Tensor, groups: int) -> Tensor:
    """Return the mask of one query, [batch, 1 or heads, 1, keys], for `groups` heads a row."""
    if mask.shape[1] == 1:
        return mask.expand(-1, -1, groups, -1)
    return mask.reshape(len(mask), -1, groups, mask.shape[-1])


def repeated(tensor: Tensor, heads: int) -> Tensor:
    """Return keys or values [batch, some heads, keys, size] for so many heads."""
    groups = heads // tensor.shape[1]
    return tensor if groups == 1 else tensor.repeat_interleave(groups, dim=1)
