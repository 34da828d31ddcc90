"""One of the two stacks of a block's experts in a pass: its products with rows, and LoRA's.

`fused_experts` puts two of them together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..model.experts import SUFFIX
from .expert_norms import StackNorms
from .expert_steps import Added, add
from .grouped import Routing, StackLora, grouped, grouped_in_parts, grouped_outer
from .quant_weight import QuantWeight


def stack_names(experts: Any) -> tuple[str, str]:
    """Return what the first and the second stack of `experts` are called."""
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def stack_bias(experts: Any, name: str) -> Tensor | None:
    """Return the bias of a stack, [experts, out_features]; None where it has none."""
    return getattr(experts, f"{name}_bias") if experts.has_bias else None


def quantized_stack(experts: Any, name: str) -> Any:
    """Return the `QuantWeight` of a stack; None where the stack is dense."""
    found = experts._modules.get(f"{name}{SUFFIX}")
    return found if isinstance(found, QuantWeight) else None


class Stack(NamedTuple):
    """A stack whose weight is frozen, quantized or dense.

    Attributes:
        experts: the module that has it.
        name: of the parameter that it is, or was.
        lora: what is trained on it.
        dtype: in which it computes.
    """

    experts: Any
    name: str
    lora: StackLora | None
    dtype: torch.dtype

    @property
    def quantized(self) -> Any:
        """The `QuantWeight`; None where the stack is dense."""
        return quantized_stack(self.experts, self.name)

    @property
    def bias(self) -> Tensor | None:
        """[experts, out_features]."""
        return stack_bias(self.experts, self.name)

    @property
    def rounds(self) -> bool:
        """Whether LoRA is in the weight, rounded with it, and not added beside."""
        return self.lora is not None and self.lora.rounds

    def weight(self) -> Tensor:
        """Return the weight, [experts, out_features, in_features]."""
        if (stack := self.quantized) is not None:
            found: Tensor = stack.by_expert(None if self.lora is None else self.lora.change())
        else:
            found = self.experts._parameters[self.name].detach()
            found = found.transpose(1, 2) if self.experts.is_transposed else found
        return found.to(self.dtype)

    def product(
        self, x: Tensor, ends: Tensor, *, back: bool = False, norms: StackNorms | None = None
    ) -> Tensor:
        """Return x Wᵀ by expert, [rows, out_features]; `back`: x W, [rows, in_features].

        Args:
            x: [rows, in_features] in `dtype`, sorted by expert; `back`: [rows, out_features].
            ends: int32 [experts], where the rows of each expert end.
            norms: DoRA's; filled in while the weight is there.
        """

        def turned(weight: Tensor, first: int = 0) -> Tensor:
            if norms is not None:
                norms.fill(weight, first)
            return weight if back else weight.transpose(1, 2)

        size = self._experts_at_a_time(len(x), back=back)
        if size is None:
            return grouped(x, turned(self.weight()), ends)
        stack = self.quantized

        def weight(first: int, last: int) -> Tensor:
            return turned(stack.of_experts(first, last).to(self.dtype), first)

        columns = stack.stack.in_features if back else stack.stack.out_features
        return grouped_in_parts(x, ends, size, columns, weight)

    def _experts_at_a_time(self, rows: int, *, back: bool) -> int | None:
        """Return how many experts are to be dequantized at a time for so many rows; None: all."""
        stack = self.quantized
        if stack is None or self.rounds or not self.experts.in_parts:
            return None
        if stack.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None  # what is recorded cannot wait for the device
        found: int | None = stack.at_a_time(rows, back=back)
        return found


@dataclass
class Noted:
    """What the forward pass of a stack leaves for its backward.

    Attributes:
        keeps_low: whether `low` is kept; not where memory is short.
        low: what LoRA's A made of the rows, scaled, [rows, r].
        norms: DoRA's.
    """

    keeps_low: bool = False
    low: Tensor | None = None
    norms: StackNorms | None = None

    def give_low(self) -> Tensor | None:
        """Return `low` and let go of it: it is made again for another backward."""
        low, self.low = self.low, None
        return low


class StackPass:
    """A stack in a pass of some rows, which are `routing`'s.

    LoRA's A [experts, r, in_features] and B [experts, out_features, r] are in the dtype of the
    computation. Where there is none, what it adds is None, and it has no gradients.
    """

    def __init__(self, stack: Stack, routing: Routing, noted: Noted) -> None:
        self.stack, self.routing, self.noted = stack, routing, noted
        lora = stack.lora
        self._lora = None if lora is None else (lora, *lora.by_expert(stack.dtype))

    @property
    def norms(self) -> StackNorms | None:
        """DoRA's, once `output` has made them; None of a plain LoRA."""
        return self.noted.norms

    # --- forward -----------------------------------------------------------------------------

    def output(self, x: Tensor) -> tuple[Tensor, Added | None]:
        """Return what the stack makes of x [rows, in_features], and what LoRA is still to add."""
        lora, norms = self.stack.lora, None
        if lora is not None and lora.magnitude is not None:
            norms = self.noted.norms = StackNorms.of(lora)
        y = self.stack.product(x, self.routing.ends, norms=norms)
        if self.stack.rounds:
            return y, None
        added = self.added(x)
        if added is not None and self.noted.keeps_low:
            self.noted.low = added.h
        if norms is None:
            return y, added
        return norms.scaled(add(y, added, self.routing), self.routing), None

    def added(self, x: Tensor) -> Added | None:
        """Return what LoRA adds to what the stack makes of x [rows, in_features]."""
        if self._lora is None:
            return None
        lora, a, b = self._lora
        if (low := self.noted.give_low()) is None:
            low = lora.scaled(grouped(x, a.transpose(1, 2), self.routing.ends))
        return Added(low, b)

    def beside(self, added: Added | None) -> Added | None:
        """Return what is added beside the product; None where the weight has it."""
        return None if self.stack.rounds else added

    # --- backward ----------------------------------------------------------------------------

    def output_again(self, x: Tensor) -> tuple[Tensor, Added | None, Added | None, Tensor | None]:
        """Return what `output` returned of x, and what backward needs to go on from there.

        Returns:
            y [rows, out_features], what LoRA is still to add to it, what LoRA adds wherever that
            is, and with DoRA what norms have scaled, [rows, out_features].
        """
        y, added = self.stack.product(x, self.routing.ends), self.added(x)
        if self.norms is None:
            return y, self.beside(added), added, None
        before = add(y, self.beside(added), self.routing)
        return self.scaled(before.clone()), None, added, before

    def scaled(self, y: Tensor) -> Tensor:
        """Return what DoRA's norms make of [rows, out_features], in its memory: of an output, and
        of the gradient of one."""
        return y if self.norms is None else self.norms.scaled(y, self.routing)

    def product_back(self, dy: Tensor) -> Tensor:
        """Return dy W: the gradient of x, without what LoRA adds to that."""
        return self.stack.product(dy, self.routing.ends, back=True)

    def added_back(self, dy: Tensor) -> Added | None:
        """Return what LoRA adds to the gradient of x: scaling * (dy B) A."""
        if self._lora is None:
            return None
        lora, a, b = self._lora
        return Added(lora.scaled(grouped(dy, b, self.routing.ends)), a.transpose(1, 2))

    def lora_gradients(
        self, x: Tensor, added: Added | None, dy: Tensor, d_added: Added | None
    ) -> list[Tensor]:
        """Return the gradients of A and B.

        Args:
            added, d_added: what `added` returned of x, and `added_back` of dy.
        """
        if self._lora is None or added is None or d_added is None:
            return []
        ends = self.routing.ends
        da, db = grouped_outer(d_added.h, x, ends), grouped_outer(dy, added.h, ends)
        return [*self._lora[0].gradients(da, db)]

    def magnitude_gradients(self, dy: Tensor, before: Tensor | None) -> list[Tensor]:
        """Return the gradient of DoRA's magnitudes, [experts, out_features], if there are any.

        Args:
            dy: [rows, out_features], the gradient of what norms have scaled.
            before: what that was before; its memory is used again.
        """
        if self.norms is None or before is None:
            return []
        return [self.norms.gradient(dy, before, self.routing)]
