"""Merge an adapter into the base without touching the model that is merged.

Each adapted layer gets a dense copy of its base weight for a moment, PEFT merges into that, and
the layer gets its facade back. The merged model is a copy in which those dense layers stand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..adapting.merge_aware import make_merge_aware, standing_in
from ..adapting.target_problems import lost_biases
from ..errors import DataError, MergeRefused, NumbersError
from ..evaluation.predictions import evaluating
from ..evaluation.sizes import size_mib
from ..facade import (
    QuantExperts,
    QuantLinear,
    QuantStack,
    QuantWeight,
    densify,
    facades,
    wrap,
)
from ..model.half_precision import exactly, rounded_back
from ..model.modules import in_own_layout, make_linear
from ..planning.exports import MergeKind
from ..quantizing.state import ModelState, state_of
from .ties import settle_ties

if TYPE_CHECKING:
    from peft import PeftModel


@torch.no_grad()
def merged_model(model: PeftModel, kind: MergeKind, write: Write | None = None) -> nn.Module:
    """Return the base model with the active adapters merged in; `model` stays as it is.

    Args:
        model: a PeftModel over facades.
        kind: "dense" leaves `nn.Linear` layers; "requantize" quantizes the merged weights again
            as they were, and returns facades. A backend that calibrates sees the same examples.
            Of a model that was trained through the quantizer both hold the rounded weights that
            it was trained with.
        write: how merged weights come into a quantized layer; by default its backend quantizes
            them anew. Of a model that was trained through the quantizer they keep their scales.

    Raises:
        MergeRefused: a layer cannot hold what the adapter adds to it; see `check_mergeable`.
    """
    check_mergeable(model)
    state = state_of(model)
    if state.merge_aware and kind == "dense":
        return in_own_layout(densify(merged_model(model, "requantize")), state.conv1d)
    if state.merge_aware:
        make_merge_aware(model)  # layers that were adapted since, too
    calibrates = state.backend.calibration and state.quantizer.needs_data
    if state.merge_aware:
        write = _anew  # into layers that keep their scales
    if kind == "requantize" and calibrates and write is None:
        return _quantized_whole(merged_model(model, "dense"), state)
    memo = {id(state.tokenizer): state.tokenizer}
    merged = _copied(model.get_base_model(), kind, memo, write).requires_grad_(False)
    settle_ties(merged)
    return in_own_layout(merged, state.conv1d)


def check_mergeable(model: PeftModel) -> None:
    """Raise MergeRefused where a layer cannot hold what the active adapters add to it."""
    base: nn.Module = model.get_base_model()
    lost = [name for name, layer in adapted_parts(base) if _adds_bias(layer)]
    if problem := lost_biases(lost):
        raise MergeRefused([problem])


def _adds_bias(layer: Any) -> bool:
    """Say whether an active LoRA has a bias that the layer has no place for."""
    from peft.tuners.lora import LoraLayer

    if not isinstance(layer, LoraLayer):
        return False
    wanted = any(layer.lora_bias.get(name, False) for name in layer.active_adapters)
    return wanted and getattr(layer.get_base_layer(), "bias", None) is None


def merged_bytes(model: PeftModel, kind: MergeKind) -> int:
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
    tokenizer = state_of(model).tokenizer
    memo: dict[int, Any] = {id(facade): facade for _, facade in facades(base)}
    memo |= {id(part): _base_of(part) for _, part in adapted_parts(base)}
    memo |= {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    return _unmarked(copy.deepcopy(base, {**memo, id(tokenizer): tokenizer}))


def adapted_parts(root: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, module) of PEFT's modules in `root`, the outermost only: each stands where a
    module of the base stood, which it holds."""
    for name, module in _outermost(root, ""):
        if _is_pefts(module):
            yield name, module


def _outermost(root: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield PEFT's modules, quantized layers and experts, and nothing that lies inside of one."""
    for child_name, child in root.named_children():
        name = f"{prefix}{child_name}"
        if _is_pefts(child) or isinstance(child, (QuantLinear, QuantExperts)):
            yield name, child
        else:
            yield from _outermost(child, f"{name}.")


def _is_pefts(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))


