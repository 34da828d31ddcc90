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

from ..model.experts import SUFFIX
from .expert_norms import StackNorms, dora_product
from .expert_steps import Added, add, combined, gated, gated_backward
from .grouped import Routing, StackLora, grouped, grouped_in_parts, grouped_outer
from .keeping import kept, taken
from .quant_weight import QuantWeight


def run_experts(
    experts: Any,
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    loras: Mapping[str, StackLora],
) -> Tensor:
    """Return what `experts` make of `hidden`, see `experts_forward`."""
    with torch.no_grad():
        routing = Routing.of(index, experts.num_experts)
    if (parts := _Parts.of(experts, hidden, loras)) is None:
        return _composed(experts, hidden, weights, routing, loras)
    if not torch.is_grad_enabled():
        return parts.forward(hidden, weights, routing)
    hidden, keeper = kept(hidden, weights, *routing)
    trained = [tensor for lora in parts.loras if lora for tensor in lora.trained]
    output: Tensor = _Experts.apply(hidden, weights, parts, routing, keeper, *trained)  # type: ignore[no-untyped-call]
    return output


class _Noted(NamedTuple):
    """What forward takes note of, by the stack's number.

    Attributes:
        rows: what the A of the LoRA on a stack made of its rows, [rows, r]; None where memory is
            short.
        norms: DoRA's.
    """

    rows: dict[int, Tensor] | None
    norms: dict[int, StackNorms]

    def of_rows(self, which: int) -> Tensor | None:
        """Return what A made of the rows, if it was kept."""
        return None if self.rows is None else self.rows.get(which)


