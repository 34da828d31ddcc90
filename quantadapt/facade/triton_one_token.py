"""The product of one token with weights whose codes lie in bytes: each byte is read once, and no
dense weight is made. At batch 1 an answer waits for the memory that its weights are read from."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compiling import on_its_device
from ..protocols import ByteCodes
from .triton_scales import in_float32, readable

COLUMNS, ROWS, WARPS = 2048, 4, 4
"""Bytes of a tile; a program goes through a row of tiles."""
LEAST, MOST = 16, 64
"""Columns of a group that are summed before they are scaled."""


@triton.jit  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
    y,
    x,
    held,
    scale,
    zero,
    bias,
    rows,
    columns,
    groups,
    group_size,
    height,
    PARTS: tl.constexpr,  # noqa: N803
    BITS: tl.constexpr,  # noqa: N803
    HIGH_FIRST: tl.constexpr,  # noqa: N803
    ZERO: tl.constexpr,  # noqa: N803
    SHIFTED: tl.constexpr,  # noqa: N803
    ALL: tl.constexpr,  # noqa: N803
    RUN: tl.constexpr,  # noqa: N803
    KIND: tl.constexpr,  # noqa: N803
    BIAS: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    GROUPS: tl.constexpr,  # noqa: N803
    SIZE: tl.constexpr,  # noqa: N803
):
    """`rows` are those of `held`. A tile is ROWS x GROUPS x SIZE; SIZE divides `group_size`. `ALL`
    is the zero point of all; `RUN` is 0 where rows do not alternate."""
    part = tl.program_id(0)
    byte_row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row = part * rows + byte_row
    there = byte_row < rows
    shift = (PARTS - 1 - part if HIGH_FIRST else part) * BITS
    inside_tile = tl.arange(0, GROUPS)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    first_of_group = tl.arange(0, GROUPS) * SIZE
    total = tl.zeros([ROWS, GROUPS], tl.float32)
    for start in range(0, columns, GROUPS * SIZE):
        at = start + inside_tile
        given = tl.load(x + at, mask=at < columns, other=0.0).to(tl.float32)
        mask = there[:, None, None] & (at < columns)[None, :, :]
        first_byte, beside = byte_row.to(tl.int64) * columns, at
        if RUN:
            odd = byte_row % 2
            first_byte += odd * (RUN - columns)
            beside = at + at // RUN * RUN
        where = first_byte[:, None, None] + beside[None, :, :]
        code = tl.load(held + where, mask=mask, other=0.0)
        if PARTS > 1:
            code = (code.to(tl.int32) >> shift) & ((1 << BITS) - 1)
        summed = tl.sum(code.to(tl.float32) * given[None, :, :], axis=2)
        first = start + first_of_group
        of_group = there[:, None] & (first < columns)[None, :]
        group = (row // height)[:, None] * groups + (first // group_size)[None, :]
        factor = in_float32(tl.load(scale + group, mask=of_group, other=0), KIND)
        if ZERO:
            away = tl.load(zero + group, mask=of_group, other=0.0).to(tl.float32)
            away *= tl.sum(given, axis=1)[None, :]
            summed = summed * factor - away if SHIFTED else (summed - away) * factor
        elif ALL:
            summed = (summed - ALL * tl.sum(given, axis=1)[None, :]) * factor
        else:
            summed *= factor
        total += summed
    made = tl.sum(total, axis=1)
    if BIAS:
        made += tl.load(bias + row, mask=there, other=0.0).to(tl.float32)
    tl.store(y + row, made.to(y.dtype.element_ty), mask=there)


def takes(codes: ByteCodes, x: Tensor) -> bool:
    """Say whether the kernel takes such codes, on the GPU where they are."""
    held, known = codes.held, codes.grid.groups is None
    if held.dtype.is_floating_point and torch.cuda.get_device_capability(x.device) < (8, 9):
        return False
    whole = held.is_contiguous() and x.is_contiguous()
    return known and whole and _summed(codes) >= LEAST


def _summed(codes: ByteCodes) -> int:
    """Return how many columns are summed at once: a power of 2 that divides the groups."""
    size = codes.grid.group_size
    return MOST if size >= codes.held.shape[1] else min(size & -size, MOST)


@on_its_device
def product(x: Tensor, codes: ByteCodes, bias: Tensor | None) -> Tensor:
    """Return x Wᵀ + bias, summed in float32, in the dtype of `x`.

    Args:
        x: [..., in_features], contiguous, one token.
        codes: of W, such as `takes` says yes to.
        bias: [out_features] or None.
    """
    held, grid = codes.held, codes.grid
    rows, columns = held.shape
    parts, size = 8 // codes.bits, _summed(codes)
    scale, kind = readable(grid.scale.contiguous())
    zero = None if grid.zero is None else grid.zero.contiguous()
    y = torch.empty(*x.shape[:-1], rows * parts, dtype=x.dtype, device=x.device)
    _product[(parts, triton.cdiv(rows, ROWS))](
        y,
        x,
        held,
        scale,
        scale if zero is None else zero,
        y if bias is None else bias,
        rows,
        columns,
        scale.shape[1],
        grid.group_size,
        codes.height,
        PARTS=parts,
        BITS=codes.bits,
        HIGH_FIRST=codes.high_first,
        ZERO=zero is not None,
        SHIFTED=codes.shifted,
        ALL=codes.zero,
        RUN=codes.run or 0,
        KIND=kind,
        BIAS=bias is not None,
        ROWS=ROWS,
        GROUPS=COLUMNS // size,
        SIZE=size,
        num_warps=WARPS,
    )
    return y
