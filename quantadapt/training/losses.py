"""Whether what an objective's `loss` has returned can be learnt from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import PluginError
from ..protocols import Task


def checked_loss(task: Task, found: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Return a loss, a scalar, and the figures beside it, by name with a number for each example;
    nothing is read from a GPU. Raises PluginError where `found` is something else."""
    where = f"objective {type(task).__name__}"
    loss, told = found if isinstance(found, tuple) and len(found) == 2 else (found, {})
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"its loss is {_words(loss)}, and no scalar"
        raise PluginError(what, fix="return the sum or the mean over the batch", where=where)
    if torch.is_grad_enabled() and not loss.requires_grad:
        what = "its loss depends on nothing that is trained"
        fix = "compute it from what the model returns, without detach, item or no_grad"
        raise PluginError(what, fix=fix, where=where)
    if not isinstance(told, Mapping):
        what = f"beside its loss it returned {_words(told)}, not figures by name"
        raise PluginError(what, fix="return a dictionary of tensors", where=where)
    for name, numbers in told.items():
        if not isinstance(numbers, Tensor) or numbers.ndim != 1:
            what = f"its figure {name!r} is {_words(numbers)}, and not a number for each example"
            raise PluginError(what, fix="return a tensor [examples]", where=where)
    return loss, told


def _words(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {[*value.shape]}"
    return f"{type(value).__name__} {value!r}" if value is not None else "None"
