"""What `float8` does besides products, one kernel each: a row per program, a tile per program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compiling import on_its_device

BLOCK = 4096
TILE = 64


@triton.jit  # type: ignore[untyped-decorator]
def _rows(  # type: ignore[no-untyped-def]
    x,
    by,
    codes,
    factors,
    columns,
    stride,
    HAS_BY: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0).to(tl.int64)
    top = tl.zeros([BLOCK], dtype=tl.float32)
    odd = tl.zeros([BLOCK], dtype=tl.float32)  # nan where a number is not finite, which max drops
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(x + row * stride + at, mask=at < columns, other=0.0).to(tl.float32)
        if HAS_BY:
            z *= tl.load(by + at, mask=at < columns, other=0.0)
        top = tl.maximum(top, tl.abs(z))
        odd += z * 0.0
    factor = tl.maximum(tl.max(top, axis=0), 1e-30) / 448.0 + tl.sum(odd, axis=0)
    tl.store(factors + row, factor)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(x + row * stride + at, mask=at < columns, other=0.0).to(tl.float32)
        if HAS_BY:
            z *= tl.load(by + at, mask=at < columns, other=0.0)
        z = tl.minimum(tl.maximum(z / factor, -448.0), 448.0)
        tl.store(codes + row * columns + at, z.to(tl.float8e4nv), mask=at < columns)


@triton.jit  # type: ignore[untyped-decorator]
def _tiles(codes, out, rows, columns, TILE: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    down = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    across = (tl.program_id(1) * TILE + tl.arange(0, TILE)).to(tl.int64)
    there = (down[:, None] < rows) & (across[None, :] < columns)
    tile = tl.load(codes + down[:, None] * columns + across[None, :], mask=there, other=0)
    there = (across[:, None] < columns) & (down[None, :] < rows)
    tl.store(out + across[:, None] * rows + down[None, :], tl.trans(tile), mask=there)


@on_its_device
def in_float8(x: Tensor, by: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return codes [rows, columns] and factors [rows, 1] of x times `by`, column by column."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, columns = x.shape
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=x.device)
    factors = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    if rows:
        scale, grid = x if by is None else by.contiguous(), (rows,)
        _rows[grid](
            *(x, scale, codes, factors, columns, x.stride(0)), by is not None, BLOCK, num_warps=8
        )
    return codes, factors


@on_its_device
def transposed(codes: Tensor) -> Tensor:
    """Return the transpose of codes [rows, columns], laid out row by row."""
    rows, columns = codes.shape
    out = torch.empty(columns, rows, dtype=codes.dtype, device=codes.device)
    grid = (triton.cdiv(rows, TILE), triton.cdiv(columns, TILE))
    _tiles[grid](codes.view(torch.uint8), out.view(torch.uint8), rows, columns, TILE)
    return out
