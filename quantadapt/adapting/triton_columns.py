"""What `columns` does, one kernel each: every number is read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compiling import on_its_device

ROWS, COLUMNS, RANKS = 64, 128, 32
ROWS_BACK, COLUMNS_BACK = 16, 256
ROWS_OF_PART, MOST_PARTS = 128, 512
"""So many rows a program adds up, or more, so that there are no more than so many programs for a
block of columns."""


@triton.jit  # type: ignore[untyped-decorator]
def _scaled(  # type: ignore[no-untyped-def]
    y,
    z,
    c,
    low,
    b,
    bias,
    tokens,
    columns,
    ranks,
    scaling,
    HAS_LOW: tl.constexpr,  # noqa: N803
    HAS_BIAS: tl.constexpr,  # noqa: N803
    R: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_rows, in_columns = row < tokens, column < columns
    there = in_rows[:, None] & in_columns[None, :]
    at = row[:, None] * columns + column[None, :]
    made = tl.load(z + at, mask=there, other=0.0).to(tl.float32)
    if HAS_LOW:
        added = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, ranks, R):
            rank = start + tl.arange(0, R)
            used = rank < ranks
            left = tl.load(
                low + row[:, None] * ranks + rank[None, :],
                mask=in_rows[:, None] & used[None, :],
                other=0.0,
            )
            right = tl.load(
                b + column[:, None] * ranks + rank[None, :],
                mask=in_columns[:, None] & used[None, :],
                other=0.0,
            )
            added += tl.dot(left, tl.trans(right), input_precision="ieee")
        made += scaling * added
    made *= tl.load(c + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        made += tl.load(bias + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, made.to(y.dtype.element_ty), mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _scaled_back(  # type: ignore[no-untyped-def]
    dz,
    dy,
    z,
    c,
    sums,
    tokens,
    columns,
    rows_of_part,
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    part = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = column < columns
    factor = tl.load(c + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, rows_of_part, ROWS):
        row = part.to(tl.int64) * rows_of_part + start + tl.arange(0, ROWS)
        there = (row < tokens)[:, None] & in_columns[None, :]
        at = row[:, None] * columns + column[None, :]
        g = tl.load(dy + at, mask=there, other=0.0).to(tl.float32)
        total += g * tl.load(z + at, mask=there, other=0.0).to(tl.float32)
        tl.debug_barrier()  # dz may be one of both, which all threads are to have read
        tl.store(dz + at, (g * factor).to(dz.dtype.element_ty), mask=there)
    tl.store(sums + part.to(tl.int64) * columns + column, tl.sum(total, axis=0), mask=in_columns)


@on_its_device
def scaled(
    z: Tensor,
    c: Tensor,
    low: Tensor | None = None,
    b: Tensor | None = None,
    scaling: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    """As `columns.scaled`; `z`, `low` and `b` contiguous."""
    y = torch.empty_like(z)
    tokens, columns = z.shape
    ranks = 0 if low is None else low.shape[1]
    if z.numel():
        grid = (triton.cdiv(tokens, ROWS), triton.cdiv(columns, COLUMNS))
        _scaled[grid](
            *(y, z, c, z if low is None else low, z if b is None else b),
            *(z if bias is None else bias, tokens, columns, ranks, float(scaling)),
            HAS_LOW=low is not None,
            HAS_BIAS=bias is not None,
            R=min(max(triton.next_power_of_2(max(ranks, 1)), 16), RANKS),
            ROWS=ROWS,
            COLUMNS=COLUMNS,
        )
    return y


@on_its_device
def scaled_back(dy: Tensor, z: Tensor, c: Tensor, dz: Tensor) -> Tensor:
    """Return the sums of `columns.scaled_back`; what else it returns goes into `dz`, which may be
    `dy` or `z`. All contiguous."""
    tokens, columns = z.shape
    rows = max(ROWS_OF_PART, triton.cdiv(tokens, MOST_PARTS))
    rows = triton.cdiv(rows, ROWS_BACK) * ROWS_BACK
    parts = triton.cdiv(tokens, rows)
    sums = torch.empty(parts, columns, dtype=torch.float32, device=z.device)
    if z.numel():
        grid = (parts, triton.cdiv(columns, COLUMNS_BACK))
        _scaled_back[grid](
            *(dz, dy, z, c, sums, tokens, columns, rows), ROWS=ROWS_BACK, COLUMNS=COLUMNS_BACK
        )
    return sums.sum(0)
