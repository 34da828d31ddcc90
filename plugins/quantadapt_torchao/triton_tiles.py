"""torchao's int4 tiles as the dense weight that they stand for, each word read once, in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantadapt.compiling import on_its_device

ROWS, COLUMNS, WARPS = 32, 256, 4
"""The weights of a program."""


@triton.jit  # type: ignore[untyped-decorator]
def _dense(  # type: ignore[no-untyped-def]
    made,
    packed,
    parts,
    rows,
    columns,
    tiles,
    stride,
    blocks,
    WORDS: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    """Words lie as [rows / 8, tiles, 8, 4, WORDS], as many for eight rows as columns; their columns
    are [tiles, WORDS, 4, 4, 2], of which the words of a row have the second 4. In a word lie [2, 4]
    codes, the first at its end.
    """
    top = (tl.program_id(0) // blocks).to(tl.int64) * ROWS
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    row, eight, padded = tl.arange(0, ROWS), tl.arange(0, ROWS // 8), tiles * (32 * WORDS)

    mask = (eight * 8 < rows - top)[:, None] & (column < padded)[None, :]
    at = top // 8 * padded + (eight * padded)[:, None] + column[None, :]
    words = tl.load(packed + at, mask=mask, other=0)
    words = tl.reshape(words, (ROWS // 8, COLUMNS // (32 * WORDS), 8, 4, WORDS))
    words = tl.reshape(tl.permute(words, (0, 2, 1, 4, 3)), (ROWS, COLUMNS // 32, 1, 4, 1))
    shift = tl.arange(0, 4)[:, None, None] * 4 + tl.arange(0, 2)[None, None, :] * 16
    codes = (words >> shift[None, None, :, :, :]) & 15

    start = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS // 32) * 32
    mask = (row < rows - top)[:, None] & (start < columns)[None, :]
    at = (start // GROUP).to(tl.int64)[None, :] * stride + (top + row)[:, None] * 2
    pair = tl.load(parts + at[:, :, None] + tl.arange(0, 2), mask=mask[:, :, None], other=0.0)
    scale, zero = tl.split(pair.to(tl.float32))
    values = (codes - 8).to(tl.float32) * scale[:, :, None, None, None]
    values = (values + zero[:, :, None, None, None]).to(parts.dtype.element_ty)

    mask = (row < rows - top)[:, None] & (column < columns)[None, :]
    place = made + top * columns + (row * columns)[:, None] + column[None, :]
    # From one 16-bit format into another, Triton has different ways in different versions.
    dense = tl.reshape(values, (ROWS, COLUMNS)).to(tl.float32).to(made.dtype.element_ty)
    tl.store(place, dense, mask=mask)


@on_its_device
def dense_of_tiles(
    packed: Tensor,
    scale_and_zero: Tensor,
    rows: int,
    columns: int,
    group_size: int,
    dtype: torch.dtype | None,
) -> Tensor:
    """Return the weight, [rows, columns].

    Args:
        packed: int32 [rows / 8, columns / (32 words), 32, words] or more.
        scale_and_zero: [columns / group_size, rows, 2] or more.
        group_size: a multiple of 32.
        dtype: of the result, which is rounded to that of the scales first; None for just that.
    """
    dtype = dtype or scale_and_zero.dtype
    packed, scale_and_zero = packed.contiguous(), scale_and_zero.contiguous()
    made = torch.empty(rows, columns, dtype=dtype, device=packed.device)
    blocks = triton.cdiv(columns, COLUMNS)
    _dense[(triton.cdiv(rows, ROWS) * blocks,)](
        *(made, packed, scale_and_zero, rows, columns, packed.shape[1]),
        *(scale_and_zero.stride(0), blocks),
        WORDS=packed.shape[3],
        GROUP=group_size,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=WARPS,
    )
    return made
