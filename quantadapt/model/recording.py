"""Recording of CUDA graphs that leaves the process as it was where it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

CAPTURE_ERRORS = "thread_local"
"""Threads that record nothing, as NCCL's, may do as they like meanwhile."""


@contextmanager
def recording(graph: Any, pool: Any = None) -> Iterator[None]:
    """Record into `graph`, a `torch.cuda.CUDAGraph`, what is computed inside.

    Raises:
        RuntimeError: something waits for the GPU, or its memory does not suffice.
    """
    before = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool, capture_error_mode=CAPTURE_ERRORS):
            yield
    except RuntimeError:
        # A recording that cannot be ended leaves its own stream as the current one.
        torch.cuda.set_stream(before)
        _draw_as_before()
        raise


def _draw_as_before() -> None:
    """Let random numbers be drawn again: a recording that cannot be ended leaves the generator
    waiting for its end (seen up to torch 2.11)."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(generator.clone_state())
