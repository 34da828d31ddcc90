"""LoftQ (https://arxiv.org/abs/2310.08659) for any backend: LoRA starts from what quantization took
away, B A = SVD_r(W - Q). Further iterations quantize W - B A again, where the backend can.

PEFT's own `init_lora_weights="loftq"` goes past the backend and simulates NF4; here W - Q is the
real difference, through `AdapterTarget.dequantize`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..capabilities import Merge
from ..errors import ModelError, PlanRefused, Problem
from ..records import Backend

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

LOFTQ = "loftq"
OVERSAMPLING, POWER_ITERATIONS = 16, 6  # of the randomized SVD; errors at rank r are below 1 %


def wanted(options: Mapping[str, Any]) -> bool:
    """Say whether the adapter's options ask for LoftQ."""
    return bool(options.get("init_lora_weights") == LOFTQ)


def without(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that PEFT is to see: a LoRA whose values are set afterwards."""
    return {**options, "init_lora_weights": True, "loftq_config": {}}


def iterations(options: Mapping[str, Any]) -> int:
    """Return how often W - B A is taken apart; PEFT's name is `loftq_config.loftq_iter`."""
    return int((options.get("loftq_config") or {}).get("loftq_iter", 1))


def problems(options: Mapping[str, Any], backend: Backend, has_original: bool) -> list[Problem]:
    """Return why LoftQ cannot be done here; empty if it can, or is not wanted."""
    if not wanted(options):
        return []
    found = []
    if not has_original:
        what = "LoftQ compares with the unquantized weights, and this base is quantized already"
        fix = "start from the unquantized checkpoint, or use init_lora_weights: true"
        found.append(Problem(what, fix, "adapter.init_lora_weights"))
    again = backend.merge == Merge.REQUANTIZE and not backend.calibration
    if iterations(options) > 1 and not again:
        what = f"backend {backend.name!r} cannot quantize single layers again"
        found.append(Problem(what, "use loftq_iter: 1", "adapter.loftq_config.loftq_iter"))
    if iterations(options) < 1:
        where = "adapter.loftq_config.loftq_iter"
        found.append(Problem("it is a count", "use 1 or more", where))
    return found


def initialize(model: PeftModel, options: Mapping[str, Any]) -> None:
    """Set A and B of every LoRA layer, and with more than one iteration the base, in place.

    Args:
        model: a fresh LoRA (or DoRA, rsLoRA) over facades, made by quantadapt from a checkpoint.
        options: those that `wanted` looked at.

    Raises:
        PlanRefused: `problems` found any. ModelError: a layer is not in the checkpoint.
    """
    from peft.tuners.lora import LoraLayer

    from ..exporting.stored import Checkpoint
    from ..planning.on_disk import quantization_of
    from ..quantizing.state import state_of

    state = state_of(model)
    original = bool(state.source) and quantization_of(state.source) is None
    if found := problems(options, state.backend, original):
        raise PlanRefused(found)
    checkpoint = Checkpoint(state.source)
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            key = f"{name}.weight"
            if key not in checkpoint:
                what = f"it holds no {key}, which LoftQ starts from"
                raise ModelError(what, fix="use init_lora_weights: true", where=state.source)
            _initialize_layer(layer, checkpoint.read(key), iterations(options))


def _initialize_layer(layer: Any, original: Tensor, count: int) -> None:
    import torch

    facade = layer.get_base_layer()
    (adapter,) = layer.active_adapters
    scaling = layer.scaling[adapter]
    with torch.no_grad():
        original = original.to(facade.device, torch.float32)
        for step in range(count):
            left = original - facade.dequantize().float()
            b, a = _low_rank(left, layer.r[adapter])
            if step < count - 1:
                facade.requantize(original - b @ a)
        layer.lora_A[adapter].weight.copy_(a / scaling**0.5)
        layer.lora_B[adapter].weight.copy_(b / scaling**0.5)
        if variant := layer.lora_variant.get(adapter):
            variant.init(layer, adapter_name=adapter)  # DoRA measures its magnitudes anew


def _low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return B [out, rank] and A [rank, in] with B A the best approximation of `matrix`."""
    import torch

    q = min(rank + OVERSAMPLING, *matrix.shape)
    u, s, v = torch.svd_lowrank(matrix, q=q, niter=POWER_ITERATIONS)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, (v[:, :rank] * root).T
