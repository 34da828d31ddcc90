"""DoRA on stacks of experts: y = c (x Wᵀ + s (x Aᵀ) Bᵀ), row by row of each expert's weight.

c = magnitude / ‖W + s B A‖, and the norm counts as a constant in backward
(https://arxiv.org/abs/2402.09353, section 4.3). B A is never made dense.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .grouped import ALIGNED, Routing, StackLora, grouped, grouped_outer

_AT_ONCE = 2**22
"""So many numbers are multiplied at a time with those of their experts."""


@torch.no_grad()
def row_norms(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return ‖W + s B A‖ of each row, from its square: ‖w‖² + 2 s (W Aᵀ) · b + s² bᵀ (A Aᵀ) b.

    Args:
        weight: [experts, out_features, in_features].
        a: [experts, r, in_features].
        b: [experts, out_features, r].
        scaling: s.

    Returns:
        [experts, out_features], in float32 or better.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(weight.device.type, enabled=False):
        squares = torch.linalg.vector_norm(weight, dim=2, dtype=dtype).square_()
        linear = torch.bmm(weight, a.to(weight.dtype).transpose(1, 2)).to(dtype)
        of_a, b = a.to(dtype), b.to(dtype)
        twice = linear.mul_(2 * scaling).baddbmm_(b, of_a @ of_a.transpose(1, 2), alpha=scaling**2)
        return twice.mul_(b).sum(2).add_(squares).clamp_(min=0).sqrt_()


class StackNorms(NamedTuple):
    """DoRA's norms of a stack, filled in while its weight is there, and its magnitudes.

    Attributes:
        lora: has the magnitudes.
        norms: [experts, out_features], in float32 or better; 1 of experts that get no rows.
    """

    lora: StackLora
    norms: Tensor

    @classmethod
    def of(cls, lora: StackLora) -> StackNorms:
        """Return the norms of a stack with a DoRA, still to be filled in."""
        magnitude = lora.magnitude
        assert magnitude is not None
        dtype = torch.promote_types(magnitude.dtype, torch.float32)
        return cls(lora, torch.ones_like(magnitude, dtype=dtype, requires_grad=False))

    def fill(self, weight: Tensor, first: int) -> None:
        """Take note of the norms of some experts, from `first` on, whose weight [experts,
        out_features, in_features] is there."""
        own = slice(first, first + weight.shape[0])
        a, b = (part.detach()[own] for part in self.lora.views())
        self.norms[own] = row_norms(weight, a, b, self.lora.scaling)

    def scaled(self, y: Tensor, routing: Routing) -> Tensor:
        """Return y [rows, out_features] with each row times magnitude / norm, in its memory. Bare
        factors are near 1, so they are not rounded to the dtype of y."""
        assert self.lora.magnitude is not None
        factors = self.lora.magnitude.detach() / self.norms
        expert, step = routing.expert.clamp(max=len(factors) - 1), max(1, _AT_ONCE // y.shape[1])
        for start in range(0, len(y), step):
            y[start : start + step].mul_(factors[expert[start : start + step].long()])
        return y

    def gradient(self, dy: Tensor, before: Tensor, routing: Routing) -> Tensor:
        """Return the gradient of the magnitudes, [experts, out_features].

        Args:
            dy: [rows, out_features], the gradient of what `scaled` returned.
            before: what it got; its memory is used again.
        """
        ones = dy.new_ones(len(dy), ALIGNED)
        sums = grouped_outer(before.mul_(dy), ones, routing.ends)[:, :, 0]
        made: Tensor = sums / self.norms
        return made.to(self.lora.magnitude.dtype)  # type: ignore[union-attr]


def dora_product(x: Tensor, stack: Any, routing: Routing, lora: StackLora) -> Tensor:
    """Return what a quantized stack with DoRA makes of the rows, without bias: [rows, in_features]
    -> [rows, out_features].

    Args:
        x: in the compute dtype, sorted by expert.
        stack: a `QuantStack`.
        lora: has a magnitude.
    """
    assert lora.magnitude is not None
    a, b = lora.views()
    norms = row_norms(stack.by_expert().to(x.dtype), a.detach(), b.detach(), lora.scaling)
    c = (lora.magnitude / norms).to(x.dtype)
    low = grouped(x, a.to(x.dtype).transpose(1, 2), routing.ends)
    added = grouped(low, b.to(x.dtype).transpose(1, 2), routing.ends)
    y: Tensor = _Frozen.apply(x, stack, routing.ends)  # type: ignore[no-untyped-call]
    return (y + lora.scaling * added) * c[routing.expert.clamp(max=len(c) - 1).long()]


class _Frozen(torch.autograd.Function):
    """x Wᵀ by expert. Saves no weight: it is dequantized again for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stack: Any, ends: Tensor) -> Tensor:
        ctx.stack = stack
        ctx.save_for_backward(ends)
        return grouped(x, stack.by_expert().to(x.dtype).transpose(1, 2), ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        (dy,), (ends,) = grads, ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return grouped(dy.contiguous(), ctx.stack.by_expert().to(dy.dtype), ends), None, None
