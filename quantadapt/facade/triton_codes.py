"""One code of a 32-bit word times one input, in as few instructions as there can be."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def words(at, mask):  # type: ignore[no-untyped-def]
    """Load words, as unsigned ones."""
    return tl.load(at, mask=mask, other=0).to(tl.uint32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def joined(word, after, shift):  # type: ignore[no-untyped-def]
    """Return what begins at a bit of a word and goes on in the next one."""
    return (word >> shift) | ((after << 1) << (31 - shift))


@triton.jit  # type: ignore[untyped-decorator]
def of_lane(  # type: ignore[no-untyped-def]
    first,
    second,
    third,
    x,
    away,
    power,
    BIT: tl.constexpr,  # noqa: N803
    BITS: tl.constexpr,  # noqa: N803
):
    """Return code - away times x, for the code that begins at a bit of a word (of 3 bits: of
    three).

    Some places up, where they lie, codes become the last bits of a float, 2 ** 23 and more, which
    is exact, and fewer instructions than to shift them down and convert them.
    """
    UP: tl.constexpr = 0 if BITS == 3 else BIT if BIT < 16 else BIT - 12  # noqa: N806
    if BITS != 3:
        code = first >> (BIT - UP)
    elif BIT < 32:
        code = joined(first, second, BIT % 32)
    elif BIT < 64:
        code = joined(second, third, BIT % 32)
    else:
        code = joined(third, third, BIT % 32)
    code = (code & (((1 << BITS) - 1) << UP)) | power
    weight = code.to(tl.float32, bitcast=True) - (8388608.0 + away * (1 << UP))
    return weight * (x * (1.0 / (1 << UP)))


@triton.jit  # type: ignore[untyped-decorator]
def of_float(word, x, BIT: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    """Return 2 ** -62 times number times x, for the e2m1 number that begins at a bit of a word.

    Its exponent and mantissa become those of a float32 that is 2 ** -126 times as large, the
    smallest ones, too. The other 2 ** 64 go to x, which several outputs share.
    """
    # Shifted back with its sign, a code has that in bit 31, and the rest in bits 22 to 24.
    code = (word << (28 - BIT)).to(tl.int32, bitcast=True) >> 6
    bits = code & -0x7E400000
    return bits.to(tl.float32, bitcast=True) * (x * 18446744073709551616.0)
