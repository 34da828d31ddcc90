"""Attention of rows of which each process of a group has a part of the tokens, one after the other.

Before attention the processes exchange queries, keys and values: each gets all tokens of its share
of the heads. Afterwards they exchange what came out: each gets all heads of its tokens. All else
that a decoder does is done token by token, with no word to the others. Every process has as much to
do as the others, also under a causal mask. As in DeepSpeed-Ulysses
(https://arxiv.org/abs/2309.14509).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from ..errors import ModelError
from .attention import STOCK, computed_by, configs_of
from .packed_attention import attention_by_example
from .sinks import repeated

NAME = "quantadapt_ulysses"
_WIDEST = 256
"""Numbers of a head up to which the kernels that hold no logits share keys among heads."""
_OTHERWISE = ("s_aux", "softcap", "position_bias", "cache")
"""What attention functions of transformers are given where it is more than a causal softmax."""

FIX = "use a model of plain causal attention, or leave train.context_parallel_size out"


@contextmanager
def exchanging(model: nn.Module, group: Callable[[], Any]) -> Iterator[None]:
    """Inside, the processes of a group have a part each of the tokens of a row, in their order.

    Args:
        group: returns it; all processes have to ask for it, so it comes after what is refused.

    Raises:
        ModelError: the model's attention is not torch's `scaled_dot_product_attention`.
    """
    from transformers import AttentionInterface

    configs = configs_of(model, STOCK)
    if not configs:
        what = "its attention is not that of torch, so GPUs cannot share it out by heads"
        raise ModelError(what, fix=FIX, where="train.context_parallel_size")
    # No mask is registered with it: the tokens here are not all that a query sees.
    AttentionInterface.register(NAME, partial(_attention, group()))
    with computed_by(NAME, configs):
        yield


@contextmanager
def alone(model: nn.Module) -> Iterator[None]:
    """Inside `exchanging`, each process has whole rows."""
    with computed_by(STOCK, configs_of(model, NAME)):
        yield


def _attention(
    group: Any,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return the attention [batch, tokens, heads, head_dim], as transformers' interface wants it.

    Args:
        query: [batch, heads, tokens, head_dim] of the tokens here; `key` and `value` may have fewer
            heads.
        attention_mask: of none but the tokens here; padding stands at the end, where no token that
            counts sees it.
    """
    _refuse_others(module, options)
    size = distributed.get_world_size(group)
    if sliding_window is not None and sliding_window < query.shape[2] * size:
        what = f"{type(module).__name__} sees {sliding_window:,} tokens back, and not the whole row"
        raise ModelError(what, fix=FIX, where="train.context_parallel_size")
    if key.shape[1] % size:  # fewer than processes: each gets the one that its queries share
        key, value = (repeated(tensor, size) for tensor in (key, value))
    query, key, value = (_to_heads(tensor, group, size) for tensor in (query, key, value))
    options |= {"scaling": scaling, "dropout": dropout, "is_causal": True}
    # Where rows hold several examples, each is kept to itself.
    found, _ = attention_by_example(_causal, module, query, key, value, None, **options)
    return _to_tokens(found.transpose(1, 2), group, size), None


def _causal(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None,
    dropout: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return the attention [batch, tokens, heads, head_dim] of whole rows."""
    shares = query.shape[-1] == value.shape[-1] <= _WIDEST
    if not shares:
        key, value = (repeated(tensor, query.shape[1]) for tensor in (key, value))
    found = scaled_dot_product_attention(
        *(query, key, value),
        dropout_p=dropout,
        is_causal=True,
        scale=scaling,
        enable_gqa=shares and key.shape[1] < query.shape[1],
    )
    return found.transpose(1, 2), None


def _refuse_others(module: nn.Module, options: dict[str, Any]) -> None:
    """Raise ModelError where attention is more, or sees more, than a causal softmax."""
    more = [name for name in _OTHERWISE if options.get(name) is not None]
    both_ways = options.get("is_causal") is False or getattr(module, "is_causal", True) is False
    if more or both_ways:
        what = f"{type(module).__name__} has attention of another kind"
        what += f": {', '.join(more)}" if more else ", which sees what comes"
        raise ModelError(what, fix=FIX, where="train.context_parallel_size")


def _to_heads(tensor: Tensor, group: Any, size: int) -> Tensor:
    """Turn [batch, heads, tokens / size, width] into [batch, heads / size, tokens, width]."""
    batch, heads, tokens, width = tensor.shape
    shares = tensor.reshape(batch, size, heads // size, tokens, width).movedim(1, 0)
    parts = _exchanged(shares, group)
    return parts.movedim(0, 2).reshape(batch, heads // size, size * tokens, width)


def _to_tokens(tensor: Tensor, group: Any, size: int) -> Tensor:
    """Turn [batch, heads / size, tokens, width] into [batch, tokens / size, heads, width]."""
    batch, heads, tokens, width = tensor.shape
    parts = tensor.reshape(batch, heads, size, tokens // size, width).permute(2, 0, 3, 1, 4)
    shares = _exchanged(parts, group)
    return shares.permute(1, 2, 0, 3, 4).reshape(batch, tokens // size, size * heads, width)


def _exchanged(tensor: Tensor, group: Any) -> Tensor:
    found: Tensor = _Exchange.apply(tensor, group)  # type: ignore[no-untyped-call]
    return found


class _Exchange(torch.autograd.Function):
    """Sends part i of the first dimension to process i, and puts what comes from it there. The
    gradients take the same way back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _sent(tensor, group)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sent(grads[0], ctx.group), None


def _sent(tensor: Tensor, group: Any) -> Tensor:
    tensor = tensor.contiguous()
    found = torch.empty_like(tensor)
    distributed.all_to_all_single(found, tensor, group=group)
    return found
