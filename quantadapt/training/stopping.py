"""Ends a run early and leaves a checkpoint: at SIGTERM or SIGHUP, and when its time is over.

For machines that may be taken away. While a model trains, the step that is under way is finished
and a checkpoint is written, by all processes if one was told to end; in any other stage a signal
ends the run at once.
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
from ..errors import EXIT_OUT_OF_TIME, SIGNALS, Interrupted


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
        self._code = 0  # what all processes have agreed to end with
        self._process = os.getpid()
        self._holds = False

    def hold(self) -> None:
        """Let a signal wait from now on, for `due` or `obey`."""
        self._holds = True

    def obey(self, device: Any = None) -> None:
        """Let a signal end the run at once from now on; one that waits does so here.

        Args:
            device: that of this process, where all of them come by and end together.
        """
        self._holds = False
        code = 128 + self._signal if self._signal is not None else 0
        if device is not None:
            code = int(reduced(float(code), device, "max"))
        if code:
            raise _interrupted(code)

    def follow(self, code: int) -> None:
        """Take over the signal of another process, which has ended with this code; 0 is none."""
        if self._signal is None and code > 128:
            self._signal = signal.Signals(code - 128)

    @property
    def signalled(self) -> bool:
        """Whether a signal has come."""
        return self._signal is not None

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
        if self._signal is not None:  # it is being obeyed
            return
        self._signal = signal.Signals(number)
        if not self._holds:
            raise _interrupted(128 + number)

    def due(self, step: int, every: int, device: Any) -> bool:
        """Say after a step whether to stop there; of several processes, all do or none, and they
        talk about it every so many steps."""
        code = 128 + self._signal if self._signal is not None else 0
        if not code and self._end is not None and time.monotonic() > self._end:
            code = EXIT_OUT_OF_TIME
        if world().size == 1:
            self._code = code
        elif step % every == 0:
            self._code = int(reduced(float(code), device, "max"))
        return self._code > 0

    def error(self, step: int, steps: int) -> Interrupted:
        """Return what ends a run after a step, of so many; its checkpoint is there."""
        saved = f"checkpoint-{step} is saved, go on with --resume"
        return _interrupted(self._code, f" after step {step} of {steps}; {saved}", self._minutes)


def _interrupted(code: int, where: str = "", minutes: float | None = None) -> Interrupted:
    who = f"by {signal.Signals(code - 128).name}" if code > 128 else "by train.max_time"
    limit = f", {minutes:g} minutes" if code < 128 and minutes is not None else ""
    return Interrupted(f"{who}{limit}{where}", code)