class _Casts(NamedTuple):
    """LoRA on a stack, A [experts, r, in_features] and B [experts, out_features, r] in the dtype
    of the computation."""

    lora: StackLora
    a: Tensor
    b: Tensor

    def added(self, x: Tensor, ends: Tensor, made: Tensor | None = None) -> Added:
        """Return what it adds to what the stack makes of x; `made` is what A makes of it."""
        if made is None:
            made = self.lora.scaled(grouped(x, self.a.transpose(1, 2), ends))
        return Added(made, self.b)

    def beside(self, added: Added) -> Added | None:
        """Return what is added beside the weight; None where the weight has it."""
        return None if self.lora.rounds else added

    def backward_added(self, dy: Tensor, ends: Tensor) -> Added:
        """Return what it adds to the gradient of x: scaling * (dy B) A."""
        return Added(self.lora.scaled(grouped(dy, self.b, ends)), self.a.transpose(1, 2))

    def gradients(
        self, x: Tensor, added: Added, dy: Tensor, d_added: Added, ends: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return those of A and B."""
        da, db = grouped_outer(d_added.h, x, ends), grouped_outer(dy, added.h, ends)
        return self.lora.gradients(da, db)


class _Parts(NamedTuple):
    """What the function works with, besides tokens.

    Attributes:
        names: of the two stacks.
        loras: the LoRA on each, or None.
        dtype: in which all is computed.
    """

    experts: Any
    names: tuple[str, str]
    loras: tuple[StackLora | None, StackLora | None]
    dtype: torch.dtype

    @classmethod
    def of(cls, experts: Any, hidden: Tensor, loras: Mapping[str, StackLora]) -> _Parts | None:
        """Return them; None where more than LoRA is trained, or something stands in between."""
        names = _names(experts)
        biases = [_bias(experts, name) for name in names]
        stacks = [experts._modules.get(f"{name}{SUFFIX}") for name in names]
        quantized = [stack for stack in stacks if isinstance(stack, QuantWeight)]
        dense = [experts._parameters.get(name) for name in names]
        trained = any(t is not None and t.requires_grad for t in (*biases, *dense))
        # One that is neither is computed of something else, as where PEFT adapts a dense stack.
        there = sum(parameter is not None for parameter in dense) + len(quantized)
        if not quantized or there < len(names) or trained or _changes_later(experts):
            return None
        dtype = quantized[0].compute_dtype_for(hidden.device.type)
        return cls(experts, names, (loras.get(names[0]), loras.get(names[1])), dtype)

    def weight(self, which: int) -> Tensor:
        """Return a stack's weight, [experts, out_features, in_features]."""
        lora = self.loras[which]
        if (stack := self._stack(which)) is not None:
            found: Tensor = stack.by_expert(None if lora is None else lora.change())
        else:
            found = self.experts._parameters[self.names[which]].detach()
            found = found.transpose(1, 2) if self.experts.is_transposed else found
        return found.to(self.dtype)

    def bias(self, which: int) -> Tensor | None:
        """Return a stack's bias, [experts, out_features]."""
        return _bias(self.experts, self.names[which])

    def product(
        self,
        x: Tensor,
        which: int,
        ends: Tensor,
        *,
        back: bool = False,
        norms: StackNorms | None = None,
    ) -> Tensor:
        """Return x Wᵀ, by expert; `back`: x W. `norms` are filled in."""

        def turned(weight: Tensor, first: int = 0) -> Tensor:
            if norms is not None:
                norms.fill(weight, first)
            return weight if back else weight.transpose(1, 2)

        size = self._at_a_time(which, len(x), back=back)
        if size is None:
            return grouped(x, turned(self.weight(which)), ends)
        stack = self._stack(which)

        def weight(first: int, last: int) -> Tensor:
            return turned(stack.of_experts(first, last).to(self.dtype), first)

        columns = stack.stack.in_features if back else stack.stack.out_features
        return grouped_in_parts(x, ends, size, columns, weight)

    def _at_a_time(self, which: int, rows: int, *, back: bool) -> int | None:
        """Return how many experts of a stack are to be dequantized at a time for so many rows;
        None: all."""
        stack, lora = self._stack(which), self.loras[which]
        rounds = lora is not None and lora.rounds
        if stack is None or rounds or not self.experts.in_parts:
            return None
        if stack.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None  # what is recorded cannot wait for the device
        found: int | None = stack.at_a_time(rows, back=back)
        return found

    def _stack(self, which: int) -> Any:
        """Return a quantized stack; None where it is dense."""
        found = self.experts._modules.get(f"{self.names[which]}{SUFFIX}")
        return found if isinstance(found, QuantWeight) else None

    def casts(self, which: int) -> _Casts | None:
        """Return the LoRA on a stack, as products want it."""
        if (lora := self.loras[which]) is None:
            return None
        return _Casts(lora, *lora.by_expert(self.dtype))

    def output(
        self, which: int, x: Tensor, routing: Routing, noted: _Noted
    ) -> tuple[Tensor, Added | None]:
        """Return what a stack makes of rows, and what is still to be added to that."""
        lora, norms = self.casts(which), None
        if lora is not None and lora.lora.magnitude is not None:
            norms = noted.norms[which] = StackNorms.of(lora.lora)
        y = self.product(x, which, routing.ends, norms=norms)
        if lora is None or lora.lora.rounds:
            return y, None
        added = lora.added(x, routing.ends)
        if noted.rows is not None:
            noted.rows[which] = added.h
        if norms is None:
            return y, added
        return norms.scaled(add(y, added, routing), routing), None

    def forward(
        self, hidden: Tensor, weights: Tensor, routing: Routing, noted: _Noted | None = None
    ) -> Tensor:
        """Return what the experts make of the tokens.

        Args:
            noted: gets what backward need not make again.
        """
        noted = noted or _Noted(None, {})
        x = hidden.to(self.dtype)[routing.token]
        y, added = self.output(0, x, routing, noted)
        del x
        z = gated(self.experts, y, self.bias(0), added, routing.by_row(weights), routing)
        del y
        y, added = self.output(1, z, routing, noted)
        y = add(y, added, routing)
        del z
        output = combined(y, routing)
        if (bias := self.bias(1)) is not None:
            output = output.addmm_(_shares(weights, routing, self.dtype), bias.to(self.dtype))
        return output.to(hidden.dtype)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weights: Tensor,
        parts: _Parts,
        routing: Routing,
        keeper: Any,
        *trained: Tensor,
    ) -> Tensor:
        # A few numbers a row, which a recomputation does not make again either. Of a pass that is
        # to take the least memory norms alone.
        ctx.parts, ctx.keeper = parts, keeper
        ctx.noted = _Noted(None if parts.experts.in_parts else {}, {})
        if keeper is None:
            ctx.save_for_backward(hidden, weights, *routing)
        return parts.forward(hidden, weights, routing, ctx.noted)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        holder = ctx if ctx.keeper is None else ctx.keeper
        hidden, weights, *rest = taken(holder)
        noted: _Noted = ctx.noted
        ctx.noted = noted._replace(rows=None)  # given away; norms serve another pass, too
        with torch.autocast(hidden.device.type, enabled=False):
            found = _gradients(
                ctx.parts, grads[0], hidden, weights, Routing(*rest), noted, ctx.needs_input_grad[0]
            )
        dx, d_weights, *of_loras = found
        return dx, d_weights, None, None, None, *of_loras


