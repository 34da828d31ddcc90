"""The gradient of a root mean square norm whose weight is frozen: a program for each row.

Liger's kernel gives each multiprocessor its share of the rows, which it then goes through one by
one, so that it can sum the gradient of the weight. Where that is not wanted nothing ties rows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..compiling import on_its_device

NARROWEST, WIDEST = 2**10, 2**15
"""Numbers of a row: fewer are too little for a program, which has all of them in registers."""


@triton.jit  # type: ignore[untyped-decorator]
def _back(dx, dy, x, weight, factors, columns, offset, WIDE: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDE)
    there = column < columns
    at = row * columns + column
    given = tl.load(dy + at, mask=there, other=0.0).to(tl.float32)
    given *= tl.load(weight + column, mask=there, other=0.0).to(tl.float32) + offset
    value = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    factor = tl.load(factors + row).to(tl.float32)
    shared = tl.sum(given * value, axis=0) * factor * factor / columns
    tl.store(dx + at, (factor * (given - shared * value)).to(dx.dtype.element_ty), mask=there)


@on_its_device
def norm_back(
    dy: Tensor, x: Tensor, weight: Tensor, factors: Tensor, offset: float, dx: Tensor
) -> None:
    """Write into `dx`, which may be `dy`, the gradient of x for y = x factors (weight + offset).

    Args:
        dy, x, dx: [rows, columns], contiguous. weight: [columns].
        factors: [rows], one over the root mean square of each row, which x is part of.
    """
    rows, columns = x.shape
    if x.numel():
        wide = triton.next_power_of_2(columns)
        warps = min(max(wide // 512, 1), 16)
        _back[(rows,)](
            dx, dy, x, weight, factors, columns, float(offset), WIDE=wide, num_warps=warps
        )
