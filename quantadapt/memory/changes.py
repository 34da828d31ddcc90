"""What to change where a run does not fit: each way that does by itself, or several together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from .optimizers import optimizer_bytes
from .workload import Workload

SHORTEST = 128
"""Tokens per example below which nobody is advised to go."""
LONG = 8192
"""Tokens per example from which on several GPUs are advised to share one."""
_Change = tuple[str, dict[str, Any]]
"""In words, and as fields of a Workload."""


def ways_out(work: Workload, budget: int) -> list[str]:
    """Return changes of the spec, each of which makes `work` fit into `budget` bytes; where none
    does, what does so together, or nothing if that is not enough either."""

    def fits(changed: Workload) -> bool:
        return changed.kept_in(budget).fit(budget) is not None

    alone = [
        next((words for words, change in kind if fits(replace(work, **change))), None)
        for kind in _changes(work)
    ]
    if any(alone):
        return [words for words in alone if words]
    together: list[str] = []
    for kind in _changes(work):
        words, change = kind[-1]
        work = replace(work, **change)
        together.append(words)
        if fits(work):
            return [" and ".join(together)]
    return []


def _shared_by(count: int) -> Iterator[_Change]:
    words = f"train.parallel: fsdp on {count} GPUs"
    shared = {"shards": count, "streamed": "none"}
    yield words, shared
    yield f"{words} with train.memory: min", {**shared, "prefetches": False, "keeps_casts": False}


def _rows_shared_by(count: int) -> str:
    return f"train.context_parallel_size: {count} on {count} GPUs"


def _changes(work: Workload) -> list[list[_Change]]:
    """Return kinds of changes, each from the mildest to the strongest."""
    lengths = [work.length >> shift for shift in range(1, work.length.bit_length())]
    kinds: list[list[_Change]] = [
        [(f"data.max_length: {n}", {"length": n}) for n in lengths if n >= SHORTEST]
    ]
    if max(work.bits.values()) > 6:
        change = {"bits": dict.fromkeys(work.bits, 4.5)}
        kinds.append([("a backend with 4 bits per weight", change)])
    if optimizer_bytes(work.optim):
        kinds.append([("train.optim: paged_adamw_8bit", {"optim": "paged_adamw_8bit"})])
    if work.streamable and work.streamed != "all":
        kinds.append([("train.stream: all", {"streamed": "all"})])
    if work.contexts == 1 and work.length >= LONG:
        kinds.append([(_rows_shared_by(n), {"contexts": n}) for n in work.row_shares])
    if work.shards == 1 and work.shardable:
        kinds.append([change for n in (2, 4, 8) for change in _shared_by(n)])
    return [kind for kind in kinds if kind]
