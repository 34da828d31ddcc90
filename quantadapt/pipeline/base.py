"""How processes come to the base of a run: each makes it, or one makes it for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..distributed.talking import reduced, start
from ..distributed.world import world
from ..errors import ModelError, TrainingError
from ..exporting.loading import load_base
from ..exporting.saving import refuse_changed, save_base, take_base
from ..folders.atomic import put_back
from ..planning.planned import Plan
from ..planning.reusing import MODEL, Making, base_in, difference, making_of
from ..quantizing.making import makings
from ..quantizing.stage import quantize_plan
from ..quantizing.state import state_of

if TYPE_CHECKING:
    from torch import nn

    from ..quantizing.examples import Examples


def quantized_base(
    plan: Plan,
    saved: Path,
    examples: Examples | None,
    labels: Sequence[str],
    tell: Callable[[str], None] = lambda text: None,
) -> nn.Module:
    """Return the base, quantized. One that is calibrated here is kept, because the spec alone could
    not make it again; a resumed run and the other processes load it. Where the spec names another
    run whose base is the same, that is taken.

    Args:
        saved: the folder in which such a base is kept.
        examples: what a backend that calibrates is shown.
        labels: what a classifier tells apart.
        tell: told in a sentence where a base is not taken.
    """
    if not plan.calibrates:
        meet(plan)
        return quantize_plan(plan, labels=labels)
    resumed = plan.spec.train.resume and saved.exists()
    if world().is_main and resumed:
        refuse_changed(saved)
    if world().is_main and not resumed and not _taken(plan, saved, examples, labels, tell):
        model, making = _made(replace(plan, parallel="none"), examples, labels)
        save_base(model, state_of(model), saved, making=making)
        if world().size == 1:
            return model
    # Only now: vendors take a process group for an invitation to calibrate together.
    meet(plan)
    return _placed(load_base(saved, plan.device), plan)


def _taken(
    plan: Plan,
    saved: Path,
    examples: Examples | None,
    labels: Sequence[str],
    tell: Callable[[str], None],
) -> bool:
    """Put the base that the spec names at `saved`; False where it names none, or another one."""
    given = plan.spec.reuse_base
    if given is None:
        return False
    other = "it is not there any more"
    try:
        base = base_in(put_back(given))
        making = None if base is None else making_of(base)
        if base is not None and making is not None:
            other = difference(making.of, makings(plan, examples, labels))
            if not other:
                take_base(base, saved, given, plan.model)
                return True
    except ModelError as error:  # it is damaged, or somebody deletes it
        other = error.problems[0].what
    tell(f"the base in {given} is not taken, and this run quantizes its own: {other}")
    return False


def _made(plan: Plan, examples: Examples | None, labels: Sequence[str]) -> tuple[nn.Module, Making]:
    """Quantize; return the model, and what that took."""
    import torch

    from ..training.figures import peak_memory_gib

    device = torch.device(plan.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    of = makings(plan, examples, labels)  # before, as files may be changed while it calibrates
    started = time.perf_counter()
    model = quantize_plan(plan, calibration=examples, labels=labels)
    seconds = time.perf_counter() - started
    of = of if of[MODEL] else makings(plan, examples, labels)  # a hub id is here only now
    peak = peak_memory_gib(device)
    return model, Making(of=of, seconds=seconds, peak_memory_gib=peak, device=plan.device)


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