def _base_of(part: Any) -> Any:
    """Return the module of the base that stands behind one of PEFT's."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    if not _is_pefts(part):
        return part
    wraps = isinstance(part, AuxiliaryTrainingWrapper)
    return _base_of(part.original_module if wraps else part.base_layer)


def _copied(
    root: nn.Module, kind: MergeKind, memo: dict[int, Any], write: Write | None = None
) -> nn.Module:
    """Return a copy of `root` with everything in it merged; each layer is made dense once."""
    if _is_pefts(root):
        return merged_part("", root, kind, memo, write)
    if kind == "dense" and isinstance(root, (QuantLinear, QuantExperts)):
        return _dense(root, memo)
    for name, module in _outermost(root, ""):
        if id(module) in memo:
            continue  # one module in two places
        if _is_pefts(module):
            memo[id(module)] = merged_part(name, module, kind, memo, write)
        elif kind == "dense":
            memo[id(module)] = _dense(module, memo)
    return _unmarked(copy.deepcopy(root, memo))


def _dense(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return a copy of a module of the base in which nothing is quantized; `memo` is that of a
    whole copy, if it is part of one."""
    if isinstance(module, QuantLinear):
        return module.dense()
    return module.dense(memo) if isinstance(module, QuantExperts) else copy.deepcopy(module, memo)


def _unmarked(copied: nn.Module) -> nn.Module:
    for name in ("peft_config", "_hf_peft_config_loaded"):
        if name in vars(copied):
            delattr(copied, name)
    return copied


def _quantized_whole(merged: nn.Module, state: ModelState) -> nn.Module:
    """Quantize a dense merged model in place, with the examples that its base was calibrated on."""
    if state.calibration is None:
        what = f"{state.backend.name} calibrates when it quantizes, and there is no data"
        what += " to do it on"
        raise DataError(what, fix="pass calibration=... (--calibration FILE)", where="calibration")
    model = state.quantizer.quantize(
        make_linear(merged, state.skip_modules),
        device=state.device,
        dtype=state.dtype,
        calibration=state.calibration,
        skip_modules=state.skip_modules,
    )
    wrapped = wrap(model, state.quantizer.target, state.dtype, state.skip_modules)
    return wrapped.requires_grad_(False)


@torch.no_grad()
def merged_part(
    name: str,
    part: Any,
    kind: MergeKind,
    memo: dict[int, Any] | None = None,
    write: Write | None = None,
) -> nn.Module:
    """Return the module of the base that stands behind one of PEFT's, with the active adapters
    merged in; `part` stays as it is. `memo` is that of a whole copy, if it is part of one. Raises
    NumbersError where that gives NaN or infinity."""
    from peft.utils.other import ModulesToSaveWrapper

    memo = {} if memo is None else memo
    try:
        if isinstance(part, ModulesToSaveWrapper):
            return _trained_whole(part, kind, memo, write)
        return _merged_layer(_unwrapped(part), kind, memo, write)
    except ValueError as error:  # PEFT looks at what it merges
        if "NaN" not in str(error):
            raise
        what = f"merged with the adapter, {name} holds values that are no numbers (NaN or infinity)"
        fix = "train the adapter again, with a lower learning rate or lora_alpha"
        raise NumbersError(what, fix=fix) from error


def _trained_whole(
    part: Any, kind: MergeKind, memo: dict[int, Any], write: Write | None
) -> nn.Module:
    """Return a copy of what PEFT trains in the place of a module, in the dtype of that."""
    trained, dtype = part.active_adapters, _dtype_of(_base_of(part))
    whole = part.modules_to_save[trained[0]] if trained else part.original_module
    copied = _copied(whole, kind, memo, write)
    if dtype is not None:  # it trains in float32
        names = [name for name, p in copied.named_parameters() if p.dtype == torch.float32]
        rounded_back(copied, dict.fromkeys(names, dtype))
    return copied.to(dtype).requires_grad_(False)


