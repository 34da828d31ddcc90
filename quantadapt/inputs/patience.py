"""What others wrote and we run (patterns, templates, YAML) gets so much time and no more."""

from __future__ import annotations

import ctypes
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

SECONDS = 5.0
Returned = TypeVar("Returned")


class TooSlow(Exception):
    """The time is over."""

    def __init__(self, text: str = "it takes too long") -> None:
        super().__init__(text)


class TooLate(BaseException):
    """The time by the clock is over. No `except Exception` of what runs keeps it."""


def in_main_thread() -> bool:
    """Say whether signals arrive in this thread; on no other can a search of `re` be ended."""
    return threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGVTALRM")


@contextmanager
def at_most(seconds: float = SECONDS) -> Iterator[None]:
    """Raise TooSlow inside once that many seconds of the processor are used.

    In the main thread it takes the process's timer of that kind, which nobody else uses; `re` and
    Python code look at signals. In others, what is sent to them ends Python code alone.
    """
    with _by_signal(seconds) if in_main_thread() else _from_outside(seconds):
        yield


@contextmanager
def _by_signal(seconds: float) -> Iterator[None]:
    def over(number: int, frame: FrameType | None) -> None:
        raise TooSlow(f"it takes more than {seconds:g} s")

    before: Any = signal.signal(signal.SIGVTALRM, over)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def within(seconds: float, call: Callable[[], Returned]) -> Returned:
    """Return what `call` does, in the main thread alone.

    A timer of the process ends what keeps Python's lock (`re`), another thread what waits. Both
    come again, every second, to what catches them. No context manager: leaving one is more code
    that a signal could end before all is put back.

    Raises:
        TooLate: the seconds are over by the clock.
    """
    done, start, caller = threading.Event(), time.monotonic(), threading.get_ident()
    end, next_raise, over = start + seconds, start + seconds, False

    def arrived(number: int, frame: FrameType | None) -> None:
        nonlocal next_raise
        if over:
            return
        left = next_raise - time.monotonic()  # threads together use up a processor's time sooner
        signal.setitimer(signal.ITIMER_VIRTUAL, left if left > 0 else 1)
        if left <= 0:
            next_raise = time.monotonic() + 0.9  # timer and thread come at the same time
            raise TooLate

    def watch() -> None:
        left = seconds
        while not done.wait(left):
            left = 1
            signal.pthread_kill(caller, signal.SIGVTALRM)

    before: Any = signal.signal(signal.SIGVTALRM, arrived)
    watcher = threading.Thread(target=watch, daemon=True)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        watcher.start()
        found = call()
        if time.monotonic() > end:  # it took no notice
            raise TooLate
        return found
    finally:
        over = True  # first of all: from here on nothing is raised
        done.set()
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        if watcher.ident is not None:
            watcher.join()
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def _from_outside(seconds: float) -> Iterator[None]:
    """Have a thread watch this one, and raise in it."""
    thread, done, lock = threading.get_ident(), threading.Event(), threading.Lock()
    end = _used(thread) + seconds

    def watch() -> None:
        left = seconds
        while not done.wait(max(left, 0.01)):
            if (left := end - _used(thread)) > 0:
                continue
            with lock:
                if not done.is_set():
                    _raise_in(thread, TooSlow)
            return

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        with lock:
            done.set()
            _raise_in(thread, None)  # what has not arrived yet is taken back


def _used(thread: int) -> float:
    """Return the seconds of the processor that a thread has used, or, where the system cannot say,
    seconds."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return time.monotonic()
    return time.clock_gettime(time.pthread_getcpuclockid(thread))


def _raise_in(thread: int, error: type[Exception] | None) -> None:
    given = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), given)
