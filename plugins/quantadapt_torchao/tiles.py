"""Weights as int4 kernels on CUDA want them, in tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantadapt.compiling import one_kernel
from quantadapt.protocols import UniformGrid

if TYPE_CHECKING:
    from torch import Tensor


TILES, TILE_ROWS = "Int4TilePackedTo4dTensor", 8


@dataclass(frozen=True, eq=False, kw_only=True)
class TileGrid(UniformGrid):
    """Values (code - 8) * scale + zero."""

    def _codes(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        assert zero is not None
        return super()._codes(weight, scale, 8 - zero / scale)

    def _values(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        assert zero is not None
        return ((codes - 8) * scale + zero).to(self.dtype)


def of_tiles(weight: Any, packed: Tensor, scale_and_zero: Tensor, rows: int) -> Tensor:
    """Return what `rows` rows of a tensor in tiles stand for; it has no `dequantize`."""
    static = (rows, weight.shape[1], weight.block_size[-1])
    return one_kernel(_dequantize_tiles, packed, scale_and_zero, static=static)


def _dequantize_tiles(
    packed: Tensor, scale_and_zero: Tensor, rows: int, columns: int, group_size: int
) -> Tensor:
    import torch

    where, shift = _in_tiles(packed, rows, columns)
    codes = (packed[where] >> shift) & 15
    row, column = (torch.arange(count, device=packed.device) for count in (rows, columns))
    scale, zero = scale_and_zero[column[None] // group_size, row[:, None]].float().unbind(-1)
    return ((codes - 8) * scale + zero).to(scale_and_zero.dtype)


def _in_tiles(
    packed: Tensor, rows: int, columns: int
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return in which word of `packed` each code lies, and from which bit on.

    PyTorch's `_convert_weight_to_int4pack` lays weights out as a warp's 32 threads want them:
    [rows / 8, columns / (16 k), 32, k / 2] int32 words of eight codes.
    """
    import torch

    row = torch.arange(rows, device=packed.device)[:, None]
    column = torch.arange(columns, device=packed.device)[None]
    width = 32 * packed.shape[3]  # columns of a tile
    thread = (row % 8) * 4 + column % 8 // 2
    where = row // 8, column // width, thread, column % width // 32
    return where, column % 32 // 8 * 4 + column % 2 * 16


def repacked_tiles(packed: Tensor, codes: Tensor) -> Tensor:
    """Return `packed` with other codes, [rows, columns], in it; its padding stays."""
    where, shift = _in_tiles(packed, *codes.shape)
    before = (packed[where] >> shift) & 15
    changed = (codes - before).long() << shift
    # Each code has its bits for itself, so sums of 64 bits carry nothing over.
    return packed.long().index_put(where, changed, accumulate=True).to(packed.dtype)
