"""What a checkpoint holds besides what transformers saves, so that a resumed run is the same run.

The loss that is summed up for the next log, and what the data were like, for a run whose data have
changed is another one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..distributed.talking import reduced
from ..distributed.world import world
from ..errors import OutputError, TrainingError
from ..folders.checkpoints import CHECKPOINTS, Checkpoint, last_whole, steps_of

if TYPE_CHECKING:
    from ..spec import TrainSpec


def facts_of(trainer: Any) -> dict[str, Any]:
    """Return what is noted in a checkpoint of `trainer`; all processes have to ask."""
    loss = trainer.loss_since_log
    total = 0.0 if loss is None else reduced(float(loss), trainer.args.device, "sum")
    return {
        "data": fingerprint(trainer.memory_fit.known_by),
        "examples": len(trainer.train_dataset),
        "processes": world().size,
        "loss_since_log": total / world().size,
        "logged_step": trainer._globalstep_last_logged,
        "figures_since_log": trainer.progress.figures.totals(trainer.args.device),
    }


def fingerprint(numbers: list[int]) -> str:
    """Return a short name for data that are known by these numbers, in their order."""
    return hashlib.sha256(" ".join(map(str, numbers)).encode()).hexdigest()[:16]


def checkpoint_to_resume(
    output: Path, spec: TrainSpec, on_note: Callable[[str], None]
) -> Checkpoint | None:
    """Return the last whole checkpoint, if the spec asks to go on. Raises OutputError where the
    spec does not and there are some, or where all are damaged."""
    if not spec.resume and steps_of(output):
        fix = "set train.resume to go on from them, or use another output folder"
        what, where = "there are checkpoints of an earlier run", str(output / CHECKPOINTS)
        raise OutputError(what, fix=fix, where=where)
    if (found := last_whole(output)) is None:
        if spec.resume:
            on_note("there is no checkpoint to go on from: training begins at step 0")
        return None
    for damaged in found.skipped:
        on_note(f"{damaged}; going on from {found.path.name}")
    return found


def refuse_unshared(output: Path, spec: TrainSpec, device: torch.device) -> None:
    """Raise OutputError where checkpoints are wanted and not all processes see the folder that the
    first one writes: on another node one would begin anew while the others go on."""
    if world().size == 1 or not (spec.save_steps or spec.resume or spec.max_time):
        return
    token = output / f".{CHECKPOINTS}-seen-by-all"
    if world().is_main:
        output.mkdir(parents=True, exist_ok=True)
        token.touch()
    reduced(0.0, device, "sum")  # it is there now
    missing = int(reduced(float(not token.exists()), device, "sum"))
    if world().is_main:
        token.unlink(missing_ok=True)
    if missing:
        what = f"{missing} of {world().size} processes do not see this folder of the first one"
        fix = "use a folder on a file system that all nodes share, or leave checkpoints out"
        raise OutputError(what, fix=fix, where=str(output))


def refuse_other_data(trainer: Any, checkpoint: Checkpoint) -> None:
    """Raise TrainingError where the data are not those that the checkpoint was trained on, or the
    processes are not as many."""
    facts = checkpoint.facts
    if facts.get("data") != fingerprint(trainer.memory_fit.known_by):
        then, now = facts.get("examples"), len(trainer.train_dataset)
        what = f"the training data are not those of {checkpoint.path.name}: {then} examples then"
        what += f", {now} now, or other ones"
        fix = "put the data back as they were, or start another run in another --output"
        raise TrainingError(what, fix=fix, where="data")
    if facts.get("processes") != world().size:
        what = f"{checkpoint.path.name} was written by {facts.get('processes')} processes"
        fix = f"resume with as many; there are {world().size} now"
        raise TrainingError(what, fix=fix, where="train")


def take_up(trainer: Any, checkpoint: Checkpoint) -> None:
    """Go on with what was summed up for the next log, and at the intervals that the spec says now,
    where transformers takes those of the checkpoint. To be called when training begins."""
    loss, facts = getattr(trainer, "_tr_loss", None), checkpoint.facts
    if loss is not None:
        loss += facts["loss_since_log"]
        trainer._globalstep_last_logged = facts["logged_step"]
    for name, (total, count) in facts.get("figures_since_log", {}).items():
        share = [total / world().size, count / world().size]
        trainer.progress.figures.sums[name] = torch.tensor(share, dtype=torch.float64)
    trainer.state.compute_steps(trainer.args, trainer.state.max_steps)


def set_rates(trainer: Any) -> None:
    """Set the learning rate that the schedule has for the next step. The optimizer brings the one
    that was next when it was saved, by a schedule which may have had another end."""
    scheduler = getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)
    if not hasattr(scheduler, "lr_lambdas"):
        return
    each = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    scheduler._last_lr = [base * factor(scheduler.last_epoch) for base, factor in each]
    for group, rate in zip(trainer.optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = rate
