"""Layers whose tensors are elsewhere, and are brought for whoever reads them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

from torch import Tensor, nn

from ..protocols import AdapterTarget


class BroughtTarget(AdapterTarget):
    """A backend's target, `target`, whose layers have to be brought before they are read."""

    def __init__(self, target: AdapterTarget) -> None:
        self.target = target
        self.quantizes_activations = target.quantizes_activations
        self.straight_through = target.straight_through
        self.activation_error = target.activation_error

    @staticmethod
    @abstractmethod
    def readable(module: nn.Module) -> AbstractContextManager[Tensor | None]:
        """Inside, the layer's tensors can be read. Gives what holds them and will be used for
        something else afterwards; None where they stay."""
        ...

    def matches(self, module: nn.Module) -> bool:
        """As the backend's."""
        return self.target.matches(module)

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """As the backend's."""
        return self.target.shape(module)

    def dequantize(self, module: nn.Module) -> Tensor:
        """Bring the layer if need be, and return its weight."""
        return self._read(module, self.target.dequantize)

    def dequantize_rows(self, module: nn.Module, first: int, last: int) -> Tensor:
        """Likewise of some rows."""
        return self._read(module, partial(self.target.dequantize_rows, first=first, last=last))

    def _read(self, module: nn.Module, read: Callable[[nn.Module], Tensor]) -> Tensor:
        with self.readable(module) as held:
            weight = read(module)
            return weight.clone() if held is not None and _same_memory(weight, held) else weight

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        """Bring the layer if need be, and run the vendor's forward."""
        with self.readable(module):
            return self.target.forward(module, x)

    def decodes(self, module: nn.Module, x: Tensor) -> bool:
        """As the backend's."""
        return self.target.decodes(module, x)


def _same_memory(one: Tensor, other: Tensor) -> bool:
    """Say whether two tensors share their memory, as the weight of a layer that is not quantized
    does with what was brought."""
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
