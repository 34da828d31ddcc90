"""Scales as kernels read them: in a usual dtype, or in 8 bits, which are taken apart bit by bit, as
not every GPU knows them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FLOAT, E4M3, E8M0 = 0, 1, 2
"""What `in_float32` is told of a scale."""
_KINDS = {torch.float8_e4m3fn: E4M3, torch.float8_e8m0fnu: E8M0}


def readable(scale: Tensor) -> tuple[Tensor, int]:
    """Return a scale as a kernel can load it, and what `in_float32` is told of it."""
    kind = _KINDS.get(scale.dtype, FLOAT)
    return (scale if kind == FLOAT else scale.view(torch.uint8)), kind


@triton.jit  # type: ignore[untyped-decorator]
def in_float32(held, KIND: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    """Return scales that were loaded, as `KIND` says what they are. No number has all bits set."""
    if KIND == 0:
        return held.to(tl.float32)
    bits = held.to(tl.int32)
    if KIND == 1:  # biases are 7 and 127
        size = bits & 127
        normal = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
        number = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)
        number = tl.where(size == 127, float("nan"), number)
        return tl.where(bits > 127, -number, number)
    power = tl.where(bits == 0, 1 << 22, bits << 23)  # 2 ** -127 has no exponent of its own
    return tl.where(bits == 255, 0x7FC00000, power).to(tl.float32, bitcast=True)
