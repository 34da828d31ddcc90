"""PEFT's `target_parameters` on quantized stacks of experts.

PEFT puts a `ParamWrapper` in front of the experts module, and adds the whole update to the
parameter in each forward: a second tensor as large as the dense weight. Here a plain LoRA is handed
to the experts' forward instead, which applies A and B to the tokens; anything else is added to the
weight as PEFT does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from .grouped import StackLora

_IN_TRAINING = "_lora_in_training"
_taught: set[type] = set()


def teach_peft() -> None:
    """Have PEFT's `ParamWrapper` know quantized experts, once it is imported. Changes how it works
    on them alone. To be called wherever PEFT meets such experts."""
    kind: Any = getattr(sys.modules.get("peft.tuners.lora.layer"), "ParamWrapper", None)
    if kind is None or kind in _taught or not hasattr(kind, "_activate_lora"):
        return
    _taught.add(kind)
    kind._activate_lora = _activating(kind._activate_lora)


def _activating(activate: Any) -> Any:
    @wraps(activate)
    @contextmanager
    def activated(self: Any, active_adapters: list[str]) -> Iterator[None]:
        experts = self.get_base_layer()
        if self.parameter_name not in getattr(experts, "quantized_stacks", {}):
            with activate(self, active_adapters):
                yield
            return
        active = [name for name in active_adapters if name in self.lora_A]
        if (lora := _active_lora(self, active)) is not None:
            lent = experts.lending(self.parameter_name, lora)
        else:
            lent = experts.adding(self.parameter_name, lambda weight: _sum(self, active, weight))
        with lent:
            yield

    return activated


def _sum(wrapper: Any, active: list[str], weight: Any) -> Any:
    for name in active:
        weight = weight + wrapper.get_delta_weight(name)
    return weight


def _active_lora(wrapper: Any, active: list[str]) -> StackLora | None:
    """Return the only active adapter's LoRA; as it was lent, while the model trains."""
    if len(active) != 1:
        return None
    name, lora = wrapper.__dict__.get(_IN_TRAINING, (None, None))
    return lora if name == active[0] else stack_lora(wrapper, active[0])


def single_stack_lora(wrapper: Any) -> StackLora | None:
    """Return the only active adapter's LoRA of one of PEFT's `ParamWrapper`s; None where it is
    something else than a plain one, or more than one."""
    active = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
    if wrapper.disable_adapters or wrapper.merged or len(active) != 1:
        return None
    return stack_lora(wrapper, active[0])


def lend_stack_lora(wrapper: Any) -> StackLora | None:
    """Look up once what `single_stack_lora` returns, and make its casts, which are to be kept up to
    date. Taken back by `take_back_stack_lora`."""
    if (lora := single_stack_lora(wrapper)) is None:
        return None
    stack = wrapper.get_base_layer().quantized_stacks[wrapper.parameter_name]
    lora = lora._replace(casts=lora.by_expert(stack.compute_dtype_for(lora.a.device.type)))
    (name,) = (name for name in wrapper.active_adapters if name in wrapper.lora_A)
    wrapper.__dict__[_IN_TRAINING] = name, lora
    return lora


def take_back_stack_lora(wrapper: Any) -> None:
    """Forget what `lend_stack_lora` looked up."""
    wrapper.__dict__.pop(_IN_TRAINING, None)


def stack_wrappers(model: Any) -> Iterator[Any]:
    """Yield PEFT's `ParamWrapper`s of quantized stacks in `model`."""
    kind: Any = getattr(sys.modules.get("peft.tuners.lora.layer"), "ParamWrapper", None)
    for module in model.modules() if kind is not None else ():
        if isinstance(module, kind):
            experts: Any = module.get_base_layer()  # type: ignore[attr-defined]
            if module.parameter_name in getattr(experts, "quantized_stacks", {}):
                yield module


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
    return StackLora(a.weight, b.weight, wrapper.scaling[adapter], stack.experts)
