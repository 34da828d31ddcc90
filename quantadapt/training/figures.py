"""What a training run tells of itself: parameters, peak memory, the shares of dequantizing and
rounding."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from ..memory.cards import GIB, size_words

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..facade import QuantWeight
    from ..spec import TrainSpec


def adapter_device(model: Any) -> torch.device:
    """Return where the trainable weights are."""
    device: torch.device = next(p.device for p in model.parameters() if p.requires_grad)
    return device


def compute_dtype(model: Any) -> torch.dtype:
    """Return the dtype of the base's embedding: that of everything which is not quantized."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    dtype: torch.dtype = base.get_input_embeddings().weight.dtype
    return dtype


def base_parameters(model: nn.Module) -> int:
    """Count the weights of the base: a quantized layer as if it were dense, adapters not at all."""
    base = getattr(model, "get_base_model", lambda: model)()
    return _base_parameters(base, set())


def _base_parameters(module: Any, seen: set[int]) -> int:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    from ..facade import QuantLinear
    from ..sharding import PACKED

    if id(module) in seen:
        return 0
    seen.add(id(module))
    if isinstance(module, BaseTunerLayer):
        return _base_parameters(module.get_base_layer(), seen)
    if isinstance(module, AuxiliaryTrainingWrapper):
        return _base_parameters(module.original_module, seen)
    if isinstance(module, QuantLinear):
        bias = getattr(module, "bias", None)
        weights = module.in_features * module.out_features
        return weights + (0 if bias is None else int(bias.numel()))
    # What a sharded block has packed are its quantized layers, which are counted above.
    named = module.named_parameters(recurse=False)
    own = [p for name, p in named if name != PACKED and id(p) not in seen]
    seen.update(map(id, own))
    children = sum(_base_parameters(child, seen) for child in module.children())
    return children + sum(int(p.numel()) for p in own)


def dequantize_share(trainer: Any, spec: TrainSpec) -> float | None:
    """Return the share of a step that dequantizing takes, by the time that doing it once takes now;
    None without a step, and for a sharded or streamed base, whose layers would have to be brought
    for it."""
    from ..facade import facades

    # But for dense weights that stay; a vendor's forward, which rounds its inputs, has none.
    weights: list[Any] = [
        facade
        for _, facade in facades(trainer.model)
        if facade.held_weight is None or facade.rounds_activations
    ]
    # As the steps did: a whole stack of experts may not fit.
    short = trainer.memory_fit.setting.offload
    return _share(trainer, spec, weights, _dequantize_in_parts if short else _dequantize)


def rounding_share(trainer: Any, spec: TrainSpec) -> float | None:
    """Return what training through the quantizer takes more than `dequantize_share`, likewise: of
    a step that rounds the weights which the adapter changes; None where nothing is rounded."""
    from ..adapting.merge_aware import rounded_weights

    weights = rounded_weights(trainer.model)
    both, plain = (_share(trainer, spec, weights, once) for once in (_round, _dequantize))
    return None if not weights or both is None or plain is None else max(both - plain, 0.0)


def _share(
    trainer: Any, spec: TrainSpec, weights: list[Any], once: Callable[[Any], object]
) -> float | None:
    """Return the share of a step that `once` takes where each pass does it with each weight."""
    from ..sharding import is_sharded
    from ..streaming import streamer_of

    steps = _steps(trainer)
    elsewhere = is_sharded(trainer.model) or streamer_of(trainer.model) is not None
    if steps < 1 or not trainer.progress.seconds or elsewhere:
        return None
    setting, layers = trainer.memory_fit.setting, trainer.memory_fit.recomputer.count
    kept = 0 if setting.offload else setting.recomputed_layers  # from recomputation to backward
    passes = 2 + (setting.recomputed_layers - kept) / layers
    parts = spec.per_device_train_batch_size / setting.micro_batch
    each = passes * parts * spec.gradient_accumulation_steps * _seconds(weights, once)
    # The first block's input needs no gradient: a few layers are counted once too often.
    return min(float(each * steps / trainer.progress.seconds), 1.0)


def _steps(trainer: Any) -> int:
    """Return how many steps this call has done."""
    return int(trainer.state.global_step - trainer.progress.first_step + 1)


class Streamed(NamedTuple):
    """What streaming the base took.

    Attributes:
        gib: moved to the GPU in a step, in GiB.
        hidden: the share of the time of copies in which the GPU computed.
        host_gib: what of the base lies in CPU memory, in GiB.
    """

    gib: float
    hidden: float | None
    host_gib: float

    @property
    def words(self) -> str:
        """It in words."""
        hidden = f", {self.hidden:.0%} of the transfer hidden" if self.hidden is not None else ""
        return f"{size_words(self.gib * GIB)} a step streamed{hidden}"


def streamed(trainer: Any) -> Streamed | None:
    """Return what streaming took in the steps of this call; None where nothing was streamed."""
    from ..streaming import streamer_of

    streamer, steps = streamer_of(trainer.model), _steps(trainer)
    if streamer is None or steps < 1:
        return None
    moved = trainer.memory_fit.streamed_bytes / steps
    return Streamed(moved / GIB, streamer.traffic.hidden, streamer.nbytes / GIB)


def _dequantize(weight: QuantWeight) -> None:
    weight.dequantize()


def _dequantize_in_parts(weight: QuantWeight) -> None:
    from ..facade import QuantStack

    if not isinstance(weight, QuantStack):
        weight.dequantize()
        return
    count = weight.stack.experts
    size = weight.at_a_time() or count
    for first in range(0, count, size):
        weight.of_experts(first, min(first + size, count))


def _round(weight: QuantWeight) -> None:
    import torch

    shape = weight.out_features, weight.in_features
    weight.moved(torch.zeros(shape, device=weight.device))


def _seconds(weights: list[QuantWeight], once: Callable[[QuantWeight], object]) -> float:
    """Return how long `once` takes with every weight, the second time."""
    import torch

    started = 0.0
    for _ in range(2):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        with torch.no_grad():
            for weight in weights:
                once(weight)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak of the GPU, or of the process where there is none, in GiB."""
    if device.type == "cuda":
        import torch

        return float(torch.cuda.max_memory_allocated(device)) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
