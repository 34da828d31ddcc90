"""A frozen quantized base that lies in CPU memory, and comes to the device block by block while it
computes, whatever its vendor.

The tensors of a decoder block's vendor modules are one row of bytes in page-locked memory (see
`model.flat`). The device has two slots: one for the block that computes, and one into which the
next is copied meanwhile, on a stream of its own. A block comes when somebody reads one of its
layers, in whatever order: forward, backward, a recomputation, an evaluation. Which block comes next
is seen in the pass before, so what is guessed wrong costs time and nothing else. A block's tensors
are views of its slot for as long as it has one, and of its row in CPU memory otherwise: what they
hold is right at any time.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from .errors import ModelError
from .facade import BroughtTarget, QuantWeight, facades, read_in_parts
from .memory.workload import SLOTS
from .model.experts import SUFFIX
from .model.flat import Leaf, laid_out, write_into
from .model.held import held_tensors
from .model.modules import stacks
from .model.page_locked import page_locked, unlock
from .protocols import AdapterTarget
from .protocols.grids import Grid

STAY = ("bias",)
"""Tensors that are read without the backend, and may be trained."""

Which = Literal["experts", "all"]


def stream(model: nn.Module, which: Which = "all", slots: int = SLOTS) -> nn.Module:
    """Keep the quantized layers of `model` in CPU memory from now on, in place; `bring_back` undoes
    it. Works block by block. What stands in no list of blocks stays where it is.

    Args:
        model: holds facades, all on one device.
        which: "experts" leaves all but stacks of experts where it is.
        slots: for how many blocks there is room on the device; 2 or more.

    Raises:
        ModelError: nothing of it can be streamed, or CPU memory cannot be locked.
    """
    streamer = streamer_of(model)
    known = set() if streamer is None else {id(vendor) for vendor in streamer.vendors()}
    found = dict(facades(model))
    for block in _blocks(model, found):
        layers = [facade.own_vendor for _, facade in facades(block)]
        layers = [v for v in _wanted(block, layers, which) if id(v) not in known]
        if layers:
            streamer = streamer or Streamer(next(iter(found.values())).device, slots)
            streamer.add(layers)
    if streamer is None:
        what = "none of its quantized layers stands in a list of blocks"
        if which == "experts":
            what = "it has no quantized stacks of experts"
        raise ModelError(f"the base cannot be streamed: {what}", fix="use train.stream: none")
    for facade in found.values():
        if not isinstance(facade.target, StreamedTarget):
            facade.target = StreamedTarget(facade.target)
    read_in_parts(model, True)
    return model


def bring_back(model: nn.Module) -> nn.Module:
    """Move what is streamed of `model` to the device again, in place."""
    read_in_parts(model, False)
    for streamer in _streamers(model):
        streamer.bring_back()
    for _, facade in facades(model):
        if isinstance(facade.target, StreamedTarget):
            facade.target = facade.target.target
    return model


def streamer_of(model: nn.Module) -> Streamer | None:
    """Return what streams the base of `model`, with facades or yet without; None where nothing
    does."""
    return next(_streamers(model), None)


def stream_block(streamer: Streamer, which: Which, block: nn.Module, made: list[nn.Module]) -> None:
    """Take over the layers of a block that has just been quantized, see `loading.watching_blocks`.
    Their facades need a `StreamedTarget`."""
    if layers := list(_wanted(block, made, which)):
        streamer.add(layers)


def _streamers(model: nn.Module) -> Iterator[Streamer]:
    seen: set[int] = set()
    for module in model.modules():
        held = _block_of(module.own_vendor if isinstance(module, QuantWeight) else module)
        if held is not None and id(held.streamer) not in seen:
            seen.add(id(held.streamer))
            yield held.streamer


def _blocks(model: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    return [block for blocks in stacks(model, names) for block in blocks.values()]


def _wanted(block: nn.Module, layers: Iterable[nn.Module], which: Which) -> Iterator[nn.Module]:
    experts = {
        id(getattr(module, "own_vendor", module))
        for name, module in block.named_modules()
        if name.endswith(SUFFIX)
    }
    return (layer for layer in layers if which == "all" or id(layer) in experts)


# --- what brings blocks --------------------------------------------------------------------------

_ATTRIBUTE = "_streamed"


def _block_of(vendor: nn.Module) -> _Block | None:
    """Return the block that a vendor's layer is streamed with, if it is."""
    block: _Block | None = vars(vendor).get(_ATTRIBUTE)
    return None if block is None or block.row is None else block


