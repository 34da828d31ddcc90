"""Counts the bytes that torch allocates on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_of(function: Callable[[], Any]) -> int:
    """Return how many more bytes than at its start are allocated at a time in `function`."""
    return max(accumulate(_allocations(function), initial=0))


def left_by(function: Callable[[], Any]) -> int:
    """Return how many more bytes than at its start are allocated when `function` is done."""
    return sum(_allocations(function))


def _allocations(function: Callable[[], Any]) -> list[int]:
    """Return the bytes that are allocated in `function`, negative where they are given back."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        function()
    assert seen.profiler is not None
    assert seen.profiler.kineto_results is not None
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
