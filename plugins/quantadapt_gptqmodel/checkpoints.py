"""What is special about the checkpoints of GPTQ and AWQ, and about layers that others loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from quantadapt.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

_READABLE = re.compile(
    "Torch(Aten|Fused)?(Awq)?Linear|TritonV2Linear|AwqTorchLinear|AwqGEMM(Triton)?Linear"
)

SCALES_OF_ACTIVATIONS = ("act.scales", "gelu_impl.scales")


def check_readable(name: str, module: nn.Module) -> None:
    """Raise ModelError where the kernel of a live layer keeps weights in an order of its own."""
    kind = next(c.__name__ for c in type(module).__mro__ if c.__module__.startswith("gptqmodel"))
    repacked = "inference" in str(getattr(module, "linear_mode", None)).lower()
    if not _READABLE.fullmatch(kind) or repacked or getattr(module, "planar", False):
        what = f"{name} is a {kind}, which keeps its weights in an order of its own"
        fix = "load it with gptqmodel's backend 'torch', or pass the path of the checkpoint"
        raise ModelError(what, fix=fix, where="model")


def layout_of(config: Any) -> str | None:
    """Return the layout that a `quantization_config` names, under one of three keys."""
    keys = ("checkpoint_format", "format", "version")
    return next((str(config[key]).lower() for key in keys if config.get(key)), None)


@contextmanager
def zeros_less_one(layers: list[Any]) -> Iterator[None]:
    """Let `layers` hold their zeros less one for a moment."""
    from quantadapt_gptqmodel.codes import add_to_packed

    before = [layer.qzeros for layer in layers]
    try:
        for layer in layers:
            layer.qzeros = add_to_packed(layer.qzeros, layer.bits, -1)
        yield
    finally:
        for layer, zeros in zip(layers, before, strict=True):
            layer.qzeros = zeros


def check_activations(path: str) -> None:
    """Raise ModelError where an AWQ checkpoint divides the outputs of activation functions, as some
    of old architectures do."""
    from safetensors import safe_open

    from quantadapt.loading import local_folder

    for file in local_folder(path).glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (not a dict)
                if key.endswith(SCALES_OF_ACTIVATIONS):
                    scales = opened.get_tensor(key)
                    if not bool((scales == 1).all()):
                        what = f"{key}: activations that are rescaled cannot be loaded"
                        fix = "quantize the original model again"
                        raise ModelError(what, fix=fix, where=path)


@contextmanager
def scales_of_activations(model: nn.Module) -> Iterator[None]:
    """Add scales of 1 to the activation functions of some architectures for a moment: transformers
    does not load their AWQ checkpoints without."""
    import torch
    from torch import nn
    from transformers.integrations.awq import AWQ_SCALES_MAPPINGS

    config: Any = model.config
    names = AWQ_SCALES_MAPPINGS.get(config.model_type, {})
    changed: list[nn.Module] = []
    for module in model.modules() if names else ():
        before, act = (getattr(module, names[k], None) for k in ("layer_before_act", "act"))
        if isinstance(before, nn.Linear) and isinstance(act, nn.Module):
            act.register_parameter("scales", nn.Parameter(torch.ones(before.out_features)))
            changed.append(act)
    try:
        yield
    finally:
        for act in changed:
            act._parameters.pop("scales", None)
