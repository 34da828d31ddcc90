"""A checkpoint as a model whose linear layers stay on disk and are read when they are needed.

The same facade as for any backend stands in front of each layer, so PEFT attaches to it and the
model runs, in the memory of one layer at a time (and the embeddings).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..facade import mark_conv1d, wrap
from ..loading.accounting import account_for
from ..loading.reading import architecture, renaming
from ..loading.tensors import Checkpoint
from ..model.linears import conv1d_layers, is_conv1d
from ..model.modules import linear_layers, set_submodule
from ..protocols import AdapterTarget


class StoredLinear(nn.Module):
    """A linear layer of which only the sizes, and a bias, are in memory.

    Attributes:
        transposed: whether it is stored as [in_features, out_features], as `Conv1D` is.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        key: str,
        linear: nn.Linear,
        device: str,
        *,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.checkpoint, self.key, self.transposed = checkpoint, key, transposed
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("place", torch.empty(0, device=device), persistent=False)
        self.bias: nn.Parameter | None = None
        bias = f"{key.removesuffix('weight')}bias"
        if bias in checkpoint:
            self.bias = nn.Parameter(checkpoint.read(bias).to(device), requires_grad=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredLinear:
        return self  # nothing in it ever changes


class StoredTarget(AdapterTarget):
    """`StoredLinear`. A changed weight goes to a file of its own, in a temporary folder."""

    def __init__(self) -> None:
        self.scratch = tempfile.TemporaryDirectory(prefix="quantadapt-")

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, StoredLinear)

    def dequantize(self, module: nn.Module) -> Tensor:
        stored: Any = module
        weight: Tensor = stored.checkpoint.read(stored.key)
        weight = weight.to(stored.place.device)
        return weight.t() if stored.transposed else weight

    def requantize(self, module: nn.Module, weight: Tensor) -> nn.Module:
        from safetensors.torch import save_file

        stored: Any = module
        folder = Path(tempfile.mkdtemp(dir=self.scratch.name))
        save_file({stored.key: weight.cpu().contiguous()}, folder / "model.safetensors")
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        changed = StoredLinear(Checkpoint(str(folder)), stored.key, linear, stored.place.device)
        changed.bias = stored.bias
        return changed.train(stored.training)


def open_stored(source: str, *, device: str = "cpu", dtype: torch.dtype) -> nn.Module:
    """Return the model of a checkpoint with its linear layers left on disk, behind facades.

    Args:
        source: folder or hub id of an unquantized safetensors checkpoint.
        device: where the rest of the model is, and where layers go when they are read.
        dtype: in which the model computes.

    Raises:
        ModelError: it is quantized, it holds more or other tensors than its config says, or not one
            for each parameter, as where experts are stored one by one.
    """
    from accelerate import init_empty_weights

    checkpoint = Checkpoint(source)
    with init_empty_weights(include_buffers=False):
        model = architecture(source, device="cpu")
    renamed = renaming(model)
    keys = {renamed(key): key for key in checkpoint.files}
    account_for(model, source, {name: checkpoint.shapes[key] for name, key in keys.items()})
    for name, linear in list(linear_layers(model, ())):
        if key := keys.get(f"{name}.weight"):
            transposed = is_conv1d(model.get_submodule(name))
            stored = StoredLinear(checkpoint, key, linear, device, transposed=transposed)
            set_submodule(model, name, stored)
    _read_rest(model, checkpoint, keys, device, dtype)
    model.requires_grad_(False)
    wrap(model, StoredTarget(), dtype)
    mark_conv1d(model, conv1d_layers(model))
    return model.eval()


def _read_rest(
    model: nn.Module,
    checkpoint: Checkpoint,
    keys: Mapping[str, str],
    device: str,
    dtype: torch.dtype,
) -> None:
    """Read what is no linear layer: embeddings, norms, and a head that is tied to them. `keys` are
    those in the checkpoint, by parameter."""
    for name, module in model.named_modules():
        for key in module._parameters:
            full = f"{name}.{key}".lstrip(".")
            if module._parameters[key] is not None and full in keys:
                value = checkpoint.read(keys[full]).to(device, dtype)
                module._parameters[key] = nn.Parameter(value, requires_grad=False)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)
    model.tie_weights()  # type: ignore[operator]
    if missing := [n for n, p in model.named_parameters() if p.device.type == "meta"]:
        what = f"no tensor of it is one of these weights: {', '.join(missing[:3])}"
        fix = "merge in memory: load(ADAPTER, base=quantize(BASE, 'none')), then merge"
        raise ModelError(what, fix=fix, where=str(checkpoint.folder))
