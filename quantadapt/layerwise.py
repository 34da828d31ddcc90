"""Quantize while loading, and load and save what was quantized, for layer-by-layer backends.

transformers does the reading (shards, renamed keys, tied weights, buffers); it meets one quantizer
of ours that turns each `nn.Linear` into a vendor module the moment its weight arrives. So the peak
is the quantized model, one layer, and the weights that `read_ahead` has read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import ModelError
from .loading import reading
from .loading.blocks import Blocks
from .loading.mxfp4 import conversions, is_mxfp4
from .loading.read_ahead import reading_ahead
from .loading.vendor_modules import LinearQuantizer, SaysHow, own_if_dense, quantized_stack
from .loading.writing import being_written
from .model.dense import skipped_modules
from .model.experts import expert_stacks, set_stack
from .model.linears import as_linear
from .model.modules import linear_layers, set_submodule, wanted_dtype
from .model.numbers import refuse_not_numbers


def quantize_layerwise(
    quantizer: LinearQuantizer,
    source: str | nn.Module,
    *,
    device: str,
    dtype: torch.dtype,
    skip: tuple[str, ...] | None = None,
) -> nn.Module:
    """Quantize a checkpoint while loading it, or a live module in place, see `Quantizer`."""
    if isinstance(source, nn.Module):
        return _quantize_module(quantizer, source, device=device, dtype=dtype, skip=skip)
    from .loading.hf_quantizer import LoaderConfig

    loader = LoaderConfig(quantizer=quantizer, skip=skip)
    if is_mxfp4(reading.read_config(source)):
        loader.conversions = conversions()
    try:
        with reading_ahead(device):
            model = reading.from_pretrained(
                source,
                dtype=dtype,
                device_map={"": device},
                quantization_config=loader,
                mismatched=loader.mismatched,
            )
    except ModelError:
        if loader.failure is not None:  # transformers tells only that some conversion failed
            raise loader.failure from None
        raise
    return reading.unmarked(model)


def _quantize_module(
    quantizer: LinearQuantizer,
    model: nn.Module,
    *,
    device: str,
    dtype: torch.dtype,
    skip: tuple[str, ...] | None,
) -> nn.Module:
    vendors: set[nn.Module] = set()
    skip = skipped_modules(model, skip)
    linears = dict(linear_layers(model, skip))
    stacks = list(expert_stacks(model, skip))
    blocks = Blocks(model, [*linears, *(stack.name for stack in stacks)])
    for name in list(linears):
        linear = linears.pop(name)
        own = model.get_submodule(name).requires_grad_(False)
        if linear is own:
            linear.to(device=device, dtype=dtype)
        else:
            linear = as_linear(own.to(device=device, dtype=dtype))
        refuse_not_numbers((f"{name}.{key}", p.data) for key, p in own.named_parameters())
        vendor = own_if_dense(quantizer.quantize_linear(linear), linear, own)
        vendors.update(vendor.modules())
        set_submodule(model, name, vendor.train(linear.training))
        blocks.add(model, name, vendor)
    for stack in stacks:
        stored = model.get_parameter(stack.name).data
        refuse_not_numbers([(stack.name, stored)])
        made = quantized_stack(quantizer, stack, stored.to(device=device, dtype=dtype))
        if made is not None:
            vendors.update(made.modules())
            set_stack(model, stack, made)
        blocks.add(model, stack.name, made)
    moved: dict[nn.Parameter, nn.Parameter] = {}
    wanted = wanted_dtype(model, dtype)
    for name, module in model.named_modules():
        if module not in vendors:
            _move_own(module, f"{name}.", device, wanted, moved)
    return model


def _move_own(
    module: nn.Module,
    prefix: str,
    device: str,
    wanted: Callable[[str], torch.dtype],
    moved: dict[nn.Parameter, nn.Parameter],
) -> None:
    """Move what stays dense; floating point parameters also get the dtype that is wanted for their
    name. Tied ones stay tied: `moved` remembers what became of each."""
    for name, parameter in module._parameters.items():
        if parameter is not None and type(parameter) is nn.Parameter:
            if parameter not in moved:
                floats = parameter.is_floating_point()
                target = wanted(prefix + name) if floats else parameter.dtype
                data = parameter.data.to(device=device, dtype=target)
                moved[parameter] = nn.Parameter(data, requires_grad=parameter.requires_grad)
            module._parameters[name] = moved[parameter]
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = buffer.to(device)


def load_layerwise(
    quantizer: LinearQuantizer, path: str, *, device: str, dtype: torch.dtype
) -> nn.Module:
    """Load a checkpoint that `save_layerwise` wrote. See `Quantizer.load`."""
    from .loading.hf_quantizer import LoaderConfig

    config = copy.deepcopy(reading.read_config(path))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    loader = LoaderConfig(quantizer=quantizer, packed=path, device=device)
    model = reading.from_pretrained(
        path,
        config=config,
        dtype=dtype,
        device_map={"": device},
        quantization_config=loader,
        consumed=loader.consumed,
        mismatched=loader.mismatched,
    )
    reading.remember_stacks(model)
    return reading.unmarked(model)


def save_layerwise(
    quantizer: SaysHow, model: nn.Module, path: Path, *, hf_quantizer: Any = None
) -> None:
    """Write config.json (with `quantization_config`) and model.safetensors into `path`.

    Args:
        quantizer: says what goes into config.json.
        model: with or without facades; not changed.
        path: an existing, empty folder.
        hf_quantizer: transformers' quantizer, where its format needs help to fit into safetensors.
    """
    config: Any = model.config
    config.quantization_config = quantizer.quantization_config() | _left_dense(quantizer, model)
    if hf_quantizer is not None:
        model.hf_quantizer = hf_quantizer
    try:
        with reading.stacks_as_they_are(model), being_written(model):
            model.save_pretrained(path)  # type: ignore[operator]
    finally:
        reading.unmarked(model)


def _left_dense(quantizer: SaysHow, model: nn.Module) -> dict[str, Any]:
    """Return what the checkpoint has to say about layers that stay dense."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    dense = dict(linear_layers(model, ()))
    head = next((name for name, layer in dense.items() if layer is output), None)
    return quantizer.left_dense([*dense], head)
