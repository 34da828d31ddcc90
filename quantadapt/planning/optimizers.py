"""Optimizers that transformers has and that cannot do here what they are for."""

from __future__ import annotations

from ..dependencies import missing_for_optimizer
from ..errors import Problem
from ..spec import TrainSpec
from .schedules import schedule_problems

_OPTIMIZERS = {
    "galore": "wants to be told which modules it is for, and adapters are of low rank already",
    "apollo": "wants to be told which modules it is for, and adapters are of low rank already",
    "lomo": "updates weights in backward, before gradients are accumulated, clipped and looked at",
    "adalomo": "updates weights in backward, before gradients are accumulated, clipped and looked"
    " at",
    "schedule_free": "trains weights that are others than those to measure and to save",
}
"""How names begin -> why such an optimizer is refused."""


def optimizer_problems(train: TrainSpec) -> list[Problem]:
    """Return why the optimizer or the schedule of `train` does not work; nothing of optimizers that
    transformers does not know either."""
    found = missing_for_optimizer(train.optim)
    for begin, why in _OPTIMIZERS.items():
        if train.optim.startswith(begin):
            what = f"the optimizer {train.optim!r} {why}"
            found = [Problem(what, "use adamw_torch_fused, or adamw_8bit", "train.optim")]
    return found + schedule_problems(train)
