"""Ends a run early and leaves a checkpoint: at SIGTERM or SIGHUP, and when its time is over.

For machines that may be taken away. While a model trains, the step that is under way is finished
and a checkpoint is written; in any other stage a signal ends the run at once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..distributed.talking import reduced
from ..distributed.world import world
from ..errors import EXIT_OUT_OF_TIME, Interrupted

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stop:
    """What may end a run early.

    Args:
        minutes: how long it may take until a checkpoint is begun; None: for ever.
        since: when that time began, on the monotonic clock; now by default.
    """

    def __init__(self, minutes: float | None = None, since: float | None = None) -> None:
        begun = time.monotonic() if since is None else since
        self._end = None if minutes is None else begun + 60 * minutes
        self._minutes = minutes
        self._signal: signal.Signals | None = None
        self._others = False
        self._process = os.getpid()
        self._training = False

    @contextmanager
    def while_training(self) -> Iterator[None]:
        """Let a signal in the body wait for the step that is under way."""
        self._training = True
        try:
            yield
        finally:
            self._training = False

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        """Obey the signals in the body, where nobody else does and this is the main thread."""
        before = {}
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is signal.SIG_DFL:
                    before[number] = signal.signal(number, self._received)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _received(self, number: int, _: Any) -> None:
        if os.getpid() != self._process:  # a worker that was forked: none of its business
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._signal = signal.Signals(number)
        if not self._training:
            raise Interrupted(f"by {self._signal.name}", 128 + number)

    def due(self, step: int, every: int, device: Any) -> bool:
        """Say after a step whether to stop there; of several processes, all do or none, and they
        talk about it every so many steps."""
        asked = self._signal is not None or (self._end is not None and time.monotonic() > self._end)
        if world().size == 1:
            return asked
        if step % every == 0:
            self._others = reduced(float(asked), device, "max") > 0
        return self._others

    def error(self, step: int, steps: int) -> Interrupted:
        """Return what ends a run after a step, of so many; its checkpoint is there."""
        if self._signal is not None:
            who, code = f"by {self._signal.name}", 128 + self._signal
        else:
            limit = "" if self._minutes is None else f", {self._minutes:g} minutes"
            who, code = f"by train.max_time{limit}", EXIT_OUT_OF_TIME
        saved = f"checkpoint-{step} is saved, go on with --resume"
        return Interrupted(f"{who} after step {step} of {steps}; {saved}", code)
