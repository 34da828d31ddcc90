"""Models whose quantized layers are streamed: begun, looked for, ended."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from torch import nn

from ..errors import ModelError
from ..facade import QuantWeight, facades, read_in_parts
from ..memory.resident import SLOTS
from ..model.experts import SUFFIX
from ..model.modules import stacks
from .streamer import Streamer, block_of
from .target import StreamedTarget

Which = Literal["experts", "all"]


def stream(
    model: nn.Module,
    which: Which = "all",
    slots: int = SLOTS,
    folder: str | Path | None = None,
) -> nn.Module:
    """Keep the quantized layers of `model` in CPU memory from now on, in place; `bring_back` undoes
    it. Works block by block. What stands in no list of blocks stays where it is.

    Args:
        model: holds facades, all on one device.
        which: "experts" leaves all but stacks of experts where it is.
        slots: for how many blocks there is room on the device; 2 or more.
        folder: on a fast disk, to keep the layers in instead of CPU memory: in a file without a
            name, which is gone when the process ends.

    Raises:
        ModelError: nothing of it can be streamed, CPU memory cannot be locked, or the disk is full;
            the model is as it was.
    """
    begins = streamer_of(model) is None
    try:
        return _stream(model, which, slots, folder)
    except ModelError:
        if begins:
            bring_back(model)
        raise


def _stream(model: nn.Module, which: Which, slots: int, folder: str | Path | None) -> nn.Module:
    streamer = streamer_of(model)
    known = set() if streamer is None else {id(vendor) for vendor in streamer.vendors()}
    found = dict(facades(model))
    for block in _blocks(model, found):
        layers = [facade.own_vendor for _, facade in facades(block)]
        layers = [v for v in _wanted(block, layers, which) if id(v) not in known]
        if layers:
            streamer = streamer or Streamer(next(iter(found.values())).device, slots, folder)
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
    """Move what is streamed of `model` to the device again, in place. Raises torch's
    OutOfMemoryError where there is no room for all of it: what is left is still streamed."""
    for streamer in _streamers(model):
        streamer.bring_back()
    read_in_parts(model, False)
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
        held = block_of(module.own_vendor if isinstance(module, QuantWeight) else module)
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
