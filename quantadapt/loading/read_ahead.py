"""Read a checkpoint's next tensors while those before are quantized.

transformers' threads read all tensors as fast as they can. Where it quantizes, dense weights would
pile up, so there it uses none and reads a tensor when its turn comes. The threads here do the
reading instead, a bounded number of bytes ahead.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from ..errors import SlowerWarning, warn
from ..machine import installed_version

AHEAD = 256 * 2**20
"""Bytes that may have been read ahead, or a single tensor that is larger: two of the largest
projections of an 8B model in 16 bits."""
THREADS = 2
"""One copies to the GPU while the other reads."""


@contextmanager
def reading_ahead(device: str) -> Iterator[None]:
    """Inside, a checkpoint that transformers loads onto `device`, quantizing, is read ahead. Warns
    where transformers reads in a way that cannot be taken over; tensors are read when needed then.
    """
    from transformers import core_model_loading as transformers_loading

    spawn: Any = getattr(transformers_loading, "spawn_materialize", None)
    reader, calls, mine = ReadAhead(device), count(), get_ident()

    def materialize(pool: Any, source: Any, device: Any, dtype: Any = None, **kw: Any) -> Any:
        if get_ident() != mine:  # somebody else loads a model meanwhile
            return spawn(pool, source, device, dtype, **kw)
        next(calls)
        if pool is not None:  # nothing is quantized, and transformers' threads read
            return spawn(pool, source, device, dtype, **kw)
        ahead, now = (spawn(None, source, to, dtype, **kw) for to in ("cpu", device))
        return reader.add(_Read(torch.device(device), ahead, now, _nbytes(source, dtype)))

    if spawn is not None:
        transformers_loading.spawn_materialize = materialize
    try:
        yield
        if next(calls) == 0:
            version = installed_version("transformers")
            what = f"loading is slower: transformers {version} does not call spawn_materialize"
            warn(what, SlowerWarning, stacklevel=3)
    finally:
        if spawn is not None:
            transformers_loading.spawn_materialize = spawn
        reader.close()


def _nbytes(source: Any, dtype: torch.dtype | None) -> int:
    """Return the size of a tensor, or of a slice of safetensors, once it is read as `dtype`."""
    shape = source.get_shape() if hasattr(source, "get_shape") else source.shape
    size: int = math.prod(shape) * (dtype or torch.float32).itemsize
    return size


@dataclass(eq=False)
class _Read:
    """A tensor to read onto a device: by a thread, through CPU memory, or by who wants it."""

    device: torch.device
    ahead: Callable[[], Tensor]
    now: Callable[[], Tensor]
    nbytes: int
    future: Future[Tensor] | None = None
    taken: bool = False


class ReadAhead:
    """Threads that read tensors in the order in which they were added, `AHEAD` bytes at most.

    On CUDA they copy from pinned memory, in a stream of their own, so copying does not wait for
    the kernels that quantize.
    """

    def __init__(self, device: str) -> None:
        self.stream: torch.cuda.Stream | None = None
        if device.startswith("cuda"):
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.threads = ThreadPoolExecutor(THREADS, initializer=self._enter_stream)
        self.coming: deque[_Read] = deque()
        self.held = 0

    def add(self, read: _Read) -> Callable[[], Tensor]:
        """Return a function that returns the tensor, once."""
        self.coming.append(read)
        return partial(self._take, read)

    def close(self) -> None:
        """Wait for the threads, and let others have the memory that their stream holds."""
        self.threads.shutdown(cancel_futures=True)
        if self.stream is not None:
            torch.cuda.empty_cache()

    def _take(self, read: _Read) -> Tensor:
        read.taken = True
        if read.future is None:
            self._start()
            return read.now()
        tensor = read.future.result()
        if tensor.is_cuda:  # its memory is used again only once our kernels are done
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
        read.future = None
        self.held -= read.nbytes
        self._start()
        return tensor

    def _start(self) -> None:
        """Start what there is room for."""
        while self.coming:
            read = self.coming[0]
            if not read.taken:
                if self.held and self.held + read.nbytes > AHEAD:
                    return
                self.held += read.nbytes
                read.future = self.threads.submit(self._read, read)
            self.coming.popleft()

    def _read(self, read: _Read) -> Tensor:
        tensor = read.ahead()
        if read.device.type != "cuda":
            _fault_in(tensor)
        elif read.nbytes <= AHEAD:  # pinned memory is never given back
            tensor = tensor.pin_memory()
        return tensor.to(read.device)

    def _enter_stream(self) -> None:
        if self.stream is not None:
            torch.cuda.set_stream(self.stream)


def _fault_in(tensor: Tensor) -> None:
    """Have a tensor that is a view of a file in memory: look at each of its pages."""
    tensor.detach().flatten().view(torch.uint8)[::4096].sum()
