"""The experts of one block as one function of autograd.

y = Σ share · down(gate(up(x))) over the experts of each token, with LoRA on both stacks. Backward
needs the hidden states, the routing and what LoRA's A made of each row, a few numbers: rows are
gathered, weights dequantized and the first product made again. The routing weights are multiplied
into what the second stack gets, and not into what it makes, which backward would need for their
gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .composed_experts import run_composed
from .expert_stack import Noted, Stack, StackPass, quantized_stack, stack_bias, stack_names
from .expert_steps import add, combined, gated, gated_backward
from .grouped import Routing, StackLora
from .keeping import kept, taken

_Noted = tuple[Noted, Noted]
"""Of the first stack, and of the second."""


def run_experts(
    experts: Any,
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    loras: Mapping[str, StackLora],
) -> Tensor:
    """Return what `experts` make of `hidden`, see `experts_forward`.

    Args:
        loras: by the name of the stack.
    """
    with torch.no_grad():
        routing = Routing.of(index, experts.num_experts)
    if (block := _Block.of(experts, hidden, loras)) is None:
        return run_composed(experts, hidden, weights, routing, loras)
    if not torch.is_grad_enabled():
        return block.forward(hidden, weights, routing, (Noted(), Noted()))
    hidden, keeper = kept(hidden, weights, *routing)
    output: Tensor = _Experts.apply(hidden, weights, block, routing, keeper, *block.trained)  # type: ignore[no-untyped-call]
    return output


class _Block(NamedTuple):
    """The two stacks of a block's experts, and what stands between them.

    Attributes:
        experts: the module.
        dtype: in which all is computed.
    """

    experts: Any
    first: Stack
    second: Stack
    dtype: torch.dtype

    @classmethod
    def of(cls, experts: Any, hidden: Tensor, loras: Mapping[str, StackLora]) -> _Block | None:
        """Return them; None where more than LoRA is trained, or something stands in between."""
        names = stack_names(experts)
        biases = [stack_bias(experts, name) for name in names]
        dense = [experts._parameters.get(name) for name in names]
        trained = any(t is not None and t.requires_grad for t in (*biases, *dense))
        stacks = [quantized_stack(experts, name) for name in names]
        quantized = [stack for stack in stacks if stack is not None]
        # One that is neither is computed of something else, as where PEFT adapts a dense stack.
        there = sum(parameter is not None for parameter in dense) + len(quantized)
        if not quantized or there < len(names) or trained or _changes_later(experts):
            return None
        dtype = quantized[0].compute_dtype_for(hidden.device.type)
        first, second = (Stack(experts, name, loras.get(name), dtype) for name in names)
        return cls(experts, first, second, dtype)

    @property
    def trained(self) -> list[Tensor]:
        """What is trained: of LoRA on the first stack, then of that on the second."""
        loras = (self.first.lora, self.second.lora)
        return [tensor for lora in loras if lora for tensor in lora.trained]

    def forward(self, hidden: Tensor, weights: Tensor, routing: Routing, noted: _Noted) -> Tensor:
        """Return what the experts make of the tokens: [tokens, hidden] -> the same.

        Args:
            weights: [tokens, k], the routing weights.
            noted: gets what backward need not make again.
        """
        x = hidden.to(self.dtype)[routing.token]
        y, added = StackPass(self.first, routing, noted[0]).output(x)
        del x
        z = gated(self.experts, y, self.first.bias, added, routing.by_row(weights), routing)
        del y
        y, added = StackPass(self.second, routing, noted[1]).output(z)
        y = add(y, added, routing)
        del z
        output = combined(y, routing)
        if (bias := self.second.bias) is not None:
            output = output.addmm_(_shares(weights, routing, self.dtype), bias.to(self.dtype))
        return output.to(hidden.dtype)

    def gradients(
        self,
        d_output: Tensor,
        hidden: Tensor,
        weights: Tensor,
        routing: Routing,
        noted: _Noted,
        *,
        wants_dx: bool,
    ) -> list[Tensor | None]:
        """Return the gradients of `hidden` (None unless it is wanted), of `weights`, and of what is
        `trained`.

        In such an order that no more than one weight is there at a time, and rows as few as can be.
        """
        first = StackPass(self.first, routing, noted[0])
        second = StackPass(self.second, routing, noted[1])
        d_output, share = d_output.to(self.dtype), routing.by_row(weights)
        x = hidden.to(self.dtype)[routing.token]
        y, beside, added, before = first.output_again(x)
        dy = second.scaled(d_output[routing.token])
        dz, d_added = second.product_back(dy), second.added_back(dy)
        d_up, z, d_share = gated_backward(
            self.experts,
            y,
            self.first.bias,
            beside,
            share,
            routing,
            dz,
            second.beside(d_added),
        )
        del y, dz

        added_to_z = second.added(z)
        of_second = second.lora_gradients(z, added_to_z, dy, d_added)
        del dy
        if second.norms is not None:
            unscaled = add(self.second.product(z, routing.ends), added_to_z, routing)
            of_second += second.magnitude_gradients(d_output[routing.token], unscaled)
            del unscaled
        del z, d_added, added_to_z

        of_magnitudes = first.magnitude_gradients(d_up, before)
        del before
        d_up = first.scaled(d_up)
        d_added = first.added_back(d_up)
        of_first = first.lora_gradients(x, added, d_up, d_added) + of_magnitudes
        del x, added
        dx = None
        if wants_dx:
            dx = add(first.product_back(d_up), first.beside(d_added), routing)
            dx = combined(dx, routing).to(hidden.dtype)
        d_weights = self._weight_gradients(d_share, d_output, routing).to(weights.dtype)
        return [dx, d_weights, *of_first, *of_second]

    def _weight_gradients(self, d_share: Tensor, d_output: Tensor, routing: Routing) -> Tensor:
        """Return the gradient of the routing weights, [tokens, k]: d_share float32 [rows], and
        what comes through the second bias, which they multiply, too."""
        found = routing.by_token(d_share)
        if (bias := self.second.bias) is None:
            return found
        of_bias = torch.nn.functional.pad(d_output @ bias.to(self.dtype).T, (0, 1))
        return found + of_bias.gather(1, _chosen(routing))


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weights: Tensor,
        block: _Block,
        routing: Routing,
        keeper: Any,
        *trained: Tensor,
    ) -> Tensor:
        # A few numbers a row, which a recomputation does not make again either. Of a pass that is
        # to take the least memory norms alone.
        keeps_low = not block.experts.in_parts
        ctx.block, ctx.keeper = block, keeper
        ctx.noted = Noted(keeps_low), Noted(keeps_low)
        if keeper is None:
            ctx.save_for_backward(hidden, weights, *routing)
        return block.forward(hidden, weights, routing, ctx.noted)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        holder = ctx if ctx.keeper is None else ctx.keeper
        hidden, weights, *rest = taken(holder)
        block: _Block = ctx.block
        with torch.autocast(hidden.device.type, enabled=False):
            dx, d_weights, *of_loras = block.gradients(
                *(grads[0], hidden, weights, Routing(*rest), ctx.noted),
                wants_dx=ctx.needs_input_grad[0],
            )
        return dx, d_weights, None, None, None, *of_loras


def _shares(weights: Tensor, routing: Routing, dtype: torch.dtype) -> Tensor:
    """Return the routing weight of each expert for each token, [tokens, experts]."""
    count = len(routing.ends)
    made = weights.new_zeros(weights.shape[0], count + 1)
    return made.scatter_add_(1, _chosen(routing), weights)[:, :count].to(dtype)


def _chosen(routing: Routing) -> Tensor:
    """Return the experts of each token, int64 [tokens, k]; their number where it is none."""
    return routing.by_token(routing.expert).long()


def _changes_later(experts: Any) -> bool:
    """Say whether an adapter changes a weight itself, or a norm follows the experts."""
    return bool(experts._deltas) or getattr(experts, "has_post_expert_norm", False)