def _unwrapped(part: Any) -> Any:
    """Return the layer of PEFT's that `part` is or, where tokens are trained, has inside."""
    from peft.utils.other import TrainableTokensWrapper

    return part.token_adapter if isinstance(part, TrainableTokensWrapper) else part


def _dtype_of(module: nn.Module) -> torch.dtype | None:
    """Return the dtype in which a module computes."""
    for _, facade in facades(module):
        return facade.compute_dtype
    floating = (p.dtype for p in module.parameters() if p.is_floating_point())
    return next(floating, None)


def _merged_layer(
    layer: Any, kind: MergeKind, memo: dict[int, Any], write: Write | None
) -> nn.Module:
    """Merge a layer of PEFT's, and those that it stands around: experts are one module with several
    parameters, and PEFT puts a layer for each around it, one around the other; of a head that is
    tied to an embedding, it trains tokens behind an adapter."""
    around = [layer]
    while _is_pefts(around[-1].base_layer):
        around.append(_unwrapped(around[-1].base_layer))
    base: nn.Module = around[-1].base_layer
    if not hasattr(base, "num_experts"):
        memo = {}  # a layer that is tied must not hand on what is merged into it
    quantized = isinstance(base, (QuantLinear, QuantExperts)) and kind == "requantize"
    if quantized and write is not None:
        dense = _in_float32(base)
    else:
        dense = _dense(base, {} if quantized else memo)
    dtypes = exactly(dense)
    changed = [each for each in reversed(around) if _merges_into(each, dense)]
    rounded_back(dense, dtypes)
    if not quantized:
        return dense.requires_grad_(False)
    result = copy.deepcopy(base, memo)
    named = {getattr(each, "parameter_name", "weight") for each in changed}
    _requantize(base, result, dense, named, write or _anew)
    return result.requires_grad_(False)


def _in_float32(base: nn.Module) -> nn.Module:
    """Return a copy as `_dense` does, in float32: 16 bits would round small changes away before
    they are rounded with care, and what the grids of some backends hold, too."""
    with ExitStack() as exact:
        for weight in _quantized_weights(base).values():
            exact.enter_context(weight.computing_in(torch.float32))
        return _dense(base, {}).float()


Write = Callable[[QuantWeight, QuantWeight, Tensor], None]
"""Called with a facade of the base, its copy in the merged model, and the weight of a tall layer,
[out_features, in_features], that is to be written into the copy."""


def _anew(base: QuantWeight, copied: QuantWeight, weight: Tensor) -> None:
    copied.write(weight)


def _requantize(
    base: nn.Module, quantized: Any, dense: nn.Module, changed: Collection[str], write: Write
) -> None:
    """Write what `dense` holds into `quantized`, a copy of a quantized layer, or of quantized
    experts. Of the quantized weights only those that are named are quantized anew."""
    weights, before = _quantized_weights(quantized), _quantized_weights(base)
    for name, parameter in dense.named_parameters(recurse=False):
        if name not in weights:
            held = getattr(quantized, name)  # the vendor may keep it as a tensor
            held.data = parameter.data.to(held.dtype)
        elif name in changed:
            made = weights[name]
            tall = made.stack.tall(parameter.data) if isinstance(made, QuantStack) else parameter
            write(before[name], made, tall.data)


def _quantized_weights(module: Any) -> Mapping[str, QuantWeight]:
    """Return the quantized weights of a layer, or of experts, by the name of the parameter."""
    return module.quantized_stacks if isinstance(module, QuantExperts) else {"weight": module}


def _merges_into(layer: Any, dense: nn.Module) -> bool:
    """Merge the active adapters of one layer into `dense`; say whether there are any. As they are
    evaluated: in training VBLoRA refuses weights of which it holds no more than the largest."""
    with standing_in(layer, dense), evaluating(layer):
        layer.merge(safe_merge=True)
        return bool(layer.merged_adapters)
