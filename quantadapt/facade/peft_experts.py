"""PEFT's `target_parameters` on quantized stacks of experts.

PEFT puts a `ParamWrapper` in front of the experts module, and adds the whole update to the
parameter in each forward: a second tensor as large as the dense weight. Here a plain LoRA is handed
to the experts' forward instead, which applies A and B to the tokens; anything else is added to the
weight as PEFT does. Where it trains through the quantizer (`merge_aware`), the sum is rounded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor

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
        lora = stack_lora(self, active[0]) if len(active) == 1 else None
        if lora is not None and not (lora.rounds and lora.magnitude is not None):
            lent = experts.lending(self.parameter_name, lora)
        elif active and getattr(self, "merge_aware", False):
            rounded = _rounded(self, active)
            lent = experts.adding(self.parameter_name, lambda weight: rounded)
        else:
            deltas = [self.get_delta_weight(name) for name in active]
            lent = experts.adding(self.parameter_name, lambda weight: sum(deltas, weight))
        with lent:
            yield

    return activated


def _rounded(wrapper: Any, active: list[str]) -> Tensor:
    """Return the parameter with the adapters merged in and rounded, as the model keeps it. Its
    gradient goes to them as if nothing were rounded."""
    stack = wrapper.get_base_layer().quantized_stacks[wrapper.parameter_name]
    # In 16 bits what is far below a step would be gone before it is rounded.
    whole = torch.autocast(stack.device.type, enabled=False), stack.computing_in(torch.float32)
    with torch.no_grad(), whole[0], whole[1]:
        change = sum(wrapper.get_delta_weight(name) for name in active)
    with torch.no_grad():
        rounded = stack.moved(stack.stack.tall(change)).to(stack.compute_dtype)
        weight: Tensor = stack.stack.stored(rounded)
    if torch.is_grad_enabled():
        smooth = sum(wrapper.get_delta_weight(name) for name in active)
        weight = weight + (smooth - smooth.detach())
    return weight


def single_stack_lora(wrapper: Any) -> StackLora | None:
    """Return the only active adapter's LoRA of one of PEFT's `ParamWrapper`s; None where it is
    something else than a plain one, or more than one."""
    active = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
    if wrapper.disable_adapters or wrapper.merged or len(active) != 1:
        return None
    return stack_lora(wrapper, active[0])


def stack_wrappers(model: Any) -> Iterator[Any]:
    """Yield PEFT's `ParamWrapper`s of quantized stacks in `model`."""
    kind: Any = getattr(sys.modules.get("peft.tuners.lora.layer"), "ParamWrapper", None)
    for module in model.modules() if kind is not None else ():
        if isinstance(module, kind):
            experts: Any = module.get_base_layer()  # type: ignore[attr-defined]
            if module.parameter_name in getattr(experts, "quantized_stacks", {}):
                yield module


def stack_lora(wrapper: Any, adapter: str) -> StackLora | None:
    """Return the LoRA or DoRA of one of PEFT's `ParamWrapper`s by expert; None where it is
    something else."""
    experts = wrapper.get_base_layer()
    stack = experts.quantized_stacks[wrapper.parameter_name].stack
    a, b = wrapper.lora_A[adapter], wrapper.lora_B[adapter]
    sizes = (a.weight.shape[1], b.weight.shape[0])
    if sizes != (stack.in_features, stack.out_features) or b.bias is not None:
        return None
    if not experts.is_dispatched or adapter in wrapper.lora_variant:
        return None
    magnitudes = wrapper.lora_magnitude_vector
    magnitude = magnitudes[adapter].weight if adapter in magnitudes else None
    return StackLora(
        a.weight,
        b.weight,
        wrapper.scaling[adapter],
        stack.experts,
        magnitude=magnitude,
        rounds=getattr(wrapper, "merge_aware", False),
    )
