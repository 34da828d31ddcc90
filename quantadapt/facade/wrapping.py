"""Facades in a model: put in front of a vendor's layers, found, and replaced by something else."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from typing import Any

import torch
from torch import nn

from ..errors import PluginError
from ..model.experts import SUFFIX, Stack, set_dense, stacks_of
from ..model.modules import is_skipped
from ..protocols import AdapterTarget
from .experts import QuantStack, become_dense, become_quantized
from .linear import QuantLinear
from .quant_weight import QuantWeight


def mark_conv1d(model: nn.Module, names: Container[str]) -> None:
    """Tell the facades called `names` that the model's own class has a `Conv1D` there."""
    for name, facade in linear_facades(model):
        facade.conv1d = name in names


def facades(model: nn.Module) -> Iterator[tuple[str, QuantLinear | QuantStack]]:
    """Yield (name, facade) for every facade in `model`, of layers and of stacks of experts."""
    for name, module in model.named_modules():
        if isinstance(module, (QuantLinear, QuantStack)):
            yield name, module


def linear_facades(model: nn.Module) -> Iterator[tuple[str, QuantLinear]]:
    """Yield (name, facade) for every quantized linear layer in `model`."""
    for name, facade in facades(model):
        if isinstance(facade, QuantLinear):
            yield name, facade


def stack_facades(model: nn.Module) -> Iterator[tuple[str, QuantStack]]:
    """Yield (name of the parameter, facade) for every quantized stack of experts in `model`."""
    for name, facade in facades(model):
        if isinstance(facade, QuantStack):
            yield name.removesuffix(SUFFIX), facade


def wrap(
    model: nn.Module, target: AdapterTarget, dtype: torch.dtype, skip: tuple[str, ...] = ()
) -> nn.Module:
    """Put a facade in front of every vendor layer that `target` matches, in place.

    Args:
        model: holds vendor modules; a single vendor module is returned wrapped.
        target: the backend's view of its layers.
        dtype: compute dtype of the facades.
        skip: names of modules that stay as they are.

    Raises:
        PluginError: the target's `shape` is not that of its dequantized weight.
    """
    if not isinstance(model, QuantLinear) and target.matches(model):
        return _checked(model, target, dtype, set())
    seen: set[Any] = set()
    wrapped: tuple[str, ...] = ()
    for name, module in list(model.named_modules()):
        if f"{name}.".startswith(wrapped):
            continue  # a vendor's layer, or a part of one
        for child_name, child in list(module.named_children()):
            path = f"{name}.{child_name}".lstrip(".")
            if isinstance(child, QuantWeight) or is_skipped(path, skip):
                continue
            if target.matches(child):
                try:
                    stack = stacks_of(module).get(child_name)
                    facade = _checked(child, target, dtype, seen, stack)
                    setattr(module, child_name, facade)
                    if isinstance(facade, QuantStack):
                        become_quantized(module)
                    wrapped = (*wrapped, f"{path}.")
                except PluginError as error:
                    raise PluginError(f"{path}: {error}") from None
    return model


def _checked(
    vendor: nn.Module,
    target: AdapterTarget,
    dtype: torch.dtype,
    seen: set[Any],
    stack: Stack | None = None,
) -> QuantLinear | QuantStack:
    """Return a facade whose weight has the shape that `target` claims; each shape is tried once for
    tensors of the same sizes: one that was cut in its file is found before anything runs."""
    name, shape = type(target).__name__, target.shape(vendor)
    if not all(isinstance(size, int) and size > 0 for size in shape):
        raise PluginError(f"{name}.shape returned {shape}, expected two sizes")
    facade: QuantLinear | QuantStack
    if stack is None:
        facade = QuantLinear(vendor, target, dtype)
    else:
        facade = QuantStack(vendor, target, dtype, stack)
        if shape != (stack.in_features, stack.rows):
            what = f"{name}.shape returned {shape}, the stack has {stack.in_features, stack.rows}"
            raise PluginError(what)
    tried = (shape, _sizes(vendor))
    if tried not in seen:
        found, claimed = _dequantized_shape(facade, name), (shape[1], shape[0])
        if found != claimed:
            what = f"{name}.dequantize returned {found}, its shape says {claimed} (out, in)"
            raise PluginError(what, fix="tell the authors of the backend")
        seen.add(tried)
    return facade


def _sizes(vendor: nn.Module) -> frozenset[tuple[str, torch.Size]]:
    tensors = vendor.state_dict().items()
    return frozenset((name, t.shape) for name, t in tensors if isinstance(t, torch.Tensor))


def _dequantized_shape(facade: QuantLinear | QuantStack, name: str) -> tuple[int, ...]:
    try:
        return tuple(facade.dequantize().shape)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, LookupError) as error:
        what = f"{name}.dequantize fails: {type(error).__name__}: {error}"
        fix = "get the checkpoint again; if it is whole, tell the authors of the backend"
        raise PluginError(what, fix=fix) from error


def replace(
    model: nn.Module,
    make: Callable[[str, QuantLinear | QuantStack], nn.Module | nn.Parameter],
) -> nn.Module:
    """Replace every facade in `model` by `make(name, facade)`, one at a time, in place: a stack of
    experts by a module or a dense parameter."""
    for name, facade in list(facades(model)):
        parent_name, _, child = name.rpartition(".")
        parent, made = model.get_submodule(parent_name), make(name, facade)
        if isinstance(made, nn.Parameter):
            assert isinstance(facade, QuantStack)
            set_dense(model, facade.stack._replace(name=name.removesuffix(SUFFIX)), made)
        else:
            setattr(parent, child, made)
        become_dense(parent)
    return model


def unwrap(model: nn.Module) -> nn.Module:
    """Take the facades away again, in place: the vendor's modules stand where they stood."""
    return replace(model, lambda _, facade: facade.vendor)


def densify(model: nn.Module) -> nn.Module:
    """Replace every facade by an ordinary `nn.Linear` with the dequantized weight, and stacks of
    experts by parameters, in place."""
    return replace(model, lambda _, facade: facade.dense())
