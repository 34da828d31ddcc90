"""Brings blocks of a model to its device while it computes."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..memory.resident import SLOTS
from ..model.flat import Leaf, laid_out
from ..model.held import held_tensors
from .rows import Copy, InMemory, OnDisk, Rows
from .traffic import Traffic, timed_event

STAY = ("bias",)
"""Tensors that are read without the backend, and may be trained."""

_ATTRIBUTE = "_streamed"


def block_of(vendor: nn.Module) -> _Block | None:
    """Return the block that a vendor's layer is streamed with, if it is."""
    block: _Block | None = vars(vendor).get(_ATTRIBUTE)
    return None if block is None or block.row is None else block


class Streamer:
    """Brings the blocks of one model to its device.

    Args:
        device: where they compute. For a CPU blocks are copied all the same, which serves tests.
        slots: for how many blocks there is room there; 2 or more.
        folder: on a fast disk, to keep the blocks in instead of CPU memory.
    """

    def __init__(
        self, device: torch.device, slots: int = SLOTS, folder: str | Path | None = None
    ) -> None:
        self.device, self.count = torch.empty(0, device=device).device, slots  # with its number
        self.blocks: list[_Block] = []
        self.traffic = Traffic()
        self._slots: list[_Slot] = []
        self._current: _Block | None = None
        self._before: _Block | None = None
        self._after: dict[tuple[_Block | None, _Block], _Block] = {}
        is_cuda = self.device.type == "cuda"
        self._rows: Rows = InMemory(is_cuda) if folder is None else OnDisk(Path(folder))
        self._side = torch.cuda.Stream(self.device) if is_cuda else None  # type: ignore[no-untyped-call]

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        what = "a base that is streamed cannot be pickled"
        raise ModelError(what, fix="move it to its device first: quantadapt.streaming.bring_back")

    @property
    def nbytes(self) -> int:
        """The bytes of all blocks, in CPU memory or on disk."""
        return sum(block.nbytes for block in self.blocks)

    def vendors(self) -> Iterator[nn.Module]:
        """Yield the layers that are streamed."""
        for block in self.blocks:
            yield from block.vendors

    def add(self, vendors: Iterable[nn.Module]) -> None:
        """Move the layers of one block, which are on the device, to where blocks are kept.

        Raises:
            ModelError: there is no room, or CPU memory that cannot be locked.
        """
        vendors = list(vendors)
        leaves, nbytes = laid_out(vendors, STAY)
        if not leaves:
            return
        self.rest()  # slots may be too small now
        row = self._rows.keep(leaves, nbytes)
        block = _Block(self, vendors, leaves, row)
        weakref.finalize(block, self._rows.let_go, row).atexit = False
        self.blocks.append(block)

    def use(self, block: _Block) -> Tensor:
        """Have `block` on the device, for what the current stream does next; return its slot's
        row. The one that is likely to follow sets out."""
        if block is not self._current:
            if block.slot is None:
                self._fetch(block)
            self._leave()
            self._await(block)
            self._learn(block)
            follows = self._after.get((self._before, block))
            if follows is not None and follows.slot is None:
                self._fetch(follows)
        assert block.slot is not None
        return block.slot.row

    def _learn(self, block: _Block) -> None:
        if self._current is not None:
            self._after[self._before, self._current] = block
        self._before, self._current = self._current, block

    def _leave(self) -> None:
        """Note when the block that is current is done with its slot."""
        if self._current is not None and self._current.slot is not None and self._side:
            self._current.slot.free = torch.cuda.current_stream(self.device).record_event()

    def _fetch(self, block: _Block) -> None:
        """Start copying a block into the slot that has been left alone for the longest time."""
        others = (s for s in self._room() if s.block is None or s.block is not self._current)
        slot = min(others, key=lambda slot: slot.used)
        if slot.block is not None:
            slot.block.leave()
        assert block.row is not None
        with self._waiting():
            target = slot.row[: block.nbytes]
            slot.coming = self._rows.copy(block.row, target, slot.free, self._side)
        self.traffic.nbytes += block.nbytes
        slot.block, block.slot = block, slot

    def _await(self, block: _Block) -> None:
        """Have the current stream wait until a block is there, and let its layers see it."""
        slot = block.slot
        assert slot is not None
        self.traffic.blocks += 1
        slot.used = self.traffic.blocks
        if slot.coming is not None:
            stream = torch.cuda.current_stream(self.device) if self._side else None
            before = None if stream is None else timed_event(stream)
            try:
                with self._waiting():
                    events = slot.coming.result()
            except Exception:  # it is not there, and nobody is to take it for that
                slot.coming = None
                block.leave()
                raise
            if stream is not None and events is not None:
                stream.wait_event(events[1])
                self.traffic.note(*events, before, timed_event(stream))
            slot.coming = None
        block.enter()

    def _waiting(self) -> AbstractContextManager[None]:
        """Without CUDA nothing else is done meanwhile."""
        return self.traffic.waiting() if self._side is None else nullcontext()

    def _room(self) -> list[_Slot]:
        if not self._slots:
            size = max(block.nbytes for block in self.blocks)
            for _ in range(self.count):
                row = torch.empty(size, dtype=torch.uint8, device=self.device)
                stream = torch.cuda.current_stream(self.device) if self._side else None
                self._slots.append(_Slot(row, stream and stream.record_event()))
        return self._slots

    def rest(self) -> None:
        """Leave the device, and give its memory back, until a block is read again."""
        for block in self.blocks:
            block.leave()
            block.forget_slots()
        self._rows.rest()
        if self._side and self._slots:  # a copy may be under way into what is given back
            torch.cuda.current_stream(self.device).wait_stream(self._side)
        self._slots, self._current, self._before = [], None, None

    def bring_back(self) -> None:
        """Move all blocks to the device for good."""
        self.rest()
        self._after.clear()
        while self.blocks:
            self.blocks[-1].bring_back(self.device)
            self.blocks.pop()


