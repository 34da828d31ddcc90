"""EETQ's arithmetic, and how its kernels want codes to lie: in tiles of 64 x 64."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

TILE = 64


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes and float32 scales of the rows of `weight`, as the vendor computes them."""
    import torch

    weight = weight.float()
    scales = weight.abs().amax(1) / 128
    exact = weight / scales[:, None]
    whole = exact.trunc()
    rounded = whole + ((exact - whole).abs() >= 0.5) * exact.sign()  # C rounds halves away from 0
    rounded = rounded.nan_to_num(nan=127)  # a row of zeros: 0 / 0, which the vendor clamps to 127
    return rounded.clamp(-128, 127).to(torch.int8), scales


def pack(codes: Tensor) -> Tensor:
    """Return codes [out, in] as the vendor's kernels want them, as int8 of shape [in, out].

    Two rows alternate in runs of 64; within 16 neighbours, pairs are spread so that one load feeds
    the tensor cores; each byte holds code + 128.
    """
    rows, columns = codes.shape
    # pairs of rows, row of the pair, runs, sixteens, halves, pairs in a half, code in a pair
    split = codes.reshape(rows // 2, 2, columns // TILE, 4, 2, 4, 2)
    return split.permute(0, 2, 1, 3, 5, 6, 4).reshape(columns, rows) ^ -128


def unpack(packed: Tensor) -> Tensor:
    """Undo `pack`: int8 [in, out] as the vendor packs it to codes [out, in]."""
    columns, rows = packed.shape
    split = packed.reshape(rows // 2, columns // TILE, 2, 4, 4, 2, 2)
    return split.permute(0, 2, 1, 3, 6, 4, 5).reshape(rows, columns) ^ -128


def dequantize(packed: Tensor, scales: Tensor) -> Tensor:
    """Return the weight [out, in] in float32."""
    return unpack(packed) * scales.float()[:, None]
