"""A checkpoint as a model whose layers stay on disk and are read when they are needed.

The same facades as for any backend stand in front of linear layers and stacks of experts, so PEFT
attaches to them and the model runs, in the memory of one layer at a time (and the embeddings).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..facade import mark_conv1d, wrap
from ..loading.accounting import account_for, listed
from ..loading.conversion import Parameters
from ..loading.reading import architecture
from ..loading.tensors import Checkpoint
from ..model.experts import Stack, expert_stacks, set_stack
from ..model.linears import conv1d_layers, is_conv1d
from ..model.modules import linear_layers, set_submodule
from ..protocols import AdapterTarget


class StoredLayer(nn.Module):
    """A layer of which only the sizes, and a bias, are in memory.

    Args:
        read: returns the weight, [out_features, in_features].
        sizes: in_features and out_features.
        device: where the weight goes when it is read.
    """

    def __init__(
        self,
        read: Callable[[], Tensor],
        sizes: tuple[int, int],
        device: str,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.read, (self.in_features, self.out_features) = read, sizes
        self.register_buffer("place", torch.empty(0, device=device), persistent=False)
        self.bias: nn.Parameter | None = None
        if bias is not None:
            self.bias = nn.Parameter(bias.to(device), requires_grad=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredLayer:
        return self  # nothing in it ever changes


class StoredTarget(AdapterTarget):
    """`StoredLayer`. A changed weight goes to a file of its own, in a temporary folder."""

    def __init__(self) -> None:
        self.scratch = tempfile.TemporaryDirectory(prefix="quantadapt-")

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, StoredLayer)

    def dequantize(self, module: nn.Module) -> Tensor:
        stored: Any = module
        weight: Tensor = stored.read()
        return weight.to(stored.place.device)

    def requantize(self, module: nn.Module, weight: Tensor) -> nn.Module:
        from safetensors.torch import save_file

        stored: Any = module
        folder = Path(tempfile.mkdtemp(dir=self.scratch.name))
        save_file({"weight": weight.cpu().contiguous()}, folder / "model.safetensors")
        changed = Checkpoint(str(folder))
        sizes = stored.in_features, stored.out_features
        made = StoredLayer(lambda: changed.read("weight"), sizes, stored.place.device)
        made.bias = stored.bias
        return made.train(stored.training)


def open_stored(
    source: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype,
    parameters: Parameters | None = None,
) -> nn.Module:
    """Return the model of a checkpoint with its layers left on disk, behind facades.

    Args:
        source: folder or hub id of an unquantized safetensors checkpoint.
        device: where the rest of the model is, and where layers go when they are read.
        dtype: in which the model computes.
        parameters: those of that checkpoint, where it is open already.

    Raises:
        ModelError: it is quantized, or holds more, other or less tensors than its config says.
    """
    from accelerate import init_empty_weights

    stored = parameters or stored_parameters(source)
    with init_empty_weights(include_buffers=False):
        model = architecture(source, device="cpu")
    account_for(model, source, stored.shapes())
    for name, linear in list(linear_layers(model, ())):
        if f"{name}.weight" in stored:
            conv1d = is_conv1d(model.get_submodule(name))
            set_submodule(model, name, _stored_linear(stored, name, linear, device, conv1d))
    for stack in list(expert_stacks(model, ())):
        if stack.name in stored:
            set_stack(model, stack, _stored_stack(stored, stack, device))
    _read_rest(model, stored, device, dtype)
    model.requires_grad_(False)
    wrap(model, StoredTarget(), dtype)
    mark_conv1d(model, conv1d_layers(model))
    return model.eval()


def stored_parameters(source: str) -> Parameters:
    """Return the parameters of a checkpoint, a folder or hub id, in its files."""
    return Parameters(Checkpoint(source), architecture(source))


def _stored_linear(
    stored: Parameters, name: str, linear: nn.Linear, device: str, conv1d: bool
) -> StoredLayer:
    def read() -> Tensor:
        weight = stored.read(f"{name}.weight")
        return weight.t() if conv1d else weight

    bias = stored.read(f"{name}.bias") if f"{name}.bias" in stored else None
    return StoredLayer(read, (linear.in_features, linear.out_features), device, bias)


def _stored_stack(stored: Parameters, stack: Stack, device: str) -> StoredLayer:
    sizes = stack.in_features, stack.rows
    return StoredLayer(lambda: stack.tall(stored.read(stack.name)), sizes, device)


def _read_rest(model: nn.Module, stored: Parameters, device: str, dtype: torch.dtype) -> None:
    """Read what stays in memory: embeddings, norms, and a head that is tied to them."""
    for name, module in model.named_modules():
        for key in module._parameters:
            full = f"{name}.{key}".lstrip(".")
            if module._parameters[key] is not None and full in stored:
                value = stored.read(full).to(device, dtype)
                module._parameters[key] = nn.Parameter(value, requires_grad=False)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                full = f"{name}.{key}".lstrip(".")
                value = stored.read(full).to(buffer.dtype) if full in stored else buffer
                module._buffers[key] = value.to(device)
    model.tie_weights()  # type: ignore[operator]
    if missing := [n for n, p in model.named_parameters() if p.device.type == "meta"]:
        fix = "download it again, or check that config.json and the weights belong together"
        raise ModelError(
            f"it has no {listed(missing)}", fix=fix, where=str(stored.checkpoint.folder)
        )
