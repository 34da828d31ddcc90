"""What happens each time that all layers of a decoder block are quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import nn

BlockDone = Callable[[nn.Module, list[nn.Module]], None]
_block_done: BlockDone | None = None


@contextmanager
def watching_blocks(done: BlockDone) -> Iterator[None]:
    """Inside, `done` gets each decoder block and its quantized layers as soon as all of them are
    made, while the model is still being loaded or quantized."""
    global _block_done
    before, _block_done = _block_done, done
    try:
        yield
    finally:
        _block_done = before


class Blocks:
    """Collects the quantized layers of each decoder block, for `watching_blocks`."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        from ..model.modules import decoder_blocks

        blocks = (decoder_blocks(model) or {}) if _block_done else {}
        self.waiting = {
            block: {name for name in names if name.startswith(f"{block}.")} for block in blocks
        }
        self.made: dict[str, list[nn.Module]] = {block: [] for block in blocks}

    def add(self, model: nn.Module, name: str, vendor: nn.Module | None) -> None:
        """Note that the layer `name` has become `vendor`; None: that it stays dense."""
        block = next((block for block, names in self.waiting.items() if name in names), None)
        if block is None or _block_done is None:
            return
        self.waiting[block].discard(name)
        if vendor is not None:
            self.made[block].append(vendor)
        if not self.waiting[block]:
            _block_done(model.get_submodule(block), self.made.pop(block))
