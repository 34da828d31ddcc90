"""Stacks of experts: the 3-D parameters that hold one weight of all experts of a block.

To a quantizer that works along the inputs of a layer, rows are independent. So a stack of
[experts, out_features, in_features] is one tall linear layer, [experts * out_features,
in_features], and each layer-by-layer backend quantizes it with the code that it has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from .linears import linear_of
from .modules import is_skipped

SUFFIX = "_stack"
"""A quantized stack is a module beside where its parameter was: `experts.down_proj_stack`. So no
module is called as a layer is that adapters name: `down_proj` of shared experts, say."""


class Stack(NamedTuple):
    """One stack of experts.

    Attributes:
        name: full name of the parameter, e.g. "model.layers.0.mlp.experts.gate_up_proj".
        experts: how many there are.
        in_features, out_features: sizes of one expert's layer.
        transposed: whether the model keeps [experts, in_features, out_features], as gpt-oss does.
    """

    name: str
    experts: int
    in_features: int
    out_features: int
    transposed: bool

    @property
    def module(self) -> str:
        """Full name of the module that a quantized stack is."""
        return f"{self.name}{SUFFIX}"

    @property
    def rows(self) -> int:
        """Rows of the tall layer."""
        return self.experts * self.out_features

    def tall(self, stored: Tensor) -> Tensor:
        """Return the weight of the tall layer, [experts * out_features, in_features], of the
        parameter as the model keeps it."""
        weight = stored.transpose(1, 2) if self.transposed else stored
        return weight.reshape(self.rows, self.in_features)

    def stored(self, tall: Tensor) -> Tensor:
        """Return the parameter as the model keeps it, a view of the tall layer's weight."""
        weight = tall.view(self.experts, self.out_features, self.in_features)
        return weight.transpose(1, 2) if self.transposed else weight

    def as_linear(self, stored: Tensor) -> nn.Linear:
        """Return the tall layer of the parameter as the model keeps it; without bias."""
        return linear_of(self.tall(stored.detach()))


def expert_stacks(model: nn.Module, skip: tuple[str, ...]) -> Iterator[Stack]:
    """Yield the stacks that are dense parameters of `model` and are to be quantized."""
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            full = f"{name}.{key}".lstrip(".")
            if _is_stack(module, parameter) and not is_skipped(full, skip):
                yield _stack(full, module, parameter)  # type: ignore[arg-type]


def owns_stacks(module: nn.Module) -> bool:
    """Say whether `module` keeps stacks of experts, quantized or not."""
    parameters = module._parameters.values()
    return bool(stacks_of(module)) or any(_is_stack(module, p) for p in parameters)


def _is_stack(module: nn.Module, parameter: Tensor | None) -> bool:
    plain = type(parameter) is nn.Parameter and parameter.dtype.is_floating_point
    if not plain or parameter is None or parameter.ndim != 3:
        return False
    experts = getattr(module, "num_experts", None)
    return experts == parameter.shape[0] and min(parameter.shape) > 1


def _stack(name: str, module: nn.Module, parameter: Tensor) -> Stack:
    experts, rows, columns = parameter.shape
    transposed = _is_transposed(module, name.rpartition(".")[2], rows, columns)
    if transposed:
        rows, columns = columns, rows
    return Stack(name, experts, columns, rows, transposed)


def _is_transposed(module: nn.Module, key: str, rows: int, columns: int) -> bool:
    """Say whether `module` keeps [in_features, out_features] of each expert: it says so itself, or
    its sizes do."""
    if (said := getattr(module, "is_transposed", None)) is not None:
        return bool(said)
    if (inputs := getattr(module, "input_size", None)) is not None:
        return bool(columns != inputs)
    hidden = getattr(module, "hidden_size", getattr(module, "hidden_dim", None))
    if hidden is None or rows == columns:
        return False
    return bool(rows != hidden if key.startswith("down") else columns != hidden)


def is_dispatched(experts: nn.Module) -> bool:
    """Say whether transformers runs this module through its registry of experts' functions."""
    return hasattr(experts, "has_gate") and hasattr(experts, "is_transposed")


def layers_of(stack: Stack, parts: tuple[str, ...]) -> tuple[str, ...]:
    """Return names for the layers that hold a stack's rows one expert after the other, in their
    order: "experts.0.gate_proj", "experts.0.up_proj", "experts.1.gate_proj", ..., as they are
    called where experts are modules.

    Args:
        stack: names the parameter, "experts.gate_up_proj".
        parts: what the rows of one expert are made of, here "gate_proj" and "up_proj".
    """
    owner = stack.name.rpartition(".")[0]
    return tuple(f"{owner}.{n}.{part}" for n in range(stack.experts) for part in parts)


def set_stack(model: nn.Module, stack: Stack, made: nn.Module) -> None:
    """Put a vendor's module in the place of a stack, as `stack.module`. The module that owns it
    remembers the sizes: `stacks_of` tells them."""
    parent = model.get_submodule(stack.name.rpartition(".")[0])
    key = stack.name.rpartition(".")[2]
    for part in (parent, *made.modules()):
        part._is_hf_initialized = True  # type: ignore[assignment]
    vars(parent).setdefault("_order", tuple(parent._parameters))
    parent._parameters.pop(key, None)
    setattr(parent, f"{key}{SUFFIX}", made)
    parent.__dict__["_stacks"] = {**stacks_of(parent), f"{key}{SUFFIX}": stack}


def experts_in(module: nn.Module) -> int:
    """Return how many experts a module holds in stacks, quantized or not; 0 if it holds none."""
    dense = any(_is_stack(module, parameter) for parameter in module._parameters.values())
    return int(module.num_experts) if dense or stacks_of(module) else 0  # type: ignore[arg-type]


def set_dense(model: nn.Module, stack: Stack, parameter: nn.Parameter) -> None:
    """Put a dense parameter, as the model keeps it, in the place of a quantized stack."""
    parent = model.get_submodule(stack.name.rpartition(".")[0])
    key = stack.name.rpartition(".")[2]
    parent._modules.pop(f"{key}{SUFFIX}", None)
    own = in_order(parent, {**parent._parameters, key: parameter})
    parent._parameters.clear()
    parent._parameters.update(own)
    left = {k: s for k, s in stacks_of(parent).items() if k != f"{key}{SUFFIX}"}
    parent.__dict__["_stacks"] = left


def in_order(experts: nn.Module, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters of an experts module by name, in the order in which its class has them: by
    it PEFT nests what it puts around several of them, and names it in its files."""
    order = vars(experts).get("_order", ())
    names = [name for name in order if name in parameters]
    return {name: parameters[name] for name in dict.fromkeys([*names, *parameters])}


def stacks_of(module: nn.Module) -> dict[str, Stack]:
    """Return the quantized stacks of an experts module, by the name of the module of each."""
    found: dict[str, Stack] = vars(module).get("_stacks", {})
    return found