class StreamedTarget(BroughtTarget):
    """A backend's target whose layers come to the device when somebody reads them. What is written
    into one of them stays there."""

    def __init__(self, target: AdapterTarget) -> None:
        super().__init__(target)
        self.reads_rows = target.reads_rows  # a block that is here stays for all parts

    @staticmethod
    @contextmanager
    def readable(module: nn.Module) -> Iterator[Tensor | None]:
        """Bring the layer's block."""
        block = _block_of(module)
        yield None if block is None else block.streamer.use(block)

    def grid(self, module: nn.Module) -> Grid | None:
        """As the backend's, in memory of its own."""
        with self.readable(module):
            found = self.target.grid(module)
            if found is None:
                return None
            parts = {field.name: getattr(found, field.name) for field in fields(found)}
            own: dict[str, Any] = {
                name: part.clone() for name, part in parts.items() if isinstance(part, Tensor)
            }
            return replace(found, **own)

    def requantize(self, module: nn.Module, weight: Tensor) -> nn.Module:
        """As the backend's; the new layer is on the device."""
        with self.readable(module):
            return self.target.requantize(module, weight)

    def repack(self, module: nn.Module, weight: Tensor) -> nn.Module:
        """As the backend's; what is new in the layer is on the device."""
        with self.readable(module):
            return self.target.repack(module, weight)

    def restore(self, module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
        """As the backend's; the new layer is on the device."""
        return self.target.restore(module, state)


class Streamer:
    """Brings the blocks of one model to its device.

    Args:
        device: where they compute. For a CPU blocks are copied all the same, which serves tests.
        slots: for how many blocks there is room there; 2 or more.
    """

    def __init__(self, device: torch.device, slots: int = SLOTS) -> None:
        self.device, self.count = torch.empty(0, device=device).device, slots  # with its number
        self.blocks: list[_Block] = []
        self.traffic = Traffic()
        self._slots: list[_Slot] = []
        self._current: _Block | None = None
        self._before: _Block | None = None
        self._after: dict[tuple[_Block | None, _Block], _Block] = {}
        is_cuda = self.device.type == "cuda"
        self._side = torch.cuda.Stream(self.device) if is_cuda else None  # type: ignore[no-untyped-call]

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        what = "a base that is streamed from CPU memory cannot be pickled"
        raise ModelError(what, fix="move it to its device first: quantadapt.streaming.bring_back")

    @property
    def nbytes(self) -> int:
        """The bytes of all blocks, in CPU memory."""
        return sum(block.nbytes for block in self.blocks)

    def vendors(self) -> Iterator[nn.Module]:
        """Yield the layers that are streamed."""
        for block in self.blocks:
            yield from block.vendors

    def add(self, vendors: Iterable[nn.Module]) -> None:
        """Move the layers of one block, which are on the device, to CPU memory.

        Raises:
            ModelError: that cannot be locked.
        """
        vendors = list(vendors)
        leaves, nbytes = laid_out(vendors, STAY)
        if not leaves:
            return
        self.rest()  # slots may be too small now
        row = page_locked(nbytes) if self._side else torch.empty(nbytes, dtype=torch.uint8)
        block = _Block(self, vendors, leaves, row)
        if self._side:
            weakref.finalize(block, unlock, row).atexit = False
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
        target = slot.row[: block.nbytes]
        if self._side is None:
            with self.traffic.waiting():
                target.copy_(block.row)
        else:
            self._side.wait_event(slot.free)
            started = _timed_event(self._side)
            with torch.cuda.stream(self._side):
                target.copy_(block.row, non_blocking=True)
            slot.coming = started, _timed_event(self._side)
        self.traffic.nbytes += block.nbytes
        slot.block, block.slot = block, slot

    def _await(self, block: _Block) -> None:
        """Have the current stream wait until a block is there, and let its layers see it."""
        slot = block.slot
        assert slot is not None
        self.traffic.blocks += 1
        slot.used = self.traffic.blocks
        if slot.coming is not None:
            stream = torch.cuda.current_stream(self.device)
            before = _timed_event(stream)
            stream.wait_event(slot.coming[1])
            self.traffic.note(*slot.coming, before, _timed_event(stream))
            slot.coming = None
        block.enter()

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
        coming: events before and after the copy, until somebody has waited for it.
        used: the number of the last use.
    """

    def __init__(self, row: Tensor, free: Any) -> None:
        self.row, self.free = row, free
        self.block: _Block | None = None
        self.coming: tuple[Any, Any] | None = None
        self.used = 0


class _Block:
    """The quantized layers of one decoder block: `row` are their bytes in CPU memory."""

    def __init__(
        self, streamer: Streamer, vendors: list[nn.Module], leaves: list[Leaf], row: Tensor
    ) -> None:
        self.streamer, self.vendors, self.leaves = streamer, vendors, leaves
        self.row: Tensor | None = row
        self.nbytes = row.numel()
        self.slot: _Slot | None = None
        self._seen = row
        self._views: dict[int, list[Tensor]] = {}
        write_into(row, leaves)
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
        """Let the layers see CPU memory, and give up the slot."""
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
    """Give tensors memory of their own, with what is in `row`."""
    made: dict[Any, Tensor] = {}
    for leaf in leaves:
        view = leaf.view(row)
        key = leaf.offset, view.dtype, leaf.size, leaf.stride  # some have two names
        if key not in made:
            made[key] = view.clone()
        leaf.become(made[key])


# --- what it takes -------------------------------------------------------------------------------


class Traffic:
    """What streaming has moved so far.

    Attributes:
        nbytes: copied to the device.
        blocks: how often a block was begun.
        copied: seconds that copies took.
        waited: seconds that the computation stood still for them.
    """

    def __init__(self) -> None:
        self.blocks = 0
        self.restart()

    def restart(self) -> None:
        """Count from here on."""
        self.nbytes = 0
        self.copied = self.waited = 0.0
        self._open: deque[tuple[Any, Any, Any, Any]] = deque()

    @property
    def hidden(self) -> float | None:
        """The share of the time of copies in which the device computed; None without copies."""
        self.settle()
        return None if not self.copied else max(0.0, 1 - self.waited / self.copied)

    def note(self, *events: Any) -> None:
        """Note the events before and after a copy, and before and after waiting for it."""
        self._open.append(events)  # type: ignore[arg-type]
        while self._open and self._open[0][3].query():
            self._close(*self._open.popleft())

    def settle(self) -> None:
        """Wait for what is open."""
        while self._open:
            self._open[0][3].synchronize()
            self._close(*self._open.popleft())

    def _close(self, started: Any, done: Any, before: Any, after: Any) -> None:
        self.copied += started.elapsed_time(done) / 1000
        self.waited += before.elapsed_time(after) / 1000

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Note what is copied inside, while nothing else is done."""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self.copied += seconds
        self.waited += seconds


def _timed_event(stream: Any) -> Any:
    event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event
