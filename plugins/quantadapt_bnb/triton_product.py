"""One token's product with 4-bit weights as one kernel, which reads eight weights as one word.

The vendor's own makes float32 scales of quantized ones in two kernels before it. At batch 1 the
time of a product is that of reading its weights, if the reading takes few instructions.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, WORDS, WARPS = 4, 128, 4
"""Rows of the weight that a program has; words of each, of eight weights, that it reads at once."""


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
    row_words,
    of_scales,
    NESTED: tl.constexpr,  # noqa: N803
    HAS_BIAS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    WORDS: tl.constexpr,  # noqa: N803
):
    GROUPS: tl.constexpr = WORDS // BLOCK  # noqa: N806
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    group = tl.arange(0, GROUPS)
    row_blocks = row_words // BLOCK
    total = tl.zeros([ROWS, GROUPS, BLOCK], tl.float32)
    for start in range(0, row_words, WORDS):
        at = start + group[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = there[:, None, None] & (at < row_words)[None]
        word = tl.load(packed + row[:, None, None] * row_words + at[None], mask=inside, other=0)
        products = tl.zeros([ROWS, GROUPS, BLOCK], tl.float32)
        for pair in tl.static_range(4):  # of bytes: the high half is the first of two weights
            two = tl.load(x + at * 4 + pair, mask=at < row_words, other=0)  # of bfloat16
            first = (two << 16).to(tl.float32, bitcast=True)
            second = (two & -65536).to(tl.float32, bitcast=True)
            products += tl.load(table + ((word >> (8 * pair + 4)) & 15)) * first[None]
            products += tl.load(table + ((word >> (8 * pair)) & 15)) * second[None]
        at_block = start // BLOCK + group
        block = row[:, None] * row_blocks + at_block[None, :]
        within = there[:, None] & (at_block < row_blocks)[None, :]
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


def takes(x: Tensor, packed: Tensor) -> bool:
    """Say whether `x` is one token that the kernel reads: in bfloat16, two at a time."""
    one = x.dtype == torch.bfloat16 and x.numel() == x.shape[-1]
    aligned = x.data_ptr() % 4 == 0 and packed.data_ptr() % 4 == 0
    return one and aligned and x.is_contiguous() and packed.is_contiguous()


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
        packed.view(torch.uint8).view(-1).view(torch.int32),
        state.code,
        state.absmax,
        unused if nested is None else nested.code,
        unused if nested is None else nested.absmax,
        unused if nested is None else state.offset,
        unused if bias is None else bias,
        rows,
        columns // 8,
        1 if nested is None else nested.blocksize,
        NESTED=nested is not None,
        HAS_BIAS=bias is not None,
        BLOCK=state.blocksize // 8,
        ROWS=ROWS,
        WORDS=WORDS,
        num_warps=WARPS,
    )
    return y
