"""Inputs of recomputed layers in CPU memory, from forward to backward."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..model.page_locked import page_locked, unlock

FIX = "lower data.max_length or the batch, let fewer processes share this machine, or free memory"


class CpuInputs:
    """Keeps the inputs of recomputed layers in CPU memory from forward to backward.

    On CUDA the copies run on a stream of their own, to and from page-locked buffers that are used
    again (locking takes long), until this is closed. When the input of a layer is fetched, that of
    the layer before it sets out, too. On a CPU the tensors are copied all the same, which serves
    tests alone.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._locked: list[Tensor] = []
        self.close = weakref.finalize(self, _unlock, self._locked)
        """Makes the buffers ordinary memory again."""
        self.close.atexit = False  # CUDA may be gone before
        self._last: weakref.ref[StoredTensor] | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @property
    def nbytes(self) -> int:
        """The page-locked memory that is used, and used again."""
        return sum(buffer.nbytes for buffer in self._locked)

    @contextmanager
    def saving(self, hidden: Tensor, remade: Callable[[], Tensor] | None = None) -> Iterator[None]:
        """Inside, autograd saves `hidden` here and everything else as ever.

        Args:
            remade: makes `hidden` again, which is not stored then.
        """

        # The hook gets a detached alias, so it is known by its memory. Autograd keeps the hook, and
        # with it whatever the hook refers to: not `hidden`, which is to be freed.
        address, shape = hidden.data_ptr(), hidden.shape

        def pack(tensor: Tensor) -> Any:
            if tensor.data_ptr() != address or tensor.shape != shape:
                return tensor
            return remade or self._store(tensor)

        def unpack(saved: Any) -> Tensor:
            if isinstance(saved, StoredTensor):
                return saved.fetched()
            return saved if isinstance(saved, Tensor) else saved()

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    @property
    def last(self) -> StoredTensor | None:
        """What was stored last, if it is there still."""
        return None if self._last is None else self._last()

    def beside(self, tensor: Tensor) -> StoredTensor:
        """Store what a layer keeps beside its input, which is fetched together with that."""
        return self._store(tensor, begins=False)

    def _store(self, tensor: Tensor, begins: bool = True) -> StoredTensor:
        if (before := self.last) is not None:
            before.let_go()
        stored = StoredTensor(self, tensor, self._last, begins)
        self._last = weakref.ref(stored)
        return stored

    def take(self, tensor: Tensor) -> Tensor:
        """Return a buffer with room for `tensor`: flat, of bytes; the smallest that is free, as
        others are for larger ones. Raises ModelError where there is no memory for it."""
        sizes = [(buffer.numel(), index) for index, buffer in enumerate(self._free)]
        if fitting := [found for found in sizes if found[0] >= tensor.nbytes]:
            return self._free.pop(min(fitting)[1])
        if self._free:  # all too small, and never to be used again
            self._forget(self._free.pop())
        if not tensor.is_cuda:
            return torch.empty(tensor.nbytes, dtype=torch.uint8)
        buffer = page_locked(tensor.nbytes, "the inputs of layers", FIX, "train.memory")
        self._locked.append(buffer)
        return buffer

    def _forget(self, buffer: Tensor) -> None:
        for index, locked in enumerate(self._locked):
            if locked is buffer:
                _unlock([self._locked.pop(index)])
                return

    def release(self) -> None:
        """Make buffers that nothing waits in ordinary memory again, and free them."""
        while self._free:
            self._forget(self._free.pop())

    def give(self, buffer: Tensor) -> None:
        """Take a buffer back; copies that still read it come first on the stream."""
        self._free.append(buffer)

    def copy(self, target: Tensor, source: Tensor, device: torch.device) -> Any:
        """Copy behind the computation's back, once what it has done so far is done; return what
        tells that the copy is there: an event, or None where nothing has to be awaited."""
        if device.type != "cuda":
            target.copy_(source)
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            return stream.record_event()


def _unlock(buffers: list[Tensor]) -> None:
    if buffers:
        torch.cuda.synchronize()  # copies may be under way
    while buffers:
        unlock(buffers.pop())


class StoredTensor:
    """One tensor in CPU memory, and the one that was stored before it.

    Memory of the device is given back once the computation has waited for the copy, which was done
    long before. (With `record_stream` it would come free only when the copy has really run, and the
    program runs far ahead of the device.)
    """

    def __init__(
        self,
        owner: CpuInputs,
        tensor: Tensor,
        previous: weakref.ref[StoredTensor] | None,
        begins: bool,
    ) -> None:
        self.owner, self.previous, self.begins = owner, previous, begins
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.buffer = owner.take(tensor)
        weakref.finalize(self, owner.give, self.buffer)
        self.on_device: Tensor | None = tensor
        self.copied = owner.copy(self._view(), tensor, tensor.device)

    def _view(self) -> Tensor:
        size = self.shape.numel() * self.dtype.itemsize
        return self.buffer[:size].view(self.dtype).view(self.shape)

    def _wait(self) -> None:
        if self.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(self.copied)

    def let_go(self) -> None:
        """Free the tensor on the device."""
        self._wait()
        self.on_device = None

    def fetch(self) -> None:
        """Start copying it back."""
        if self.on_device is None:
            self.on_device = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            self.copied = self.owner.copy(self.on_device, self._view(), self.device)

    def kept(self) -> Tensor:
        """Return it on its device, where it stays until it is `fetched`."""
        self.fetch()
        self._wait()
        assert self.on_device is not None
        return self.on_device

    def fetched(self) -> Tensor:
        """Return it on its device; with the input of a layer, start fetching what the layer before
        it, which is wanted next, has stored."""
        tensor, self.on_device = self.kept(), None
        before = self._before() if self.begins else None
        while before is not None:
            before.fetch()
            before = None if before.begins else before._before()
        return tensor

    def _before(self) -> StoredTensor | None:
        return None if self.previous is None else self.previous()
