"""What a checkpoint that does not make its model lacks, tensor by tensor: the files say so, where
transformers says that a parameter could not be made, or has another shape.

`architecture` returns the model without its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from ..errors import ModelError, Problem
from .accounting import WrongTensors, lacks, listed, without_tensors
from .conversion import Parameters
from .tensors import Checkpoint

if TYPE_CHECKING:
    from torch import nn


def wrong_tensors(
    source: str, architecture: Callable[[], nn.Module], broken: Sequence[str]
) -> ModelError | None:
    """Say which tensors a failed load missed, if it is that; `broken` are those that it named."""
    fix = "make or download the checkpoint again"
    try:
        stored = Parameters(Checkpoint(source), architecture())
        if broken:
            lost = dict.fromkeys(tensor for name in stored for tensor in stored.lost(name))
            whats = dict.fromkeys(lacks(lost, stored.checkpoint.files))
            if not whats:  # they are there, in other shapes
                whats = dict.fromkeys(stored.fault(name) for name in broken if name in stored)
            if not whats:  # the files have none of these names: a layer packed otherwise
                whats = dict.fromkeys([f"{listed(broken)} cannot be made of what the files hold"])
            return WrongTensors([Problem(what, fix, where=source) for what in whats])
        without = without_tensors(stored.model, list(stored))
    except Exception:  # this looks for the reason of a failure, and must not be another
        return None
    if not without:
        return None
    return WrongTensors([Problem(f"it has no tensor for {listed(without)}", fix, where=source)])


def lacking(
    source: str, architecture: Callable[[], nn.Module], names: Collection[str]
) -> tuple[list[str], list[str]]:
    """Return which of these parameters are made of tensors that the files do not all hold, and what
    they lack, in words."""
    try:
        stored = Parameters(Checkpoint(source), architecture()) if names else None
        lost = {name: stored.lost(name) for name in names if stored and name in stored}
    except Exception:  # this looks for the reason of a failure, and must not be another
        return [], []
    cut = [name for name, tensors in lost.items() if tensors]
    there = stored.checkpoint.files if stored else ()
    return cut, lacks([tensor for name in cut for tensor in lost[name]], there)
