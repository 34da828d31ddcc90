"""The layer that holds FP4 weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn

from quantadapt.compiling import one_kernel
from quantadapt.errors import ModelError
from quantadapt.protocols import WordCodes

from .arithmetic import (
    E8M0_NAN,
    MX_BLOCK,
    NV_BLOCK,
    joined,
    mx_dequantize,
    mx_steps,
    nv_dequantize,
    nv_steps,
    values_of,
)

PACKED, SCALE, GLOBAL = "weight_packed", "weight_scale", "weight_global_scale"
"""What the tensors of a layer are called, as in checkpoints of compressed-tensors."""
_SCALES = {MX_BLOCK: torch.uint8, NV_BLOCK: torch.float8_e4m3fn}


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

    def dequantize(self) -> Tensor:
        """Return the weight, float32 [out_features, in_features]."""
        packed, scale, *common = self.packed
        function = nv_dequantize if common else mx_dequantize
        return one_kernel(function, packed, scale.view(torch.uint8), *common)

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


@cache
def levels(device: torch.device) -> Tensor:
    """Return what the sixteen codes stand for, float32 [16]."""
    with torch.inference_mode(False):
        return values_of(torch.arange(16, dtype=torch.uint8, device=device))


def word_codes(layer: Any) -> WordCodes:
    """Return what a layer holds: eight codes of a row make a word."""
    packed, scale, *common = layer.packed
    powers = not common
    return WordCodes(
        held=packed.view(torch.int32).t(),
        bits=4,
        scale=(scale.view(torch.float8_e8m0fnu) if powers else scale).t(),
        group_size=layer.block,
        floats=True,
        divisor=None if powers else common[0],
    )


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


def split_rows(layer: Any, count: int) -> list[nn.Module] | None:
    """Return a layer as `count` layers of as many rows each; None where rows of one of them have
    different global scales."""
    rows, made = layer.out_features // count, []
    for n in range(count):
        part = {name: tensor[n * rows : (n + 1) * rows] for name, tensor in layer._buffers.items()}
        if GLOBAL in part:
            scales = layer.weight_global_scale.expand(layer.out_features)[n * rows :][:rows]
            if not bool((scales == scales[0]).all()):
                return None
            part[GLOBAL] = scales[:1].clone()
        made.append(FP4Linear(part, None))
    return [*made]


def tensors_of(state: dict[str, Tensor], rows: int, columns: int, block: int) -> dict[str, Tensor]:
    """Return the tensors of a layer of `rows` x `columns` from what a checkpoint holds for it, in
    whatever shape.

    Raises:
        KeyError, RuntimeError: one is missing, or of another size. ModelError: they are others.
    """
    found = {name: state[name].reshape(rows, -1) for name in (PACKED, SCALE)}
    if block == NV_BLOCK:
        found[GLOBAL] = state[GLOBAL].reshape(-1)
    elif found[SCALE].dtype == torch.float8_e8m0fnu:
        found[SCALE] = found[SCALE].view(torch.uint8)
    kinds = {PACKED: torch.uint8, SCALE: _SCALES[block], GLOBAL: torch.float32}
    for name, tensor in found.items():
        if tensor.dtype != kinds[name]:
            raise ModelError(f"its {name} is of {tensor.dtype}, not {kinds[name]}")
    if (shape := tuple(found[SCALE].shape)) != (rows, columns // block):
        raise ModelError(f"its {SCALE} is of {shape}, its config wants {(rows, columns // block)}")
    if block == MX_BLOCK and bool((found[SCALE] == E8M0_NAN).any()):
        raise ModelError(f"its {SCALE} holds values that are no numbers (255)")
    if block == NV_BLOCK and found[GLOBAL].numel() not in (1, rows):
        raise ModelError(f"its {GLOBAL} has {found[GLOBAL].numel()} numbers, not 1")
    if block == NV_BLOCK and not bool((found[GLOBAL] > 0).all()):
        raise ModelError(f"its {GLOBAL} is not above 0")
    return found
