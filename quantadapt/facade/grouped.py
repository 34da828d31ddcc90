"""Experts computed as grouped products: tokens sorted by expert, one product for each stack.

y = x Wᵀ + s (x Aᵀ) Bᵀ with the weight, A and B of each token's expert. On CUDA all experts are one
product (`torch._grouped_mm`), elsewhere a loop. Weights are dequantized again for backward.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..model.experts import SUFFIX


class StackLora(NamedTuple):
    """LoRA on a stack of experts.

    Attributes:
        a: [experts, r, in_features].
        b: [experts, out_features, r].
        scaling: the factor.
    """

    a: Tensor
    b: Tensor
    scaling: float


def run_experts(
    experts: Any,
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    loras: Mapping[str, StackLora],
) -> Tensor:
    """Return what `experts` make of `hidden`, see `experts_forward`."""
    tokens, k = index.shape
    chosen, order = torch.sort(index.reshape(-1), stable=True)
    kinds = torch.arange(experts.num_experts, device=index.device)
    ends = torch.searchsorted(chosen, kinds, right=True).to(torch.int32)
    x = hidden[order // k]
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    y = _linear(experts, first, x, chosen, ends, loras)
    y = experts._apply_gate(y) if experts.has_gate else experts.act_fn(y)
    y = _linear(experts, "down_proj", y, chosen, ends, loras)
    if getattr(experts, "has_post_expert_norm", False):
        y = experts.post_expert_norm(y)
    share = weights.reshape(-1)[order].unsqueeze(-1)
    # Rows of no expert hold anything: a mask and not a product, which would keep NaN.
    y = torch.where((chosen < experts.num_experts).unsqueeze(-1), y * share, 0)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return y[back].view(tokens, k, -1).sum(1).to(hidden.dtype)


def _linear(
    experts: Any,
    name: str,
    x: Tensor,
    chosen: Tensor,
    ends: Tensor,
    loras: Mapping[str, StackLora],
) -> Tensor:
    """Return x Wᵀ + bias, and what LoRA adds: [rows, in_features] -> [rows, out_features]."""
    stack, lora = experts._modules.get(f"{name}{SUFFIX}"), loras.get(name)
    added = name in getattr(experts, "_deltas", ())  # an adapter changes the weight itself
    if stack is not None and not added:
        x = x.to(stack.compute_dtype_for(x.device.type))
        y: Tensor = _Frozen.apply(x, stack, ends)  # type: ignore[no-untyped-call]
    else:
        weight = getattr(experts, name)
        x = x.to(weight.dtype)
        y = grouped(x, weight if experts.is_transposed else weight.transpose(1, 2), ends)
    if lora is not None:
        h = grouped(x, lora.a.to(x.dtype).transpose(1, 2), ends)
        y = y + lora.scaling * grouped(h, lora.b.to(x.dtype).transpose(1, 2), ends)
    if experts.has_bias:
        bias = getattr(experts, f"{name}_bias")
        y = y + bias[chosen.clamp(max=experts.num_experts - 1)].to(y.dtype)
    return y


class _Frozen(torch.autograd.Function):
    """x Wᵀ by expert. Saves no tensor but the groups: W is dequantized again for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stack: Any, ends: Tensor) -> Tensor:
        ctx.stack, ctx.dtype = stack, x.dtype
        ctx.save_for_backward(ends)
        return grouped(x, stack.by_expert().to(x.dtype).transpose(1, 2), ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        (dy,), (ends,) = grads, ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None
        weight = ctx.stack.by_expert_for_backward().to(dy.dtype)
        return grouped(dy, weight, ends).to(ctx.dtype), None, None


def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Return x times the weight of each row's group.

    Args:
        x: [rows, n], sorted by group.
        weight: [groups, n, m].
        ends: int32 [groups], where the rows of each group end.

    Returns:
        [rows, m]. Rows behind the last group are not set on CUDA, and 0 elsewhere.
    """
    if x.is_cuda and x.dtype is torch.bfloat16:
        product: Tensor = torch._grouped_mm(x, weight, offs=ends)
        return product
    parts, start = [], 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            parts.append(x[start:end] @ weight[group])
        start = end
    parts.append(x.new_zeros(x.shape[0] - start, weight.shape[2]))
    return torch.cat(parts)
