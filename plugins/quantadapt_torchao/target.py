"""torchao's layers: what their weights stand for, and which values those can have."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from quantadapt.compiling import one_kernel
from quantadapt.protocols import (
    ByteCodes,
    CodebookGrid,
    Grid,
    LayerwiseTarget,
    UniformGrid,
    float8_levels,
    twin,
)

from .tiles import TILE_ROWS, TILES, TileGrid, of_tiles, repacked_tiles

if TYPE_CHECKING:
    from torch import Tensor, nn


DECODING = 128
"""Tokens up to which torchao's product with tiles beats dequantizing on CUDA."""


class TorchAOTarget(LayerwiseTarget):
    """`nn.Linear` whose weight is one of torchao's tensor subclasses."""

    reads_rows = True

    def matches(self, module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        return type(weight).__module__.startswith("torchao.") and hasattr(module, "in_features")

    def dequantize(self, module: nn.Module) -> Tensor:
        weight: Any = module.weight
        if type(weight).__name__ == TILES:
            return of_tiles(weight, weight.qdata, weight.scale_and_zero, weight.shape[0])
        return _of_parts(weight)

    def dequantize_rows(self, module: nn.Module, first: int, last: int) -> Tensor:
        import torch

        weight: Any = module.weight
        with torch.no_grad():
            if type(weight).__name__ != TILES:
                return _of_parts(weight[first:last])
            if first % TILE_ROWS or last % TILE_ROWS:
                return super().dequantize_rows(module, first, last)
            packed = weight.qdata[first // TILE_ROWS : last // TILE_ROWS]
            scales = weight.scale_and_zero[:, first:last].contiguous()
            return of_tiles(weight, packed, scales, last - first)

    def grid(self, module: nn.Module) -> Grid | None:
        import torch

        weight: Any = module.weight
        kind, dtype = type(weight).__name__, weight.dtype
        if kind == TILES:
            size = weight.block_size[-1]
            parts = weight.scale_and_zero.transpose(0, 1).float()
            scale, zero = parts[:, : weight.shape[1] // size].unbind(-1)  # no padding
            return TileGrid(
                scale=scale, zero=zero, group_size=size, dtype=dtype, lowest=0, highest=15
            )
        if kind == "Float8Tensor" and tuple(weight.block_size) == (1, weight.shape[1]):
            return CodebookGrid(
                scale=weight.scale.view(-1, 1),
                group_size=weight.shape[1],
                dtype=dtype,
                levels=float8_levels(weight.qdata.dtype, weight.device),
            )
        if kind not in ("Int8Tensor", "IntxUnpackedToInt8Tensor") or weight.block_size[0] != 1:
            return None
        bits = int(str(getattr(weight, "target_dtype", torch.int8)).removeprefix("torch.int"))
        zero = weight.zero_point
        return UniformGrid(
            scale=weight.scale.view(weight.shape[0], -1),
            zero=None if zero is None else zero.view(weight.shape[0], -1),
            group_size=weight.block_size[1],
            dtype=dtype,
            lowest=-(2 ** (bits - 1)),
            highest=2 ** (bits - 1) - 1,
        )

    def repack(self, module: nn.Module, weight: Tensor) -> nn.Module:
        import torch

        grid, old = self.grid(module), cast("Any", module.weight)
        assert grid is not None
        codes = grid.codes(weight)
        if isinstance(grid, CodebookGrid):  # a code is the byte itself
            codes = codes.to(torch.uint8).view(old.qdata.dtype)
        elif isinstance(grid, TileGrid):
            codes = repacked_tiles(old.qdata, codes)
        names, context = old.__tensor_flatten__()
        parts = {name: getattr(old, name) for name in names} | {"qdata": codes.to(old.qdata.dtype)}
        packed = type(old).__tensor_unflatten__(parts, context, old.shape, old.stride())
        return twin(module, weight=torch.nn.Parameter(packed, requires_grad=False))

    def decodes(self, module: nn.Module, x: Tensor) -> bool:
        """Say whether torchao's product with such a weight is the faster one for `x` on CUDA."""
        import torch

        few = x.numel() <= DECODING * x.shape[-1]
        # It computes in bfloat16 whatever it is given.
        tiles = type(module.weight).__name__ == TILES and x.dtype == torch.bfloat16
        return x.is_cuda and few and tiles

    def byte_codes(self, module: nn.Module) -> ByteCodes | None:
        weight: Any = module.weight
        if type(weight).__name__ == TILES or (grid := self.grid(module)) is None:
            return None
        return ByteCodes(held=weight.qdata, grid=grid)


@dataclass(frozen=True)
class _Layout:
    """What a tensor subclass is beside the tensors in it."""

    kind: Any
    names: tuple[str, ...]
    shape: tuple[int, ...]
    key: str
    context: Any = field(compare=False)


def _dequantize_parts(*parts: Any) -> Tensor:
    *tensors, layout = parts
    inner = dict(zip(layout.names, tensors, strict=True))
    whole = layout.kind.__tensor_unflatten__(inner, layout.context, layout.shape, None)
    dense: Tensor = whole.dequantize()
    return dense


def _of_parts(weight: Any) -> Tensor:
    """Return what a tensor with a `dequantize` of its own stands for."""
    names, context = weight.__tensor_flatten__()
    layout = _Layout(type(weight), tuple(names), tuple(weight.shape), repr(context), context)
    tensors = tuple(getattr(weight, name) for name in names)
    return one_kernel(_dequantize_parts, *tensors, static=(layout,), otherwise=weight.dequantize)
