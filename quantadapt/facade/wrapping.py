"""Facades in a model: put in front of a vendor's layers, found, and replaced by something else."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator

import torch
from torch import nn

from ..errors import PluginError
from ..model.modules import is_skipped
from ..protocols import AdapterTarget
from .layer import QuantLinear


def mark_conv1d(model: nn.Module, names: Container[str]) -> None:
    """Tell the facades called `names` that the model's own class has a `Conv1D` there."""
    for name, facade in facades(model):
        facade.conv1d = name in names


def facades(model: nn.Module) -> Iterator[tuple[str, QuantLinear]]:
    """Yield (name, facade) for every facade in `model`."""
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            yield name, module


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
    seen: set[tuple[int, int]] = set()
    wrapped: tuple[str, ...] = ()
    for name, module in list(model.named_modules()):
        if f"{name}.".startswith(wrapped):
            continue  # a vendor's layer, or a part of one
        for child_name, child in list(module.named_children()):
            path = f"{name}.{child_name}".lstrip(".")
            if isinstance(child, QuantLinear) or is_skipped(path, skip):
                continue
            if target.matches(child):
                try:
                    setattr(module, child_name, _checked(child, target, dtype, seen))
                    wrapped = (*wrapped, f"{path}.")
                except PluginError as error:
                    raise PluginError(f"{path}: {error}") from None
    return model


def _checked(
    vendor: nn.Module, target: AdapterTarget, dtype: torch.dtype, seen: set[tuple[int, int]]
) -> QuantLinear:
    """Return a facade whose weight has the shape that `target` claims; each shape is tried once."""
    name, shape = type(target).__name__, target.shape(vendor)
    if not all(isinstance(size, int) and size > 0 for size in shape):
        raise PluginError(f"{name}.shape returned {shape}, expected two sizes")
    facade = QuantLinear(vendor, target, dtype)
    if shape not in seen:
        found, claimed = tuple(facade.dequantize().shape), (shape[1], shape[0])
        if found != claimed:
            what = f"{name}.dequantize returned {found}, its shape says {claimed} (out, in)"
            raise PluginError(what, fix="tell the authors of the backend")
        seen.add(shape)
    return facade


def replace(model: nn.Module, make: Callable[[str, QuantLinear], nn.Module]) -> nn.Module:
    """Replace every facade in `model` by `make(name, facade)`, one at a time, in place."""
    for name, facade in list(facades(model)):
        parent_name, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent_name), child, make(name, facade))
    return model


def unwrap(model: nn.Module) -> nn.Module:
    """Take the facades away again, in place: the vendor's modules stand where they stood."""
    return replace(model, lambda _, facade: facade.vendor)


def densify(model: nn.Module) -> nn.Module:
    """Replace every facade by an ordinary `nn.Linear` with the dequantized weight, in place."""
    return replace(model, lambda _, facade: facade.dense())
