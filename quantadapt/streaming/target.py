"""What a backend's target is while its layers are streamed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

from torch import Tensor, nn

from ..facade import BroughtTarget
from ..protocols import AdapterTarget
from ..protocols.grids import Grid
from .streamer import block_of


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
        block = block_of(module)
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
