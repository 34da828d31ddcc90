"""What LoRA adds to one token: two small kernels in place of a library's three, which are made for
more. At batch 1 an answer waits for their number."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compiling import on_its_device

COLUMNS, ROWS = 4096, 256


@triton.jit  # type: ignore[untyped-decorator]
def _through_a(h, x, a, columns, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    rank = tl.program_id(0)
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, columns, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        there = at < columns
        left = tl.load(a + rank * columns + at, mask=there, other=0.0).to(tl.float32)
        total += left * tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    tl.store(h + rank, tl.sum(total, axis=0))


@triton.jit  # type: ignore[untyped-decorator]
def _add_through_b(  # type: ignore[no-untyped-def]
    y,
    h,
    b,
    rows,
    ranks,
    scaling,
    R: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rank = tl.arange(0, R)
    there = row < rows
    mask = there[:, None] & (rank < ranks)[None, :]
    right = tl.load(b + row[:, None] * ranks + rank[None, :], mask=mask, other=0.0).to(tl.float32)
    left = tl.load(h + rank, mask=rank < ranks, other=0.0)
    made = tl.load(y + row, mask=there, other=0.0).to(tl.float32)
    made += scaling * tl.sum(right * left[None, :], axis=1)
    tl.store(y + row, made.to(y.dtype.element_ty), mask=there)


@on_its_device
def add_to_one_token(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> None:
    """Add scaling B A x to `y` in place, summed in float32.

    Args:
        y: [out_features]. x: [in_features]. a: [r, in_features]. b: [out_features, r]. All of them
            contiguous, in any floating dtypes.
    """
    ranks, columns = a.shape
    h = torch.empty(ranks, dtype=torch.float32, device=x.device)
    _through_a[(ranks,)](h, x, a, columns, COLUMNS=COLUMNS, num_warps=8)
    grid = (triton.cdiv(len(y), ROWS),)
    size = triton.next_power_of_2(ranks)
    _add_through_b[grid](y, h, b, len(y), ranks, float(scaling), R=size, ROWS=ROWS, num_warps=8)
