"""Facades of experts: `QuantStack` in front of one quantized stack, `QuantExperts` in the place of
the module that owns it.

PEFT and model code find the parameters that they know, [experts, out_features, in_features] or
as the model keeps them, lazily. transformers runs the module through its registry of experts'
functions (`ALL_EXPERTS_FUNCTIONS`), where ours is called "quantadapt".
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..memory.experts import part_of
from ..model.experts import SUFFIX, Stack, in_order, is_dispatched, set_dense
from ..protocols import AdapterTarget
from .fused_experts import run_experts
from .grouped import StackLora
from .lazy_weight import LazyWeight
from .libraries import meet_libraries
from .peft_calls import copies_to_train, looks_for_parameters, replaces_module
from .quant_weight import QuantWeight

IMPLEMENTATION = "quantadapt"
"""What our function is called in transformers' registry."""


class QuantStack(QuantWeight):
    """One quantized stack of experts, as a tall layer. `in_features` and `out_features` are those
    of the tall layer, so `dequantize` and `write` take [experts * out_features, in_features].

    Args:
        vendor, target, dtype: as for `QuantWeight`.
        stack: the sizes, and how the model keeps the parameter.
    """

    def __init__(
        self, vendor: nn.Module, target: AdapterTarget, dtype: torch.dtype, stack: Stack
    ) -> None:
        super().__init__(vendor, target, dtype)
        self.stack = stack

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The parameter as the model keeps it: read lazily, and what is written into it is
        quantized into the stack."""
        return self.stack.stored(super().weight)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        if not (isinstance(value, LazyWeight) and value.is_part_of(self)):
            self.write(self.stack.tall(value))

    def dense(self) -> nn.Parameter:
        """Return the dequantized parameter as the model keeps it, a copy."""
        weight = self.stack.stored(self.dequantize().clone()).contiguous()
        return nn.Parameter(weight, requires_grad=False)

    def by_expert(self, change: Tensor | None = None) -> Tensor:
        """Return the dequantized weight, or what `moved` by `change` makes of it: [experts,
        out_features, in_features]."""
        stack = self.stack
        return self._dense(change).view(stack.experts, stack.out_features, stack.in_features)

    def at_a_time(self, rows: int = 0, *, back: bool = False) -> int | None:
        """Return how many experts are dequantized at a time where memory is short; None: all, where
        the backend cannot read rows alone, or parts take no less memory.

        Args:
            rows: how many go through all experts together.
            back: whether they go to what the stack gets, not to what it makes.
        """
        inputs, outputs = self.in_features, self.stack.out_features
        if not self.target.reads_rows:
            return None
        made = inputs if back else outputs
        return part_of(
            inputs * outputs, self.stack.experts, rows, made, self.compute_dtype.itemsize
        )

    def of_experts(self, first: int, last: int) -> Tensor:
        """Return what `by_expert` does, of the experts from `first` to before `last`."""
        stack = self.stack
        rows = self.dequantize_rows(first * stack.out_features, last * stack.out_features)
        return rows.view(-1, stack.out_features, stack.in_features)

    def extra_repr(self) -> str:
        stack, vendor = self.stack, type(self._vendor).__name__
        sizes = f"in_features={stack.in_features}, out_features={stack.out_features}"
        return f"experts={stack.experts}, {sizes}, vendor={vendor}"


class QuantExperts(nn.Module):
    """A model's experts module whose stacks are quantized. Made by `become_quantized`; the class of
    such a module is one of its own, below this class and the model's.

    Attributes:
        _loras: the LoRA on each stack, by the name of the parameter, while PEFT's layer runs.
        _deltas: what is added to a parameter when it is read, likewise.
        in_parts: whether a few experts are dequantized at a time, see `read_in_parts`.
    """

    in_parts: bool = False
    _loras: Mapping[str, StackLora] = {}
    _deltas: Mapping[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        stack = self.__dict__.get("_modules", {}).get(f"{name}{SUFFIX}")
        if not isinstance(stack, QuantStack):
            return super().__getattr__(name)
        delta = self._deltas.get(name)
        return stack.weight if delta is None else delta(stack.weight)

    def __setattr__(self, name: str, value: Any) -> None:
        stack = self.__dict__.get("_modules", {}).get(f"{name}{SUFFIX}")
        if not isinstance(stack, QuantStack):
            super().__setattr__(name, value)
        elif isinstance(value, Tensor):
            stack.weight = value
        else:
            what = f"{name} is a quantized stack of experts, no {type(value).__name__}"
            fix = "assign a tensor, or make it dense: quantadapt.facade.densify"
            raise ModelError(what, fix=fix)

    @property
    def quantized_stacks(self) -> dict[str, QuantStack]:
        """The quantized stacks, by the name of the parameter that each was."""
        modules = self._modules.items()
        return {n.removesuffix(SUFFIX): m for n, m in modules if isinstance(m, QuantStack)}

    @property
    def is_dispatched(self) -> bool:
        """Whether transformers runs this module through its registry of experts' functions."""
        return is_dispatched(self)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Any]]:
        """Yield the parameters; where PEFT looks for `target_parameters`, the stacks, too, and
        where it asks for the first one, of vendors that hold buffers only."""
        own = list(super().named_parameters(prefix, recurse, remove_duplicate))
        if not (looks_for_parameters() if not recurse else not own and replaces_module()):
            yield from own
            return
        meet_libraries()
        lead = f"{prefix}." if prefix else ""
        found: dict[str, Any] = {name.removeprefix(lead): parameter for name, parameter in own}
        found |= {name: stack.weight for name, stack in self.quantized_stacks.items()}
        for name, parameter in in_order(self, found).items():
            yield f"{lead}{name}", parameter

    @contextmanager
    def lending(self, name: str, lora: StackLora) -> Iterator[None]:
        """Inside, the forward applies `lora` to what the stack `name` gets."""
        with self._having("_loras", {**self._loras, name: lora}):
            yield

    @contextmanager
    def adding(self, name: str, delta: Any) -> Iterator[None]:
        """Inside, the parameter `name` reads as `delta(parameter)`: for adapters that change the
        weight itself. Deltas of one parameter add up, the first first."""
        inner = self._deltas.get(name)
        both = delta if inner is None else lambda weight: delta(inner(weight))
        with self._having("_deltas", {**self._deltas, name: both}):
            yield

    @contextmanager
    def _having(self, attribute: str, value: Any) -> Iterator[None]:
        own = self.__dict__
        before = own.get(attribute)
        own[attribute] = value
        try:
            yield
        finally:
            if before is None:
                del own[attribute]
            else:
                own[attribute] = before

    def dense(self, memo: dict[int, Any] | None = None) -> nn.Module:
        """Return a copy of the model's own class, with dense parameters in the place of the stacks.

        Args:
            memo: that of a whole copy, if this is part of one.
        """
        memo, stacks = {} if memo is None else memo, self.quantized_stacks
        memo |= {id(stack): stack for stack in stacks.values()}  # they are read, not copied
        copied = self._copied(memo)
        for name, stack in stacks.items():
            set_dense(copied, stack.stack._replace(name=name), stack.dense())
        become_dense(copied)
        return copied

    def _copied(self, memo: dict[int, Any]) -> nn.Module:
        memo[id(self)] = copied = _again(_model_class(self))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """Return a copy; a dense one where PEFT copies the experts to train them in full."""
        return self.dense(memo) if copies_to_train() else self._copied(memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        state: Any = self
        return _again, (_model_class(self),), state.__getstate__()


def experts_forward(
    self: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """Run experts, quantized or dense, as transformers' own functions of that registry do.

    Args:
        self: the module.
        hidden_states: [tokens, hidden].
        top_k_index: int64 [tokens, k], the experts of each token; those from `num_experts` on are
            none.
        top_k_weights: [tokens, k], with which their outputs are summed.

    Returns:
        [tokens, hidden], in the dtype of `hidden_states`.
    """
    loras = getattr(self, "_loras", {})
    return run_experts(self, hidden_states, top_k_index, top_k_weights, loras)


def become_quantized(experts: nn.Module) -> None:
    """Make an experts module one whose stacks are quantized, once a `QuantStack` is in it."""
    if not isinstance(experts, QuantExperts):
        kind: Any = type(experts)
        experts.__class__ = _quantized_class(kind)
        if is_dispatched(experts):
            _register()
            # A copy, for this module alone: dense experts beside it run as they did.
            config = copy.copy(vars(experts)["config"])
            config._experts_implementation_internal = IMPLEMENTATION
            experts.__dict__["_config_before"] = vars(experts)["config"]
            experts.config = config


def become_dense(experts: nn.Module) -> None:
    """Make an experts module one of the model's own class again, once no `QuantStack` is in it."""
    if isinstance(experts, QuantExperts) and not experts.quantized_stacks:
        experts.__class__ = _model_class(experts)
        experts.__dict__.pop("in_parts", None)
        if (config := experts.__dict__.pop("_config_before", None)) is not None:
            experts.config = config


def read_in_parts(model: nn.Module, on: bool) -> None:
    """Have large stacks of experts in `model` dequantized a few experts at a time, or whole. In
    parts takes less memory, more time, and a wait for the device in each pass through a layer."""
    for module in model.modules():
        if isinstance(module, QuantExperts) and module.in_parts != on:
            module.in_parts = on


@cache
def _quantized_class(kind: Any) -> Any:
    names = {name: getattr(kind, name) for name in ("__module__", "__doc__")}
    return type(f"Quant{kind.__name__}", (QuantExperts, kind), names)


def _model_class(experts: nn.Module) -> Any:
    kinds = type(experts).__mro__
    kind: Any = kinds[kinds.index(QuantExperts) - 1].__bases__[1]
    return kind


def _again(kind: Any) -> nn.Module:
    made: Any = _quantized_class(kind)
    module: nn.Module = made.__new__(made)
    return module


@cache
def _register() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
