"""Attention of long rows by groups of heads, one after the other.

Backward of a fused kernel adds up the gradient of queries in float32, and where heads share keys it
holds the gradients of all heads' keys and values: of a long row, four times what attention returns.
Heads do not see each other, so that much is there for a group at a time. The numbers are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..memory.shape import head_groups
from .attention import STOCK, computed_by, configs_of

NAME = "quantadapt_head_groups"
_OTHERWISE = ("position_bias", "cache", "s_aux")
"""What attention functions of transformers are given where heads differ in more than numbers."""


@contextmanager
def in_head_groups(
    model: nn.Module,
    is_long: Callable[[int], bool],
    around_kernel: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[Callable[[bool], None]]:
    """Yield what lets attention that is torch's `scaled_dot_product_attention` go through long rows
    by groups of heads, or be as it was; afterwards it is.

    Args:
        is_long: says of a number of tokens whether they are many.
        around_kernel: what is around each call of that function, while attention is let go so.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    stock = ALL_ATTENTION_FUNCTIONS[STOCK]
    before = ALL_ATTENTION_FUNCTIONS.get(NAME, stock)
    AttentionInterface.register(NAME, partial(_attention, stock, is_long, around_kernel))
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[STOCK])
    configs = configs_of(model, STOCK)

    def turn(on: bool) -> None:
        for config in configs:
            config._attn_implementation_internal = NAME if on else STOCK

    try:
        with computed_by(STOCK, configs):
            yield turn
    finally:  # `is_long` may hold layers of the model, which would never be given back
        AttentionInterface.register(NAME, before)


def _attention(
    stock: Callable[..., tuple[Tensor, None]],
    is_long: Callable[[int], bool],
    around_kernel: Callable[[], AbstractContextManager[None]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return the attention [batch, queries, heads, head_dim], as transformers' interface wants it.

    Args:
        query: [batch, heads, queries, head_dim]; `key` and `value` may have fewer heads.
        options: dropout draws random numbers, in groups others.
    """
    groups = head_groups(key.shape[1])
    draws = bool(options.get("dropout"))
    more = any(options.get(name) is not None for name in _OTHERWISE) or draws
    long = is_long(query.shape[0] * query.shape[2])
    with nullcontext() if draws else around_kernel():
        if groups == 1 or not long or attention_mask is not None or more:
            return stock(module, query, key, value, attention_mask, **options)
        parts = zip(*(tensor.chunk(groups, dim=1) for tensor in (query, key, value)), strict=True)
        found = [stock(module, *part, None, **options)[0] for part in parts]
    return torch.cat(found, dim=2), None
