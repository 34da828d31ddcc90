"""Where memory runs out in an evaluation, fewer examples go through the model at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, TypeVar

from ..distributed.talking import tell_main
from ..distributed.world import world
from ..errors import warn

_Made = TypeVar("_Made")


def at_once(model: Any, work: Callable[[int], _Made], size: int, what: str) -> _Made:
    """Return what `work` makes, given how many examples go through the model at a time.

    Args:
        work: does all of it, and may be begun again; tells other processes nothing before the last
            of it has gone through the model.
        size: at most.
        what: it in words.

    Raises:
        torch.OutOfMemoryError: one is too much, or other processes wait for the rest of a pass.
    """
    import torch

    from ..sharding import is_sharded

    while True:
        try:
            return work(size)
        except torch.OutOfMemoryError:
            if size == 1 or (world().size > 1 and is_sharded(model)):
                raise
        # Out here, where the error and with it the frames of the work are gone.
        size = -(-size // 2)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        text = f"out of memory in {what}: it goes on with {size} examples at a time"
        if world().is_main:
            warn(text, UserWarning, stacklevel=2)
        tell_main(f"{text} (process {world().rank})")
