"""PEFT's `target_parameters` on quantized stacks of experts.

PEFT puts a `ParamWrapper` in front of the experts module, and adds the whole update to the
parameter in each forward: a second tensor as large as the dense weight. Here a plain LoRA is handed
to the experts' forward instead, which applies A and B to the tokens; anything else is added to the
weight as PEFT does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from .grouped import StackLora


def with_lent_lora(activate: Any) -> Any:
    """Return `ParamWrapper._activate_lora` as it is, and for quantized stacks of experts."""

    @wraps(activate)
    @contextmanager
    def activated(self: Any, active_adapters: list[str]) -> Iterator[None]:
        experts = self.get_base_layer()
        if self.parameter_name not in getattr(experts, "quantized_stacks", {}):
            with activate(self, active_adapters):
                yield
            return
        active = [name for name in active_adapters if name in self.lora_A]
        if len(active) == 1 and (lora := stack_lora(self, active[0])) is not None:
            lent = experts.lending(self.parameter_name, lora)
        else:
            deltas = [self.get_delta_weight(name) for name in active]
            lent = experts.adding(self.parameter_name, lambda weight: sum(deltas, weight))
        with lent:
            yield

    return activated


def stack_lora(wrapper: Any, adapter: str) -> StackLora | None:
    """Return the LoRA of one of PEFT's `ParamWrapper`s by expert; None where it is something
    else than a plain one."""
    experts = wrapper.get_base_layer()
    stack = experts.quantized_stacks[wrapper.parameter_name].stack
    a, b = wrapper.lora_A[adapter], wrapper.lora_B[adapter]
    sizes = (a.weight.shape[1], b.weight.shape[0])
    if sizes != (stack.in_features, stack.out_features) or b.bias is not None:
        return None
    if not experts.is_dispatched or adapter in wrapper.lora_variant:
        return None
    by_expert_a = a.weight.reshape(stack.experts, -1, stack.in_features)
    # PEFT keeps [out_features, r, experts].
    by_expert_b = b.weight.reshape(stack.out_features, -1, stack.experts).permute(2, 0, 1)
    return StackLora(by_expert_a, by_expert_b, wrapper.scaling[adapter])
