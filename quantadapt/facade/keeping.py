"""What a layer needs in backward, saved in front of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def kept(x: Tensor, *others: Tensor) -> tuple[Tensor, Any]:
    """Return x, and the node that has x and `others` saved for backward; without a graph, x and
    None."""
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x, None
    x = _Keep.apply(x, *others)  # type: ignore[no-untyped-call]
    return x, x.grad_fn


def taken(node: Any) -> tuple[Tensor, ...]:
    """Return what a node has saved for backward, and have it let go of that, unless the graph is to
    be kept: whoever asks in a backward can free it there, before the node's own turn comes."""
    saved: tuple[Tensor, ...] = node.saved_tensors
    node.maybe_clear_saved_tensors()
    return saved


class _Keep(torch.autograd.Function):
    """Saves x and others in front of the layers, for their backward.

    Gradient checkpointing recomputes a block until the last tensor that was saved in it is there
    again. x is saved before the matrix products, and they save nothing, so those of the block's
    last layer (down_proj or the experts, mostly) are never computed again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.save_for_backward(x, *others)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], *[None] * (len(ctx.needs_input_grad) - 1)
