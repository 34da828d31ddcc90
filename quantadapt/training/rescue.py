"""Saves the steps that are done where the next one fails for good: somebody else has filled the
GPU, a disk that the base is streamed from cannot be read, or a picture of the data is gone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from traceback import clear_frames
from typing import Any

import torch
from torch import Tensor

from ..adapting.fused import free
from ..errors import QuantadaptError
from ..folders.checkpoints import PREFIX
from ..inputs.documents import reason
from .random_state import RandomState


@dataclass(frozen=True)
class AfterStep:
    """What a checkpoint holds of a trainer that a step changes before the optimizer does.

    Attributes:
        random: the generators, after the last step.
        loss: what is summed up for the next log. figures: likewise, of the task.
    """

    random: RandomState
    loss: Tensor
    figures: dict[str, Any]

    @classmethod
    def of(cls, trainer: Any, loss: Tensor) -> AfterStep:
        """Return it as it is now."""
        random = RandomState.of(torch.device(trainer.args.device))
        return cls(random, loss.detach().clone(), dict(trainer.progress.figures.sums))

    def put_back(self, trainer: Any) -> None:
        """Forget what was drawn and summed up since."""
        self.random.put_back()
        trainer.loss_since_log = self.loss
        trainer.progress.figures.sums = self.figures


def save_what_is_done(trainer: Any, error: BaseException, tell: Callable[[str], None]) -> None:
    """Write a checkpoint of the last whole step, if it is not there, and tell what became of it.
    Nothing is done for several processes, which would have to write together, and where there is no
    whole step, or the optimizer has begun to change the weights.

    Args:
        error: why the next step fails; what its frames hold is let go of.
    """
    after, step = trainer.after_step, trainer.state.global_step
    if after is None or trainer.accelerator.num_processes > 1:
        return
    try:
        if not (trainer.checkpoints / f"{PREFIX}{step}").exists():
            _let_go(trainer, error)
            after.put_back(trainer)
            trainer._save_checkpoint(trainer.model, None)
    except (QuantadaptError, OSError, RuntimeError) as failed:
        tell(f"what was learnt in {step} steps could not be saved: {reason(failed)}")
    else:
        tell(f"{PREFIX}{step} is saved, go on with --resume")


def _let_go(trainer: Any, error: BaseException) -> None:
    """Give back what the step that failed holds of the GPU: the tensors of its passes, which are in
    the frames of the error and of those that it was raised after, gradients, recorded passes and
    room for what is streamed. A checkpoint is written without memory there, but libraries may want
    a little."""
    seen: list[BaseException] = []
    each: BaseException | None = error
    while each is not None and each not in seen:
        seen.append(each)
        clear_frames(each.__traceback__)  # but for those that still run
        full = isinstance(each.__context__, torch.OutOfMemoryError)
        each = each.__cause__ or (each.__context__ if full else None)  # others may be the caller's
    fit = trainer.memory_fit
    for weight in fit.weights:
        weight.grad = None
    fit.give_back()
    if fit.streamer is not None:
        fit.streamer.rest()
    trainer.told.clear()
    free(trainer.model)
