"""Dense weights that stay while a model trains, for a GPU with ample room: else each quantized
weight is dequantized for each product with it."""

from __future__ import annotations

from torch import Tensor, nn

from .quant_weight import QuantWeight
from .wrapping import linear_facades


class DenseWeights:
    """Those of the quantized layers of `model`, of all but stacks of experts, but those whose
    products are in 8-bit floats, and but those that are dense as they are. The numbers are those of
    `dequantize`."""

    def __init__(self, model: nn.Module) -> None:
        found = [layer for _, layer in linear_facades(model)]
        self.layers = [n for n in found if not (n.wants_float8 or _is_dense(n))]

    @property
    def nbytes(self) -> int:
        """What all of them take."""
        shapes = ((n.in_features * n.out_features, n.compute_dtype) for n in self.layers)
        return sum(numbers * dtype.itemsize for numbers, dtype in shapes)

    def make(self) -> None:
        """Have each layer hold its dense weight for the passes in which it trains."""
        for layer in self.layers:
            _hold(layer, layer.dequantize())

    def drop(self) -> bool:
        """Let go of them; say whether anything was there."""
        held = [layer for layer in self.layers if layer.held_weight is not None]
        for layer in held:
            _hold(layer, None)
        return bool(held)


def _is_dense(layer: QuantWeight) -> bool:
    """Say whether the vendor's own tensor is the weight that `dequantize` returns."""
    weight = layer.own_vendor._parameters.get("weight")
    if type(weight) is not nn.Parameter:  # a tensor of a class that unpacks itself
        return False
    shape = layer.out_features, layer.in_features
    return (tuple(weight.shape), weight.dtype) == (shape, layer.compute_dtype)


def _hold(layer: QuantWeight, weight: Tensor | None) -> None:
    layer.__dict__["held_weight"] = weight  # not by setattr, which takes nn.Module long
