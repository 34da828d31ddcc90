"""One token's product with 4-bit weights as one kernel, which reads them as they are packed.

The vendor's own makes float32 scales of quantized ones in two kernels before it. At batch 1 the
time of a product is that of reading its weights.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, BYTES, WARPS = 4, 512, 4
"""Rows of the weight that a program has, packed bytes of each that it reads at a time."""


@triton.jit  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
    y,
    x,
    packed,
    table,
    scales,
    code_of_scales,
    scales_of_scales,
    offset,
    bias,
    rows,
    row_bytes,
    of_scales,
    NESTED: tl.constexpr,  # noqa: N803
    HAS_BIAS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    BYTES: tl.constexpr,  # noqa: N803
):
    GROUPS: tl.constexpr = BYTES // BLOCK  # noqa: N806
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    group = tl.arange(0, GROUPS)
    total = tl.zeros([ROWS, GROUPS, BLOCK], tl.float32)
    for start in range(0, row_bytes, BYTES):
        at = start + group[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        pair = tl.load(x + at, mask=at < row_bytes, other=0)  # two of bfloat16
        first = (pair << 16).to(tl.float32, bitcast=True)
        second = (pair & -65536).to(tl.float32, bitcast=True)
        inside = there[:, None, None] & (at < row_bytes)[None]
        both = tl.load(packed + row[:, None, None] * row_bytes + at[None], mask=inside, other=0)
        both = both.to(tl.int32)
        products = tl.load(table + (both >> 4)) * first[None]
        products += tl.load(table + (both & 15)) * second[None]
        block = row[:, None] * (row_bytes // BLOCK) + start // BLOCK + group[None, :]
        within = there[:, None] & (start + group * BLOCK < row_bytes)[None, :]
        if NESTED:
            code = tl.load(scales + block, mask=within, other=0).to(tl.int32)
            scale = tl.load(code_of_scales + code)
            scale *= tl.load(scales_of_scales + block // of_scales, mask=within, other=0.0)
            scale += tl.load(offset)
        else:
            scale = tl.load(scales + block, mask=within, other=0.0)
        total += products * scale[:, :, None]
    made = tl.sum(tl.sum(total, axis=2), axis=1)
    if HAS_BIAS:
        made += tl.load(bias + row, mask=there, other=0.0).to(tl.float32)
    tl.store(y + row, made.to(y.dtype.element_ty), mask=there)


def takes(x: Tensor) -> bool:
    """Say whether `x` is one token that the kernel reads: in bfloat16, two at a time."""
    one = x.dtype == torch.bfloat16 and x.numel() == x.shape[-1]
    return one and x.is_contiguous() and x.data_ptr() % 4 == 0


def product(x: Tensor, packed: Tensor, state: Any, bias: Tensor | None) -> Tensor:
    """Return x Wᵀ + bias, summed in float32.

    Args:
        x: see `takes`, [..., in_features]; packed: of rows of whole blocks, in any dtype.
        state: the vendor's `QuantState`. bias: [out_features].
    """
    rows, columns = state.shape
    y = x.new_empty(*x.shape[:-1], rows)
    nested = state.state2 if state.nested else None
    unused = state.absmax
    _product[(triton.cdiv(rows, ROWS),)](
        y,
        x.view(torch.int32),
        packed.view(torch.uint8),
        state.code,
        state.absmax,
        unused if nested is None else nested.code,
        unused if nested is None else nested.absmax,
        unused if nested is None else state.offset,
        unused if bias is None else bias,
        rows,
        columns // 2,
        1 if nested is None else nested.blocksize,
        NESTED=nested is not None,
        HAS_BIAS=bias is not None,
        BLOCK=state.blocksize // 2,
        ROWS=ROWS,
        BYTES=BYTES,
        num_warps=WARPS,
    )
    return y
