"""A frozen layer for autograd, and what a recomputation keeps for the backward that follows it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .linear import QuantLinear

_local = threading.local()


@contextmanager
def recomputing() -> Iterator[None]:
    """Inside, each facade keeps the weight that it dequantizes for its backward.

    For gradient checkpointing, where backward follows at once; elsewhere all weights would pile up.
    """
    before = is_recomputing()
    _local.recomputing = True
    try:
        yield
    finally:
        _local.recomputing = before


@contextmanager
def recomputed_later() -> Iterator[None]:
    """Inside, what a forward makes beside its output comes again before its backward."""
    before = comes_again()
    _local.comes_again = True
    try:
        yield
    finally:
        _local.comes_again = before


def comes_again() -> bool:
    """Say whether this thread does a forward that a recomputation repeats."""
    return getattr(_local, "comes_again", False)


def is_recomputing() -> bool:
    """Say whether this thread does a forward again for a backward that follows at once."""
    return getattr(_local, "recomputing", False)


class Frozen(torch.autograd.Function):
    """Vendor forward; backward through the dequantized weight (exact for weight-only methods,
    straight-through where activations are quantized as well). Saves no tensor. `bias` is given
    where it is trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, facade: QuantLinear, bias: Tensor | None) -> Tensor:
        ctx.facade, ctx.dtype = facade, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        y = facade.vendor_forward(x)
        # Autograd forbids in-place changes of a view that was made in here, and adapters add to
        # the base's output in place; this forgets that y is one, without a copy.
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (dy,) = grads
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            flat = dy.reshape(-1, dy.shape[-1]).to(ctx.facade.compute_dtype)
            dx = ctx.facade.gradient(flat)
            dx = dx.view(*dy.shape[:-1], dx.shape[-1]).to(ctx.dtype)
        if ctx.bias_dtype is not None:
            dbias = dy.reshape(-1, dy.shape[-1]).sum(0).to(ctx.bias_dtype)
        return dx, None, dbias
