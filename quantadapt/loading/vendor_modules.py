"""What a backend makes of one layer, or of one stack of experts."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from ..model.experts import Stack


class SaysHow(Protocol):
    """What is written in config.json of how a model is quantized, as
    `protocols.LayerwiseQuantizer` says it."""

    def quantization_config(self) -> dict[str, Any]:
        """Return what goes into config.json."""
        ...

    def left_dense(self, names: list[str], head: str | None) -> dict[str, Any]:
        """Return what config.json says of the layers that stay dense."""
        ...


class LinearQuantizer(SaysHow, Protocol):
    """What is wanted of a quantizer here, as `protocols.LayerwiseQuantizer` says it."""

    @property
    def target(self) -> Any:
        """The view of the layers that this quantizer makes."""
        ...

    def quantize_linear(self, linear: nn.Linear) -> nn.Module:
        """Return the vendor module for a dense layer."""
        ...

    def load_linear(self, linear: nn.Linear, state: dict[str, Tensor]) -> nn.Module:
        """Return the vendor module for the tensors that were saved for it."""
        ...

    def join_rows(self, layers: list[nn.Module]) -> nn.Module:
        """Return one vendor module with the rows of all `layers`."""
        ...


def own_if_dense(vendor: nn.Module, linear: nn.Linear, own: nn.Module) -> nn.Module:
    """Return what a backend made of `linear`; where it handed that back, unquantized, the layer
    that the model itself has there."""
    same = vendor is linear and type(linear.weight) is nn.Parameter
    return own if same else vendor


def quantized_stack(quantizer: LinearQuantizer, stack: Stack, stored: Tensor) -> nn.Module | None:
    """Return what a backend makes of a stack of experts, kept as `stored`: the tall layer,
    quantized; None where it stays dense."""
    linear = stack.as_linear(stored)
    vendor = quantizer.quantize_linear(linear)
    return None if vendor is linear and type(linear.weight) is nn.Parameter else vendor.eval()