class _Slot:
    """Room for one block on the device.

    Attributes:
        row: uint8, as long as the largest block.
        free: CUDA's event after which nothing reads what is in it.
        block: which is in it, or coming.
        coming: the copy, until somebody has waited for it.
        used: the number of the last use.
    """

    def __init__(self, row: Tensor, free: Any) -> None:
        self.row, self.free = row, free
        self.block: _Block | None = None
        self.coming: Copy | None = None
        self.used = 0


class _Block:
    """The quantized layers of one decoder block: `row` are their bytes, as `Rows` keep them."""

    def __init__(
        self, streamer: Streamer, vendors: list[nn.Module], leaves: list[Leaf], row: Tensor
    ) -> None:
        self.streamer, self.vendors, self.leaves = streamer, vendors, leaves
        self.row: Tensor | None = row
        self.nbytes = row.numel()
        self.slot: _Slot | None = None
        self._seen = row
        self._views: dict[int, list[Tensor]] = {}
        self._point_to(row)
        for vendor in vendors:
            vars(vendor)[_ATTRIBUTE] = self

    def _point_to(self, row: Tensor) -> None:
        """Let the layers' tensors be views of `row`; which is done often, so views are kept."""
        self._seen, place = row, row.data_ptr()
        if place not in self._views:
            self._views[place] = [leaf.view(row) for leaf in self.leaves]
        for leaf, view in zip(self.leaves, self._views[place], strict=True):
            leaf.become(view)

    def enter(self) -> None:
        """Let the layers see what is in the slot."""
        assert self.slot is not None
        self._point_to(self.slot.row)

    def leave(self) -> None:
        """Let the layers see their row, and give up the slot."""
        if self.slot is not None and self.row is not None:
            self._point_to(self.row)
            self.slot.block, self.slot = None, None

    def forget_slots(self) -> None:
        """Keep no view of a slot, and so none of its memory."""
        here = None if self.row is None else self.row.data_ptr()
        self._views = {place: views for place, views in self._views.items() if place == here}

    @contextmanager
    def apart(self, vendor: nn.Module) -> Iterator[None]:
        """Inside, one of the layers is a layer like any other, with memory of its own on the
        device, so that it can be copied."""
        tensors = {id(tensor) for _, tensor in held_tensors(vendor)}
        own = [leaf for leaf in self.leaves if id(leaf.tensor) in tensors]
        _give_memory(own, self.streamer.use(self))
        del vars(vendor)[_ATTRIBUTE]
        try:
            yield
        finally:
            vars(vendor)[_ATTRIBUTE] = self
            for leaf in own:
                leaf.point_to(self._seen)

    def bring_back(self, device: torch.device) -> None:
        """Give the layers memory of their own on `device`."""
        assert self.row is not None
        _give_memory(self.leaves, self.row.to(device, copy=True))
        self.row, self.slot = None, None
        self._views.clear()
        for vendor in self.vendors:
            vars(vendor).pop(_ATTRIBUTE, None)


def _give_memory(leaves: Iterable[Leaf], row: Tensor) -> None:
    """Give tensors memory of their own, with what is in `row`; all of them, or none where there is
    not enough."""
    made: dict[Any, Tensor] = {}
    given: list[tuple[Leaf, Tensor]] = []
    for leaf in leaves:
        view = leaf.view(row)
        key = leaf.offset, view.dtype, leaf.size, leaf.stride  # some have two names
        if key not in made:
            made[key] = view.clone()
        given.append((leaf, made[key]))
    for leaf, own in given:
        leaf.become(own)
