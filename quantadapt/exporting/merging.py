"""Merge an adapter into the base without touching the model that is merged.

Each adapted layer gets a dense copy of its base weight for a moment, PEFT merges into that, and
the layer gets its facade back. The merged model is a copy in which those dense layers stand.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from ..errors import DataError
from ..evaluation.sizes import size_mib
from ..facade import QuantLinear, facades, wrap
from ..quantizing.state import ModelState, state_of

if TYPE_CHECKING:
    from peft import PeftModel


@torch.no_grad()
def merged_model(model: PeftModel, kind: Literal["dense", "requantize"]) -> nn.Module:
    """Return the base model with the active adapter merged in; `model` stays as it is.

    Args:
        model: a PeftModel over facades.
        kind: "dense" leaves `nn.Linear` layers; "requantize" quantizes the merged weights again
            as they were, and returns facades. A backend that calibrates sees the same examples.
    """
    state = state_of(model)
    if kind == "requantize" and state.backend.calibration:
        return _quantized_whole(merged_model(model, "dense"), state)
    base: nn.Module = model.get_base_model()
    memo: dict[int, Any] = {}
    layers = list(_adapter_layers(base))
    inner = {id(layer.base_layer) for layer in layers}  # merged with the layer around it
    for layer in layers:
        if id(layer) not in inner:
            memo[id(layer)] = merged_layer(layer, kind)
    for _, facade in facades(base):
        if kind == "dense":
            memo.setdefault(id(facade), facade.dense())
    for wrapper in _kept_wrappers(base):
        memo[id(wrapper)] = copy.deepcopy(wrapper.modules_to_save[wrapper.active_adapters[0]])
    return _copy(base, state, memo).requires_grad_(False)


def merged_bytes(model: PeftModel, kind: Literal["dense", "requantize"]) -> int:
    """Return what a checkpoint of the merged model takes, without merging."""
    base, mib = bare_base(model), 2**20
    found = size_mib(base) * mib
    if kind == "dense":
        for _, facade in facades(base):
            weights = facade.weight.numel() + (0 if facade.bias is None else facade.bias.numel())
            found += weights * facade.compute_dtype.itemsize - size_mib(facade) * mib
    return int(found)


def bare_base(model: PeftModel) -> nn.Module:
    """Return the base without any adapter: another tree of modules over the same tensors."""
    base: nn.Module = model.get_base_model()
    memo: dict[int, Any] = {id(facade): facade for _, facade in facades(base)}
    memo |= {id(layer): layer.get_base_layer() for layer in _adapter_layers(base)}
    memo |= {id(wrapper): wrapper.original_module for wrapper in _kept_wrappers(base)}
    memo |= {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    return _copy(base, state_of(model), memo)


def _copy(base: nn.Module, state: ModelState, memo: dict[int, Any]) -> nn.Module:
    memo[id(state.tokenizer)] = state.tokenizer
    copied: nn.Module = copy.deepcopy(base, memo)
    for name in ("peft_config", "_hf_peft_config_loaded"):
        if name in vars(copied):
            delattr(copied, name)
    return copied


def _quantized_whole(merged: nn.Module, state: ModelState) -> nn.Module:
    """Quantize a dense merged model in place, with the examples that its base was calibrated on."""
    if state.calibration is None:
        what = (
            f"{state.backend.name} calibrates when it quantizes, and there is no data to do it on"
        )
        raise DataError(what, fix="pass calibration=... (--calibration FILE)", where="calibration")
    model = state.quantizer.quantize(
        merged,
        device=state.device,
        dtype=state.dtype,
        calibration=state.calibration,
        skip_modules=state.skip_modules,
    )
    return wrap(model, state.quantizer.target, state.dtype, state.skip_modules).requires_grad_(
        False
    )


def _adapter_layers(base: nn.Module) -> Iterator[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in base.modules():
        if isinstance(module, BaseTunerLayer):
            yield module


def _kept_wrappers(base: nn.Module) -> Iterator[Any]:
    from peft.utils import ModulesToSaveWrapper

    for module in base.modules():
        if isinstance(module, ModulesToSaveWrapper):
            yield module


@torch.no_grad()
def merged_layer(layer: Any, kind: str) -> nn.Module:
    """Return the base layer of a PEFT layer with the adapter merged in; `layer` stays as it is."""
    facade = layer.get_base_layer()
    if not isinstance(facade, QuantLinear):
        return _merged_plain(layer, facade)
    dense = facade.dense()
    with _base_layer(layer, dense):
        layer.merge(safe_merge=True)
    if kind == "dense":
        return dense.requires_grad_(False)
    result = copy.deepcopy(facade)
    result.requantize(dense.weight)
    if dense.bias is not None:
        result.bias.data = dense.bias.data  # whether the vendor keeps a parameter or a tensor
    return result


def _merged_plain(layer: Any, base: nn.Module) -> nn.Module:
    """Merge a layer that is adapted but not quantized, e.g. a head named in target_modules.

    Experts are one module with several parameters; PEFT puts a layer for each around it, one around
    the other.
    """
    dense = copy.deepcopy(base)
    while layer is not base:
        before = layer.base_layer
        with _base_layer(layer, dense):
            layer.merge(safe_merge=True)
        layer = before
    return dense.requires_grad_(False)


@contextmanager
def _base_layer(layer: Any, replacement: nn.Module) -> Iterator[None]:
    """Let `layer` work on `replacement` for a moment, then forget that it merged."""
    before = layer.base_layer
    layer.base_layer = replacement
    try:
        yield
    finally:
        layer.base_layer = before
        layer.merged_adapters.clear()
