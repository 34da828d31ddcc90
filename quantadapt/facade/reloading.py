"""`load_state_dict` for the layer of a vendor, which may read fewer tensors than it writes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..protocols import AdapterTarget


def reload(
    vendor: Any,
    target: AdapterTarget,
    state_dict: dict[str, Tensor],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> nn.Module:
    """Load a layer's tensors as torch's `_load_from_state_dict` does, and return the layer: another
    one where the vendor's own cannot take them all. The bias is loaded by itself: vendors keep it
    in ways that a parameter is not loaded by, and an adapter's file may hold it alone."""
    bias, key = vendor._parameters.get("bias"), f"{prefix}bias"
    given = state_dict.get(key)
    found = [name for name in state_dict if name.startswith(prefix)]
    loaded: nn.Module = vendor
    if bias is not None and found == [key]:
        missing_keys.append(f"{prefix}weight")
    else:
        if bias is not None:
            vendor.bias = None
            state_dict = {name: t for name, t in state_dict.items() if name != key}
        vendor._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if _is_left_unread(vendor, state_dict, prefix, unexpected_keys):
            try:
                loaded = target.restore(vendor, _own(state_dict, prefix)).train(vendor.training)
            except (ModelError, KeyError, ValueError, RuntimeError) as error:
                said = f"no {error}" if isinstance(error, KeyError) else str(error).strip()
                error_msgs.append(f"{prefix.rstrip('.')} cannot be made of these tensors: {said}")
        loaded.requires_grad_(False)  # some make new parameters
    if bias is not None:
        _load_bias(loaded, bias, given, key, local_metadata, missing_keys, error_msgs)
        if loaded is not vendor:
            vendor.bias = None
    return loaded


def _own(state_dict: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in state_dict.items() if k.startswith(prefix)}


def _is_left_unread(
    vendor: nn.Module, state_dict: dict[str, Tensor], prefix: str, unexpected_keys: list[str]
) -> bool:
    """Tell apart what a vendor writes and does not read (some leave their scales as they are): the
    numbers that are there anyway are expected; say whether there are others. What it knows nothing
    of is unexpected, though not every vendor says so."""
    given = _own(state_dict, prefix)
    own = vendor.state_dict() if given else {}
    known = {name.partition(".")[0] for name in own}
    differs = False
    for name, tensor in given.items():
        key = f"{prefix}{name}"
        if key not in unexpected_keys:
            if name.partition(".")[0] not in known:
                unexpected_keys.append(key)
        elif name in own:
            unexpected_keys.remove(key)
            differs |= not torch.equal(own[name], tensor.to(own[name].device))
    return differs


def _load_bias(
    loaded: Any,
    bias: Tensor,
    given: Tensor | None,
    key: str,
    local_metadata: dict[str, Any],
    missing_keys: list[str],
    error_msgs: list[str],
) -> None:
    loaded.bias = bias
    if given is None:
        missing_keys.append(key)
    elif given.shape != bias.shape:
        sizes = f"{tuple(given.shape)} in the file, {tuple(bias.shape)} in the model"
        error_msgs.append(f"size mismatch for {key}: {sizes}")
    elif local_metadata.get("assign_to_params_buffers") or bias.is_meta:
        loaded.bias = nn.Parameter(given, requires_grad=bias.requires_grad)
    else:
        with torch.no_grad():
            bias.copy_(given)
