"""How processes come to the base of a run: each makes it, or one makes it for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..distributed.talking import reduced, start
from ..distributed.world import world
from ..errors import TrainingError
from ..exporting.loading import load_base
from ..exporting.saving import save_base
from ..planning.planned import Plan
from ..quantizing.stage import quantize_plan
from ..quantizing.state import state_of

if TYPE_CHECKING:
    from torch import nn

    from ..quantizing.examples import Examples


def quantized_base(
    plan: Plan, saved: Path, examples: Examples | None, labels: Sequence[str]
) -> nn.Module:
    """Return the base, quantized. One that is calibrated here is kept, because the spec alone could
    not make it again; a resumed run and the other processes load it.

    Args:
        saved: the folder in which such a base is kept.
        examples: what a backend that calibrates is shown.
        labels: what a classifier tells apart.
    """
    if not plan.calibrates:
        meet(plan)
        return quantize_plan(plan, labels=labels)
    resumed = plan.spec.train.resume and saved.exists()
    if world().is_main and not resumed:
        alone = replace(plan, parallel="none")
        model = quantize_plan(alone, calibration=examples, labels=labels)
        save_base(model, state_of(model), saved)
        if world().size == 1:
            return model
    # Only now: vendors take a process group for an invitation to calibrate together.
    meet(plan)
    return _placed(load_base(saved, plan.device), plan)


def meet(plan: Plan) -> None:
    """Join the other processes. Raises TrainingError, in all, if they planned something else."""
    mine = start(plan.device)
    if mine.size == 1:
        return
    import torch

    sharding = reduced(float(plan.parallel == "fsdp"), torch.device(plan.device), "sum")
    if sharding not in (0, mine.size):
        what = "some processes would shard the base and some not, because their GPUs differ"
        raise TrainingError(what, fix="set train.parallel to fsdp or ddp", where="train.parallel")


def _placed(model: nn.Module, plan: Plan) -> nn.Module:
    """Shard or stream a base that came whole, where the plan says so."""
    if plan.stream != "none":
        from ..streaming import stream

        state_of(model).stream = plan.stream
        return stream(model, plan.stream, folder=plan.spec.train.stream_folder)
    if plan.parallel != "fsdp":
        return model
    from ..sharding import shard

    return shard(model)
