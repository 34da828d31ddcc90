"""Weights whose codes lie in 32-bit words, [in_features, out_features], as dense weights: each word
is read once, in order. Words go through shared memory to their columns, not the weights."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compiling import on_its_device

ROWS, COLUMNS, WARPS = {False: 32, True: 64}, {False: 256, True: 128}, 4
"""The weights of a program, by whether words are of neighbouring rows: then 64 are 32 bytes."""


@triton.jit  # type: ignore[untyped-decorator]
def _dense(  # type: ignore[no-untyped-def]
    made,
    packed,
    zeros,
    scales,
    rows,
    columns,
    of_packed,
    of_zeros,
    of_scales,
    size,
    added,
    blocks,
    BITS: tl.constexpr,  # noqa: N803
    ACROSS: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    """`of_*` are strides, `size` that of a group: a multiple of what a word holds."""
    held: tl.constexpr = 32 // BITS
    top = (tl.program_id(0) // blocks).to(tl.int64) * ROWS
    left = tl.program_id(0) % blocks * COLUMNS
    row, column = tl.arange(0, ROWS), left + tl.arange(0, COLUMNS)
    here, there = row < rows - top, column < columns
    place = tl.arange(0, held)
    shift = ((place % 2 * 4 + place // 2) if ACROSS else place) * BITS
    if ACROSS:
        word = tl.arange(0, ROWS // held)
        mask = there[:, None] & (word * held < rows - top)[None, :]
        at = column.to(tl.int64)[:, None] * of_packed + (top // held + word)[None, :]
        words = tl.load(packed + at, mask=mask, other=0)
        codes = (tl.trans(words)[:, None, :] >> shift[None, :, None]) & (2**BITS - 1)
    else:
        word = left // held + tl.arange(0, COLUMNS // held)
        mask = (word * held < columns)[:, None] & here[None, :]
        at = word.to(tl.int64)[:, None] * of_packed + (top + row)[None, :]
        words = tl.load(packed + at, mask=mask, other=0)
        codes = (tl.trans(words)[:, :, None] >> shift[None, None, :]) & (2**BITS - 1)
    codes = tl.reshape(codes, (ROWS, COLUMNS // held, held))

    # A group goes on for a whole word of columns.
    start = left + tl.arange(0, COLUMNS // held) * held
    mask, group = (start < columns)[:, None] & here[None, :], (start // size).to(tl.int64)[:, None]
    scale = tl.load(scales + group * of_scales + (top + row)[None, :], mask=mask, other=0.0)
    zero = tl.load(zeros + group * of_zeros + ((top + row) // held)[None, :], mask=mask, other=0)
    place = row % held
    shift = ((place % 2 * 4 + place // 2) if ACROSS else place) * BITS
    zero = ((zero >> shift[None, :]) & (2**BITS - 1)) + added
    values = (codes - tl.trans(zero)[:, :, None]).to(tl.float32)
    values = (values * tl.trans(scale).to(tl.float32)[:, :, None]).to(scales.dtype.element_ty)

    # From one 16-bit format into another, Triton has different ways in different versions.
    dense = tl.reshape(values, (ROWS, COLUMNS)).to(tl.float32).to(made.dtype.element_ty)
    at = made + top * columns + (row * columns)[:, None] + column[None, :]
    tl.store(at, dense, mask=here[:, None] & there[None, :])


@on_its_device
def dense_of_words(
    packed: Tensor,
    zeros: Tensor,
    scales: Tensor,
    bits: int,
    added: int,
    across: bool,
    dtype: torch.dtype | None,
) -> Tensor:
    """As `dense_words.dense_of_words`."""
    packed, zeros, scales = (
        tensor if tensor.stride(1) == 1 else tensor.contiguous()
        for tensor in (packed, zeros, scales)
    )
    held, rows = 32 // bits, scales.shape[1]
    columns = packed.shape[0] if across else packed.shape[0] * held
    made = torch.empty(rows, columns, dtype=dtype or scales.dtype, device=packed.device)
    blocks = triton.cdiv(columns, COLUMNS[across])
    _dense[(triton.cdiv(rows, ROWS[across]) * blocks,)](
        *(made, packed, zeros, scales, rows, columns),
        *(packed.stride(0), zeros.stride(0), scales.stride(0)),
        *(columns // scales.shape[0], added, blocks),
        BITS=bits,
        ACROSS=across,
        ROWS=ROWS[across],
        COLUMNS=COLUMNS[across],
        num_warps=WARPS,
    )
    return made