def _gradients(
    parts: _Parts,
    d_output: Tensor,
    hidden: Tensor,
    weights: Tensor,
    routing: Routing,
    noted: _Noted,
    wants_dx: bool,
) -> list[Tensor | None]:
    """Return the gradients of the hidden states, of the routing weights, and of each A and B and
    DoRA's magnitudes.

    In such an order that no more than one weight is there at a time, and rows as few as can be.
    """
    ends, first, second = routing.ends, parts.casts(0), parts.casts(1)
    of_first, of_second = noted.norms.get(0), noted.norms.get(1)
    d_output, share = d_output.to(parts.dtype), routing.by_row(weights)
    x = hidden.to(parts.dtype)[routing.token]
    y, added = parts.product(x, 0, ends), first and first.added(x, ends, noted.of_rows(0))
    beside, before = first and added and first.beside(added), None
    if of_first is not None:
        before, beside = add(y, beside, routing), None
        y = of_first.scaled(before.clone(), routing)
    dy = d_output[routing.token]
    if of_second is not None:
        dy = of_second.scaled(dy, routing)
    dz = parts.product(dy, 1, ends, back=True)
    d_added = second and second.backward_added(dy, ends)
    d_up, z, d_share = gated_backward(
        parts.experts,
        y,
        parts.bias(0),
        beside,
        share,
        routing,
        dz,
        second and d_added and second.beside(d_added),
    )
    del y, dz
    of_loras: list[Tensor] = []
    if second and d_added:
        again = second.added(z, ends, noted.of_rows(1))
        of_loras += second.gradients(z, again, dy, d_added, ends)
        del dy
        if of_second is not None:
            made = add(parts.product(z, 1, ends), again, routing)
            of_loras.append(of_second.gradient(d_output[routing.token], made, routing))
            del made
    del z, d_added
    of_magnitudes: list[Tensor] = []
    if of_first is not None and before is not None:
        of_magnitudes.append(of_first.gradient(d_up, before, routing))
        d_up, before = of_first.scaled(d_up, routing), None
    d_added = first and first.backward_added(d_up, ends)
    if first and added and d_added:
        of_loras = [*first.gradients(x, added, d_up, d_added, ends), *of_magnitudes, *of_loras]
    del x, added
    dx = None
    if wants_dx:
        dx = parts.product(d_up, 0, ends, back=True)
        beside = first and d_added and first.beside(d_added)
        dx = combined(add(dx, beside, routing), routing).to(hidden.dtype)
    d_weights = routing.by_token(d_share)
    if (bias := parts.bias(1)) is not None:
        of_bias = torch.nn.functional.pad(d_output @ bias.to(parts.dtype).T, (0, 1))
        d_weights = d_weights + of_bias.gather(1, _kinds(routing))
    return [dx, d_weights.to(weights.dtype), *of_loras]


def _shares(weights: Tensor, routing: Routing, dtype: torch.dtype) -> Tensor:
    """Return the routing weight of each expert for each token, [tokens, experts]."""
    count = len(routing.ends)
    made = weights.new_zeros(weights.shape[0], count + 1)
    return made.scatter_add_(1, _kinds(routing), weights)[:, :count].to(dtype)


def _kinds(routing: Routing) -> Tensor:
    """Return the experts of each token, [tokens, k]; their number where it is none."""
    return routing.by_token(routing.expert).long()


def _names(experts: Any) -> tuple[str, str]:
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def _bias(experts: Any, name: str) -> Tensor | None:
    return getattr(experts, f"{name}_bias") if experts.has_bias else None


def _changes_later(experts: Any) -> bool:
    """Say whether an adapter changes a weight itself, or a norm follows the experts."""
    return bool(experts._deltas) or getattr(experts, "has_post_expert_norm", False)


def _composed(
    experts: Any,
    hidden: Tensor,
    weights: Tensor,
    routing: Routing,
    loras: Mapping[str, StackLora],
) -> Tensor:
    """As `run_experts`, for whatever is trained: autograd sees each product, and keeps weights."""
    first, second = _names(experts)
    y = _linear(experts, first, hidden[routing.token], routing, loras.get(first))
    y = experts._apply_gate(y) if experts.has_gate else experts.act_fn(y)
    y = _linear(experts, second, y, routing, loras.get(second))
    if getattr(experts, "has_post_expert_norm", False):
        y = experts.post_expert_norm(y)
    share = weights[routing.token, _place(routing)].unsqueeze(-1)
    # Rows of no expert hold anything: a mask and not a product, which would keep NaN.
    y = torch.where(routing.is_routed(), y * share, 0)
    return y[routing.row].sum(1).to(hidden.dtype)


def _place(routing: Routing) -> Tensor:
    """Return which of its token's experts each row is for: int64 [rows]."""
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
    if (bias := _bias(experts, name)) is not None:
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
