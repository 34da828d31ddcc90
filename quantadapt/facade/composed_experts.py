"""The experts of one block, product by product: autograd sees each of them, and keeps weights.

For what `fused_experts` does not know: trained biases or dense stacks, adapters that change a
weight itself, a norm behind the experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .expert_norms import dora_product
from .expert_stack import stack_bias, stack_names
from .grouped import Routing, StackLora, grouped


def run_composed(
    experts: Any,
    hidden: Tensor,
    weights: Tensor,
    routing: Routing,
    loras: Mapping[str, StackLora],
) -> Tensor:
    """Return what `experts` make of `hidden`: [tokens, hidden] -> the same.

    Args:
        weights: [tokens, k], the routing weights.
        loras: by the name of the stack.
    """
    first, second = stack_names(experts)
    y = _linear(experts, first, hidden[routing.token], routing, loras.get(first))
    y = experts._apply_gate(y) if experts.has_gate else experts.act_fn(y)
    y = _linear(experts, second, y, routing, loras.get(second))
    if getattr(experts, "has_post_expert_norm", False):
        y = experts.post_expert_norm(y)
    share = weights[routing.token, _choice(routing)].unsqueeze(-1)
    # Rows of no expert hold anything: a mask and not a product, which would keep NaN.
    y = torch.where(routing.is_routed(), y * share, 0)
    return y[routing.row].sum(1).to(hidden.dtype)


def _choice(routing: Routing) -> Tensor:
    """Return which of its token's k experts each row is for: int64 [rows]."""
    k = routing.row.shape[1]
    return routing.by_row(torch.arange(k, device=routing.row.device).expand_as(routing.row))


def _linear(experts: Any, name: str, x: Tensor, routing: Routing, lora: StackLora | None) -> Tensor:
    """Return x Wᵀ + bias, and what LoRA adds: [rows, in_features] -> [rows, out_features]."""
    if lora is not None and lora.magnitude is not None:
        stack = experts.quantized_stacks[name]
        x = x.to(stack.compute_dtype_for(x.device.type))
        y = dora_product(x, stack, routing, lora)
    else:
        y = _plain_product(experts, name, x, routing, lora)
    if (bias := stack_bias(experts, name)) is not None:
        y = y + bias[routing.expert.clamp(max=len(bias) - 1).long()].to(y.dtype)
    return y


def _plain_product(
    experts: Any, name: str, x: Tensor, routing: Routing, lora: StackLora | None
) -> Tensor:
    weight, ends = getattr(experts, name), routing.ends
    x = x.to(weight.dtype)
    if lora is None or not lora.rounds:
        weight = weight if experts.is_transposed else weight.transpose(1, 2)
    else:
        weight = experts.quantized_stacks[name].by_expert(lora.change()).transpose(1, 2)
    y = grouped(x, weight.to(x.dtype), ends)
    if lora is None:
        return y
    a, b = (part.to(x.dtype).transpose(1, 2) for part in lora.views())
    if not lora.rounds:
        return y + lora.scaling * grouped(grouped(x, a, ends), b, ends)
    added = lora.scaling * grouped(grouped(x.detach(), a, ends), b, ends)
    return y + (added - added.detach())  # the weight has it; here is its gradient
