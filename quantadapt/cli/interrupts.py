"""A Ctrl-C that comes while Python cannot raise it is raised again.

In a callback of a weak reference, in `__del__`, or in what C calls, Python prints what is raised
and goes on. Where a Ctrl-C comes while garbage is collected, such a callback is the first code of
Python's that runs after it: of the threads of a pool, for one, which `concurrent.futures` keeps
weak references to.
"""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from types import TracebackType
from typing import Any

from ..errors import Interrupted

AGAIN_AFTER = 0.05
"""Seconds in which such a callback is over."""


class HeardInterrupts:
    """While it is on, no KeyboardInterrupt is lost.

    Attributes:
        lost: one that could not be raised, and has not been raised again yet.
    """

    lost: KeyboardInterrupt | None = None

    def __enter__(self) -> HeardInterrupts:
        self._timer: threading.Timer | None = None
        self._before, sys.unraisablehook = sys.unraisablehook, self._ignored
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        sys.unraisablehook = self._before
        if self._timer is not None:
            self._timer.cancel()

    @property
    def exit_code(self) -> int:
        """The one for what was lost; 0 where nothing was."""
        if isinstance(self.lost, Interrupted):
            return self.lost.exit_code
        return 0 if self.lost is None else 128 + signal.SIGINT

    def _ignored(self, unraisable: Any) -> None:
        self._before(unraisable)  # first: what is raised again while it is at work is lost, too
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            self.lost = unraisable.exc_value
            self._timer = threading.Timer(AGAIN_AFTER, self._raise_again)
            self._timer.daemon = True
            self._timer.start()

    def _raise_again(self) -> None:
        if callable(signal.getsignal(signal.SIGINT)):
            self.lost = None
            _thread.interrupt_main()
