"""What streaming moves, and how much of the time of that is hidden."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Traffic:
    """What streaming has moved so far.

    Attributes:
        nbytes: copied to the device.
        blocks: how often a block was begun.
        copied: seconds that copies took.
        waited: seconds that the computation stood still for them.
    """

    def __init__(self) -> None:
        self.blocks = 0
        self.restart()

    def restart(self) -> None:
        """Count from here on."""
        self.nbytes = 0
        self.copied = self.waited = 0.0
        self._open: deque[tuple[Any, Any, Any, Any]] = deque()

    @property
    def hidden(self) -> float | None:
        """The share of the time of copies in which the device computed; None without copies."""
        self.settle()
        return None if not self.copied else max(0.0, 1 - self.waited / self.copied)

    def note(self, *events: Any) -> None:
        """Note the events before and after a copy, and before and after waiting for it."""
        self._open.append(events)  # type: ignore[arg-type]
        while self._open and self._open[0][3].query():
            self._close(*self._open.popleft())

    def settle(self) -> None:
        """Wait for what is open."""
        while self._open:
            self._open[0][3].synchronize()
            self._close(*self._open.popleft())

    def _close(self, started: Any, done: Any, before: Any, after: Any) -> None:
        self.copied += started.elapsed_time(done) / 1000
        self.waited += before.elapsed_time(after) / 1000

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Note what is copied inside, while nothing else is done."""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self.copied += seconds
        self.waited += seconds


def timed_event(stream: Any) -> Any:
    """Return an event of CUDA that is recorded on `stream` now."""
    event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event
