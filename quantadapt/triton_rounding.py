"""What goes into a layer, rounded to 8 bits in one kernel, by scales of its own or a known one: a
token is small, and a dozen operations on it take longer than the product that they are for."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compiling import on_its_device

WIDEST = 2**16
"""Numbers that share a scale, at most: a program has them in registers."""
TOGETHER = 2048
"""Numbers of a program, where fewer share a scale."""
_FLOATS = {torch.float8_e4m3fn: (121, 3), torch.float8_e5m2: (113, 2)}
"""What `_in_float8` is told of a kind."""


@triton.jit  # type: ignore[untyped-decorator]
def _in_float8(  # type: ignore[no-untyped-def]
    code,
    highest,
    LEAST: tl.constexpr,  # noqa: N803
    DIGITS: tl.constexpr,  # noqa: N803
):
    """Return the nearest numbers of an 8-bit float. Its smallest exponent is `LEAST`, as float32
    counts them, and its mantissa has `DIGITS` bits."""
    code = tl.where(code > highest, highest, tl.where(code < -highest, -highest, code))
    power = tl.maximum(code.to(tl.int32, bitcast=True) & 0x7F800000, LEAST << 23)
    # What is added makes the last bit of the sum that of a code: halves go to the even one.
    more = (power + ((23 - DIGITS) << 23)).to(tl.float32, bitcast=True) * 1.5
    return (code + more) - more


@triton.jit  # type: ignore[untyped-decorator]
def _rounded_by(  # type: ignore[no-untyped-def]
    out,
    x,
    scale,
    numbers,
    highest,
    LEAST: tl.constexpr,  # noqa: N803
    DIGITS: tl.constexpr,  # noqa: N803
    HELD: tl.constexpr,  # noqa: N803
    SIZE: tl.constexpr,  # noqa: N803
):
    """`HELD`: the scale lies in memory, and is no number."""
    if HELD:
        scale = tl.load(scale).to(tl.float32)
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    number = tl.load(x + at, mask=at < numbers, other=0.0).to(tl.float32)
    code = tl.div_rn(number, tl.zeros_like(number) + scale)
    code = _in_float8(code, highest, LEAST, DIGITS) * scale
    tl.store(out + at, code.to(out.dtype.element_ty), mask=at < numbers)


@triton.jit  # type: ignore[untyped-decorator]
def _rounded(  # type: ignore[no-untyped-def]
    out,
    x,
    groups,
    of_row,
    columns,
    width,
    by,
    instead,
    FLOATS: tl.constexpr,  # noqa: N803
    POWERS: tl.constexpr,  # noqa: N803
    WHOLE: tl.constexpr,  # noqa: N803
    GROUPS: tl.constexpr,  # noqa: N803
    SIZE: tl.constexpr,  # noqa: N803
):
    """A tile is GROUPS x SIZE. `WHOLE`: results are rounded to float32 alone, and not to what x is
    in."""
    kind = x.dtype.element_ty
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)[:, None]
    place = tl.arange(0, SIZE)[None, :]
    column = group % of_row * width + place
    mask = (group < groups) & (place < width) & (column < columns)
    at = (group // of_row).to(tl.int64) * columns + column
    number = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(number), axis=1, keep_dims=True)
    scale += tl.sum(number * 0.0, axis=1, keep_dims=True)  # nan, which max drops
    scale = tl.div_rn(scale, tl.zeros_like(scale) + by)
    if not WHOLE:
        scale = scale.to(kind).to(tl.float32)
    scale = tl.where(scale == 0, instead, scale)
    if POWERS:  # the next one, or the same
        bits = scale.to(tl.int32, bitcast=True)
        power = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
        scale = tl.where(scale == scale, power, scale)  # of nan there is none
    code = tl.div_rn(number, tl.zeros_like(number) + scale)
    if not WHOLE:
        code = code.to(kind).to(tl.float32)
    if FLOATS:
        code = _in_float8(code, 448.0, 121, 3)
    else:  # as in `_in_float8`, the last bit of the sum is a code's
        code = tl.where(code > 127.0, 127.0, tl.where(code < -128.0, -128.0, code))
        code = (code + 12582912.0) - 12582912.0
    tl.store(out + at, (code * scale).to(kind), mask=mask)


@on_its_device
def rounded(
    x: Tensor,
    width: int,
    by: float,
    instead: float,
    *,
    floats: bool,
    powers: bool = False,
    whole: bool = False,
) -> Tensor:
    """Return `x`, rounded to codes times scales, in its dtype and shape.

    Args:
        x: [..., columns], in a floating dtype.
        width: neighbouring columns that share a scale, `WIDEST` at most; the last ones of a row may
            be fewer.
        by: a scale is their largest absolute number divided by that,
        instead: and this where it would be 0.
        floats: whether codes are numbers of float8_e4m3fn, or whole ones from -128 to 127.
        powers: whether scales become the next larger powers of two.
        whole: whether scales and quotients are float32, and not rounded to the dtype of `x`.
    """
    x = x.contiguous()
    out, columns = torch.empty_like(x), x.shape[-1]
    of_row, size = triton.cdiv(columns, width), triton.next_power_of_2(width)
    groups, together = x.numel() // columns * of_row, max(1, TOGETHER // size)
    if groups:
        _rounded[(triton.cdiv(groups, together),)](
            *(out, x, groups, of_row, columns, width, by, instead),
            FLOATS=floats,
            POWERS=powers,
            WHOLE=whole,
            GROUPS=together,
            SIZE=size,
            num_warps=min(16, max(4, size // 1024)),
        )
    return out


@on_its_device
def rounded_by(x: Tensor, scale: float | Tensor, kind: torch.dtype, dtype: torch.dtype) -> Tensor:
    """Return `x`, of any shape, rounded to codes times a scale that is known, in `dtype`.

    Args:
        scale: numbers are divided by it, and what is beyond the codes becomes the last one. A
            number, or a tensor of one that is on the GPU.
        kind: of the codes, float8_e4m3fn or float8_e5m2.
    """
    x = x.contiguous()
    out = torch.empty_like(x, dtype=dtype)
    highest, (least, digits) = torch.finfo(kind).max, _FLOATS[kind]
    if numbers := x.numel():
        _rounded_by[(triton.cdiv(numbers, TOGETHER),)](
            *(out, x, scale, numbers, highest),
            LEAST=least,
            DIGITS=digits,
            HELD=isinstance(scale, Tensor),
            SIZE=TOGETHER,
        )
    return out
