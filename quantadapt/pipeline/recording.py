"""What a run notes of training in `metrics.json`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..planning.planned import Plan
    from ..training.stage import TrainResult

_AS_THEY_ARE = (
    *("steps", "validation", "best_step", "kept_step", "stopped_early", "seconds", "tokens"),
    *("peak_memory_gib", "resumed_from", "trainable_parameters", "base_parameters"),
    *("dequantize_share", "rounding_share"),
)


def of_training(result: TrainResult, plan: Plan, processes: int) -> dict[str, Any]:
    """Return what is noted of a training, by `processes` of them."""
    found = {name: getattr(result, name) for name in _AS_THEY_ARE}
    found |= {"processes": processes, "parallel": plan.parallel, "unit": plan.task.unit}
    found["memory"] = _of_memory(result, plan)
    if result.packed is not None:
        found["packed"] = result.packed._asdict()
    if result.streamed is not None:
        found["streamed"] = result.streamed._asdict()
    return found


def _of_memory(result: TrainResult, plan: Plan) -> dict[str, Any]:
    """Return how memory was used, and on a GPU what is predicted for just that."""
    batch = plan.spec.train.per_device_train_batch_size
    figures = asdict(result.setting) | {"layers": result.layers, "batch": batch}
    if plan.memory is not None and plan.device.startswith("cuda"):
        predicted = plan.memory.peak_gib(result.setting, result.longest)
        figures |= {"predicted_gib": predicted, "longest": result.longest}
    return figures
