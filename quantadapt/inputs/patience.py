"""What others wrote and we run (patterns, templates, YAML) gets so much time and no more."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SECONDS = 5.0


class TooSlow(Exception):
    """The time is over."""


@contextmanager
def at_most(seconds: float = SECONDS) -> Iterator[None]:
    """Raise TooSlow inside once that many seconds of the processor are used.

    It takes the process's timer of that kind, which nobody else uses; `re` and Python code look at
    signals. There is no limit outside the main thread, where signals do not arrive, and where the
    system has no such timer.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(
        signal, "SIGVTALRM"
    ):
        yield
        return

    def over(number: int, frame: FrameType | None) -> None:
        raise TooSlow(f"it takes more than {seconds:g} s")

    before: Any = signal.signal(signal.SIGVTALRM, over)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
