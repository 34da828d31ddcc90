"""Optimizers and schedules that transformers has and that cannot do here what they are for."""

from __future__ import annotations

from ..dependencies import missing_for_optimizer
from ..errors import Problem
from ..spec import TrainSpec

_OPTIMIZERS = {
    "galore": "wants to be told which modules it is for, and adapters are of low rank already",
    "apollo": "wants to be told which modules it is for, and adapters are of low rank already",
    "lomo": "updates weights in backward, before gradients are accumulated, clipped and looked at",
    "adalomo": "updates weights in backward, before gradients are accumulated, clipped and looked"
    " at",
    "schedule_free": "trains weights that are others than those to measure and to save",
}
"""How names begin -> why such an optimizer is refused."""
_WANTS_OPTIONS = "wants options that there is no key for"
_FOLLOWS_LOSS = "follows the loss on held-out data, which validations do not hand to it"
_SCHEDULES = {
    "cosine_with_min_lr": _WANTS_OPTIONS,
    "cosine_warmup_with_min_lr": _WANTS_OPTIONS,
    "warmup_stable_decay": _WANTS_OPTIONS,
    "reduce_lr_on_plateau": _FOLLOWS_LOSS,
    "greedy": _FOLLOWS_LOSS,
}


def optimizer_problems(train: TrainSpec) -> list[Problem]:
    """Return why the optimizer or the schedule of `train` does not work; nothing of names that
    transformers does not know either."""
    found = missing_for_optimizer(train.optim)
    for begin, why in _OPTIMIZERS.items():
        if train.optim.startswith(begin):
            what = f"the optimizer {train.optim!r} {why}"
            found = [Problem(what, "use adamw_torch_fused, or adamw_8bit", "train.optim")]
    if why := _SCHEDULES.get(train.lr_scheduler_type, ""):
        what = f"the schedule {train.lr_scheduler_type!r} {why}"
        fix = "use cosine, linear, constant_with_warmup, polynomial or inverse_sqrt"
        found.append(Problem(what, fix, "train.lr_scheduler_type"))
    return found
