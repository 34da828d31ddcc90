"""Scales of what goes into layers, where files hold them: of the smallest and the largest number
that calibration examples bring there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantadapt.errors import ModelError
from quantadapt_compressed_tensors.layers import library_args
from quantadapt_compressed_tensors.schemes import Scheme

RANGE = "quantadapt_input_range"
"""Attribute of a dense layer: the smallest and the largest number that went into it."""


@torch.no_grad()
def with_ranges(
    source: str | nn.Module,
    examples: list[dict[str, Tensor]],
    device: str,
    dtype: torch.dtype,
    skip_modules: tuple[str, ...] | None,
) -> nn.Module:
    """Return the dense model after all examples; its layers know the range of their inputs."""
    from quantadapt.loading import from_pretrained, linear_layers, skipped_modules

    model = source
    if isinstance(model, str):
        model = from_pretrained(model, dtype=dtype, device_map={"": device})
    model.to(device)
    layers = dict(linear_layers(model, skipped_modules(model, skip_modules)))
    hooks = [layer.register_forward_pre_hook(_note) for layer in layers.values()]
    training = model.training
    model.eval()
    try:
        for example in examples:
            model(**{name: tensor.to(device) for name, tensor in example.items()})
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    if missed := [name for name, layer in layers.items() if not hasattr(layer, RANGE)]:
        what = f"calibration did not reach {', '.join(missed[:3])} ({len(missed)} layers)"
        raise ModelError(what, fix="give examples that use them, or add to skip_modules")
    return model


def _note(layer: Any, given: tuple[Any, ...]) -> None:
    low, high = given[0].detach().float().aminmax()
    if (known := getattr(layer, RANGE, None)) is not None:
        low, high = torch.minimum(low, known[0]), torch.maximum(high, known[1])
    setattr(layer, RANGE, (low, high))


def input_scales(scheme: Scheme, linear: nn.Linear) -> dict[str, nn.Parameter]:
    """Return what a layer of this scheme holds of its inputs, by name."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    inputs, found = scheme.inputs, getattr(linear, RANGE, None)
    if inputs is None or not inputs.has_own_scale:
        return {}
    if found is None:
        what = "nothing is known of what goes into this layer, which its scheme takes a scale from"
        raise ModelError(what, fix="use a scheme without it: FP8_DYNAMIC, or NVFP4A16")
    if inputs.strategy == "tensor_group":
        made = {"input_global_scale": generate_gparam(*found)}
    else:
        scale, zero = calculate_qparams(*found, library_args(inputs))
        made = {"input_scale": scale.to(linear.weight.dtype)}
        if not inputs.symmetric:
            made["input_zero_point"] = zero
    return {name: nn.Parameter(value, requires_grad=False) for name, value in made.items()}
