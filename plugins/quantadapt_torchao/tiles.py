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


def joined_tiles(weights: list[Any]) -> Any:
    """Return one tensor in tiles of the rows of all; each but the last has whole tiles."""
    import torch

    first = weights[0]
    return type(first)(
        torch.cat([weight.qdata for weight in weights]),
        torch.cat([weight.scale_and_zero for weight in weights], 1),
        first.block_size,
        torch.Size((sum(weight.shape[0] for weight in weights), first.shape[1])),
    )


def of_tiles(weight: Any, packed: Tensor, scale_and_zero: Tensor, rows: int) -> Tensor:
    """Return what `rows` rows of a tensor in tiles stand for; it has no `dequantize`."""
    static = (rows, weight.shape[1], weight.block_size[-1])
    tensors = packed, scale_and_zero
    return one_kernel(_dequantize_tiles, *tensors, static=static, written=_tiles_in_order)


def _tiles_in_order(*given: Any) -> Tensor:
    """As `_dequantize_tiles`. What Inductor makes of that loads a word for each weight, four bytes
    for two that are written, and goes through them by strides."""
    from .triton_tiles import dense_of_tiles

    return dense_of_tiles(*given)


def _dequantize_tiles(
    packed: Tensor, scale_and_zero: Tensor, rows: int, columns: int, group_size: int
) -> Tensor:
    """As `_in_tiles` has it, but by strides alone."""
    import torch

    eights, tiles, _, words = packed.shape
    shifts = torch.arange(0, 32, 4, device=packed.device, dtype=packed.dtype)
    codes = (packed[..., None] >> shifts) & 15
    # [row / 8, tile, row % 8, column % 8 / 2, 32 columns of a tile, column % 2, column % 32 / 8]
    codes = codes.view(eights, tiles, 8, 4, words, 2, 4).permute(0, 2, 1, 4, 6, 3, 5)
    codes = codes.reshape(8 * eights, -1, group_size)[:rows, : columns // group_size]
    groups = scale_and_zero[: columns // group_size, :rows].transpose(0, 1).float()
    scale, zero = groups[..., None].unbind(2)
    return ((codes - 8) * scale + zero).to(scale_and_zero.dtype).view(rows, columns)


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
