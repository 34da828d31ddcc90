"""Which model its backend is writing just now: `save_pretrained`, which asks a quantized model's
backend to write it, is called by that in turn."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

_local = threading.local()


def written_now() -> tuple[Any, Mapping[str, Any]]:
    """Return the model that a backend is writing in this thread, and with which options of
    `save_pretrained`; None and nothing where there is none."""
    found: tuple[Any, Mapping[str, Any]] = getattr(_local, "writing", (None, {}))
    return found


@contextmanager
def being_written(model: Any, options: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Inside, a backend is writing `model`; with the options that there are already if it is
    so outside, too, and none are given."""
    before = written_now()
    if options is not None or before[0] is not model:
        _local.writing = model, options or {}
    try:
        yield
    finally:
        _local.writing = before
