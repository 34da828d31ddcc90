"""Where the frozen base is while its model trains: on the device, in CPU memory, or shared by GPUs.
Loans of `lent`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..distributed.talking import reduced
from ..memory import rules
from ..planning.streaming import NO_GPU
from ..sharding import gather_ahead, gathered_bytes, kept_gathered, reshard
from .figures import adapter_device

if TYPE_CHECKING:
    from torch import nn

    from ..spec import TrainSpec

OnNote = Callable[[str], None]


@contextmanager
def streamed(model: nn.Module, spec: TrainSpec, on_note: OnNote) -> Iterator[None]:
    """Move what `spec` says of the base to CPU memory, unless it is there, and bring it back. A
    base that was streamed before still is afterwards, and holds nothing on the device; so is one
    that finds no room there any more."""
    import torch

    from ..streaming import bring_back, stream, streamer_of

    if (there := streamer_of(model)) is not None:
        try:
            yield
        finally:
            there.rest()
        return
    if spec.stream == "auto" or spec.stream == "none":
        yield
        return
    if adapter_device(model).type != "cuda":
        on_note(NO_GPU)
        yield
        return
    try:
        stream(model, spec.stream, folder=spec.stream_folder)
        yield
    finally:
        try:
            bring_back(model)
        except torch.OutOfMemoryError:  # and what training failed with is raised
            on_note("the GPU has no room for the whole base any more: it stays streamed")


@contextmanager
def gathered_once(model: nn.Module, spec: TrainSpec, on_note: OnNote) -> Iterator[None]:
    """Where all GPUs have ample room, let a sharded base stay gathered while it trains."""
    reshard(model)  # a pass before may have failed
    needed = gathered_bytes(model)
    shares = not needed or spec.memory == "min"
    if shares or not rules.stays_gathered(needed, _room(model, spec)):
        yield
        return
    on_note(rules.stays_gathered_words(needed))
    with kept_gathered(model):
        yield


def _room(model: nn.Module, spec: TrainSpec) -> float:
    """Return the bytes that training may still allocate on the GPU that has the least; 0 on a CPU,
    where nothing is gained."""
    import torch

    device = adapter_device(model)
    if device.type != "cuda":
        return 0.0
    free, _ = torch.cuda.mem_get_info(device)
    if (limit := rules.limit(spec)) is not None:
        free = min(free, limit - torch.cuda.memory_allocated(device))
    return -reduced(-float(free), device, "max")


@contextmanager
def one_block_at_a_time(model: nn.Module) -> Iterator[None]:
    """Inside, a block of a sharded base is gathered when it is needed, and not while the one before
    it computes."""
    gather_ahead(model, False)
    try:
        yield
    finally:
        gather_ahead(model)
