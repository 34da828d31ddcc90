"""The layer that holds FP4 weights, and the core's view of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from quantadapt.compiling import one_kernel
from quantadapt.errors import ModelError
from quantadapt.protocols import LayerwiseTarget

from .arithmetic import (
    E8M0_NAN,
    joined,
    mx_dequantize,
    mx_steps,
    nv_dequantize,
    nv_steps,
    on_steps,
    pack,
)

PACKED, SCALE, GLOBAL = "weight_packed", "weight_scale", "weight_global_scale"
"""What the tensors of a layer are called, as in checkpoints of compressed-tensors."""


class FP4Linear(nn.Module):
    """A linear layer with a weight in MXFP4 or, where there is a global scale, NVFP4.

    Args:
        tensors: `weight_packed`, uint8 [out_features, in_features / 2]; `weight_scale`, one for
            each block, uint8 (e8m0) or float8_e4m3fn; of NVFP4 `weight_global_scale`, float32
            [1], or [out_features] of experts that have their own.
        bias: [out_features] or None.
    """

    def __init__(self, tensors: dict[str, Tensor], bias: Tensor | None) -> None:
        super().__init__()
        self.in_features = 2 * tensors[PACKED].shape[1]
        self.out_features = tensors[PACKED].shape[0]
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def block(self) -> int:
        """How many weights share a scale."""
        scale: Any = self.weight_scale
        return self.in_features // int(scale.shape[1])

    @property
    def packed(self) -> tuple[Tensor, ...]:
        """The tensors, as the functions of `arithmetic` take them."""
        return tuple(tensor for tensor in self._buffers.values() if tensor is not None)

    @property
    def steps(self) -> Tensor:
        """What 1 stands for in each block, float32 [out_features, blocks]."""
        _, *scales = self.packed
        return nv_steps(*scales) if len(scales) > 1 else mx_steps(*scales)

    def with_weight(self, weight: Tensor) -> FP4Linear:
        """Return a layer with the same scales that holds `weight` as nearly as they allow."""
        tensors = {PACKED: pack(on_steps(weight, self.steps))}
        tensors |= {name: getattr(self, name) for name in self._buffers if name != PACKED}
        return FP4Linear(tensors, self.bias).train(self.training)

    def dequantize(self) -> Tensor:
        """Return the weight, float32 [out_features, in_features]."""
        function = nv_dequantize if len(self.packed) > 2 else mx_dequantize
        return one_kernel(function, *self.packed)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dequantize().to(x.dtype), self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def moved(tensor: Tensor) -> Tensor:  # `model.half()` is not meant for scales
            found = fn(tensor)
            return found if found.dtype == tensor.dtype else tensor.to(found.device)

        own = dict(self._buffers)
        self._buffers.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers.update({n: None if t is None else moved(t) for n, t in own.items()})
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class FP4Target(LayerwiseTarget):
    """`FP4Linear`."""

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, FP4Linear)

    def dequantize(self, module: nn.Module) -> Tensor:
        layer: Any = module
        found: Tensor = layer.dequantize()
        return found


def join_rows(layers: list[Any]) -> FP4Linear:
    """Return one layer that holds the rows of all `layers`."""
    tensors = {}
    for name in layers[0]._buffers:
        parts = [getattr(layer, name) for layer in layers]
        if name == GLOBAL and all(torch.equal(part, parts[0]) for part in parts):
            tensors[name] = parts[0]
            continue
        if name == GLOBAL:
            parts = [p.expand(layer.out_features) for p, layer in zip(parts, layers, strict=True)]
        tensors[name] = joined(parts)
    return FP4Linear(tensors, None)


def check_scales(tensors: dict[str, Tensor], rows: int, blocks: int) -> None:
    """Raise ModelError where the scales that a checkpoint holds for a layer are not those of so
    many rows and blocks, or no numbers."""
    shape, wanted = tuple(tensors[SCALE].shape), (rows, blocks)
    if shape != wanted:
        raise ModelError(f"its {SCALE} is of {shape}, its config wants {wanted}")
    if tensors[SCALE].dtype == torch.uint8 and bool((tensors[SCALE] == E8M0_NAN).any()):
        raise ModelError(f"its {SCALE} holds values that are no numbers (255)")
    if (common := tensors.get(GLOBAL)) is not None:
        if common.numel() not in (1, rows):
            raise ModelError(f"its {GLOBAL} has {common.numel()} numbers, not 1")
        if not bool((common > 0).all()):
            raise ModelError(f"its {GLOBAL} holds numbers that are not above 0")
