"""Who is who: the processes that a launcher started, told by its environment alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..spec import Spec


@dataclass(frozen=True)
class World:
    """One process among those of a run.

    Attributes:
        rank: its number, from 0; 0 writes the run folder and shows progress.
        local_rank: its number on this machine, which is that of its GPU.
        size: how many processes there are.
        local_size: how many of them are on this machine.
    """

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and shows."""
        return self.rank == 0


def world() -> World:
    """Return what the environment says; one process where it says nothing."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    found = [os.environ.get(name, "") for name in names]
    if not all(value.isdigit() for value in found) or int(found[2]) < 2:
        return World()
    here = os.environ.get("LOCAL_WORLD_SIZE", "")
    rank, local_rank, size = map(int, found)
    return World(rank, local_rank, size, int(here) if here.isdigit() else size)


@contextmanager
def unlaunched() -> Iterator[None]:
    """Inside, accelerate takes the one process of a launcher for what it is without: it would make
    a group of it, whose talks with itself take time, and memory of a GPU."""
    hidden = os.environ.pop("LOCAL_RANK", None) if world().size == 1 else None
    try:
        yield
    finally:
        if hidden is not None:
            os.environ["LOCAL_RANK"] = hidden


def as_launched(spec: Spec) -> Spec:
    """Take `accelerate launch --use_fsdp` for `train.parallel: fsdp`: the sharding is ours, and
    accelerate's own must not start beside it."""
    asked = os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes")
    if not asked or spec.train.parallel != "auto":
        return spec
    train = spec.train.model_copy(update={"parallel": "fsdp"})
    return spec.model_copy(update={"train": train})
