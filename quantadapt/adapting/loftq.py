"""LoftQ (https://arxiv.org/abs/2310.08659) for any backend: LoRA starts from what quantization took
away, B A = SVD_r(W - Q). Further iterations quantize W - B A again, where the backend can.

PEFT's own `init_lora_weights="loftq"` goes past the backend and simulates NF4; here W - Q is the
real difference, through `AdapterTarget.dequantize`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, warn
from ..facade import QuantWeight
from ..planning.refusals import loftq_iterations
from ..quantizing.state import ModelState

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

OVERSAMPLING, POWER_ITERATIONS = 16, 6  # of the randomized SVD; errors at rank r are below 1%


class LoftQStartWarning(UserWarning):
    """Layers begin as LoRA does, as there is nothing that LoftQ could start from."""


def initialize(model: PeftModel, state: ModelState, options: Mapping[str, Any]) -> None:
    """Set A and B of every LoRA layer, and with more than one iteration the base, in place.

    Layers of which quantization took nothing away, as they are dense, begin as LoRA does, which
    LoftQStartWarning tells: with A and B of zeros they would never learn.

    Args:
        model: a fresh LoRA (or DoRA, rsLoRA) over facades, made by quantadapt from a checkpoint.
        state: how.
        options: those that `wants_loftq` looked at, and `loftq_problems` found nothing against.

    Raises:
        ModelError: a layer is not in the checkpoint.
    """
    from peft.tuners.lora import LoraLayer

    from ..loading.tensors import Checkpoint

    checkpoint, count, whole = Checkpoint(state.source), 0, list[str]()
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            count += 1
            if not isinstance(layer.get_base_layer(), QuantWeight):
                whole.append(name)
                continue
            key = f"{name}.weight"
            if key not in checkpoint:
                what = f"it holds no {key}, which LoftQ starts from"
                raise ModelError(what, fix="use init_lora_weights: true", where=state.source)
            original = checkpoint.read(key)
            original = original.t() if name in state.conv1d else original
            if not _initialize_layer(layer, original, loftq_iterations(options)):
                whole.append(name)
    if whole:
        what = f"quantization took nothing away from {len(whole)} of {count} layers"
        how = f"which LoftQ starts from: they begin as LoRA does, {whole[0]} among them"
        warn(f"{what}, {how}", LoftQStartWarning, stacklevel=6)


def _initialize_layer(layer: Any, original: Tensor, count: int) -> bool:
    """Set A and B of a layer; say whether there was anything to start from."""
    import torch

    facade = layer.get_base_layer()
    (adapter,) = layer.active_adapters
    scaling = layer.scaling[adapter]
    with torch.no_grad():
        original = original.to(facade.device, torch.float32)
        for step in range(count):
            left = original - facade.dequantize().float()
            if not left.any():
                return False
            b, a = _low_rank(left, layer.r[adapter])
            if step < count - 1:
                facade.requantize(original - b @ a)
        layer.lora_A[adapter].weight.copy_(a / scaling**0.5)
        layer.lora_B[adapter].weight.copy_(b / scaling**0.5)
        if variant := layer.lora_variant.get(adapter):
            variant.init(layer, adapter_name=adapter)  # DoRA measures its magnitudes anew
    return True


def _low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return B [out, rank] and A [rank, in] with B A the best approximation of `matrix`."""
    import torch

    q = min(rank + OVERSAMPLING, *matrix.shape)
    u, s, v = torch.svd_lowrank(matrix, q=q, niter=POWER_ITERATIONS)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, (v[:, :rank] * root).T
