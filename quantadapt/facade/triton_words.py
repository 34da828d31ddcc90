"""The product of a few tokens with weights whose codes lie in 32-bit words: these are read as they
are held, once for each token, and no dense weight is made.

Inputs are taken in pieces, each of one group. A thread goes through a piece; a tile has many of
them side by side, and a few words of each row, which is what makes enough reads at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compiling import on_its_device
from ..protocols import WordCodes

INPUTS, PIECES = {False: 64, True: 16}, {False: 64, True: 256}
"""Inputs of a piece and pieces of a tile, at most; by whether words hold codes along outputs."""
WORDS, WORDS_OF_A_THREAD = {False: 16, True: 4}, {False: 4, True: 4}
"""Of a row of a tile; a thread's lie side by side."""


@triton.jit  # type: ignore[untyped-decorator]
def _code(first, second, third, BIT: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    """Return the code that begins at a bit of three words; it may go on in the next one."""
    SHIFT: tl.constexpr = BIT % 32  # noqa: N806
    if BIT < 32:
        code = first >> SHIFT
        after = second
    elif BIT < 64:
        code = second >> SHIFT
        after = third
    else:
        code = third >> SHIFT
        after = third
    if SHIFT + BITS > 32:
        code = (code & ((1 << (32 - SHIFT)) - 1)) | (after << (32 - SHIFT))
    return (code & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _number(at, mask):  # type: ignore[no-untyped-def]
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _along_inputs(  # type: ignore[no-untyped-def]
    at,
    down,
    given,
    inside,
    there,
    INPUTS: tl.constexpr,  # noqa: N803
    BITS: tl.constexpr,  # noqa: N803
    PIECES: tl.constexpr,  # noqa: N803
    WORDS: tl.constexpr,  # noqa: N803
):
    """Return codes times inputs and inputs, summed over each piece: [PIECES, WORDS], [PIECES].

    Args:
        at: the first words of the pieces, `down` apart from those that follow.
        given: their first inputs.
    """
    LANES: tl.constexpr = 32 if BITS == 3 else 32 // BITS  # noqa: N806
    summed = tl.zeros([PIECES, WORDS], tl.float32)
    of_x = tl.zeros([PIECES], tl.float32)
    mask = inside[:, None] & there[None, :]
    if BITS == 3:
        for unit in range(0, INPUTS // LANES):
            word0 = tl.load(at + 3 * unit * down, mask=mask, other=0)
            word1 = tl.load(at + (3 * unit + 1) * down, mask=mask, other=0)
            word2 = tl.load(at + (3 * unit + 2) * down, mask=mask, other=0)
            for lane in tl.static_range(LANES):
                x0 = _number(given + unit * LANES + lane, inside)
                summed += _code(word0, word1, word2, lane * BITS, BITS) * x0[:, None]
                of_x += x0
    else:
        for unit in range(0, INPUTS // LANES, 4):  # all four are asked for before one is there
            in1 = inside & (unit + 1 < INPUTS // LANES)
            in2 = inside & (unit + 2 < INPUTS // LANES)
            in3 = inside & (unit + 3 < INPUTS // LANES)
            word0 = tl.load(at + unit * down, mask=mask, other=0)
            word1 = tl.load(at + (unit + 1) * down, mask=mask & in1[:, None], other=0)
            word2 = tl.load(at + (unit + 2) * down, mask=mask & in2[:, None], other=0)
            word3 = tl.load(at + (unit + 3) * down, mask=mask & in3[:, None], other=0)
            x = given + unit * LANES
            for lane in tl.static_range(LANES):
                x0 = _number(x + lane, inside)
                x1 = _number(x + LANES + lane, in1)
                x2 = _number(x + 2 * LANES + lane, in2)
                x3 = _number(x + 3 * LANES + lane, in3)
                summed += _code(word0, word0, word0, lane * BITS, BITS) * x0[:, None]
                summed += _code(word1, word1, word1, lane * BITS, BITS) * x1[:, None]
                summed += _code(word2, word2, word2, lane * BITS, BITS) * x2[:, None]
                summed += _code(word3, word3, word3, lane * BITS, BITS) * x3[:, None]
                of_x += x0 + x1 + x2 + x3
    return summed, of_x


@triton.jit  # type: ignore[untyped-decorator]
def _place(word, PLACE: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    return ((word >> (4 * PLACE)) & 15).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _of_four(  # type: ignore[no-untyped-def]
    word0,
    word1,
    word2,
    word3,
    x0,
    x1,
    x2,
    x3,
    PLACE: tl.constexpr,  # noqa: N803
):
    """Return what the codes at a place of four words come to with their inputs."""
    made = _place(word0, PLACE) * x0[:, None] + _place(word1, PLACE) * x1[:, None]
    return made + _place(word2, PLACE) * x2[:, None] + _place(word3, PLACE) * x3[:, None]


@triton.jit  # type: ignore[untyped-decorator]
def _along_outputs(  # type: ignore[no-untyped-def]
    at,
    down,
    given,
    inside,
    there,
    zeros,
    zero,
    INPUTS: tl.constexpr,  # noqa: N803
    ZEROS: tl.constexpr,  # noqa: N803
    INTERLEAVED: tl.constexpr,  # noqa: N803
    PIECES: tl.constexpr,  # noqa: N803
    WORDS: tl.constexpr,  # noqa: N803
):
    """Return codes less zero points times inputs of words that hold eight outputs each, summed
    over each piece: [PIECES, 8 * WORDS]. See `_along_inputs`; `zeros` are those of the pieces."""
    none = tl.zeros([PIECES, WORDS], tl.float32)
    sum0, sum1, sum2, sum3 = none, none, none, none
    sum4, sum5, sum6, sum7 = none, none, none, none
    of_x = tl.zeros([PIECES], tl.float32)
    mask = inside[:, None] & there[None, :]
    for row in range(0, INPUTS, 4):
        here, x = at + row * down, given + row
        word0 = tl.load(here, mask=mask, other=0)
        word1 = tl.load(here + down, mask=mask, other=0)
        word2 = tl.load(here + 2 * down, mask=mask, other=0)
        word3 = tl.load(here + 3 * down, mask=mask, other=0)
        x0, x1 = _number(x, inside), _number(x + 1, inside)
        x2, x3 = _number(x + 2, inside), _number(x + 3, inside)
        of_x += x0 + x1 + x2 + x3
        sum0 += _of_four(word0, word1, word2, word3, x0, x1, x2, x3, 0)
        sum1 += _of_four(word0, word1, word2, word3, x0, x1, x2, x3, 1)
        sum2 += _of_four(word0, word1, word2, word3, x0, x1, x2, x3, 2)
        sum3 += _of_four(word0, word1, word2, word3, x0, x1, x2, x3, 3)
        sum4 += _of_four(word0, word1, word2, word3, x0, x1, x2, x3, 4)
        sum5 += _of_four(word0, word1, word2, word3, x0, x1, x2, x3, 5)
        sum6 += _of_four(word0, word1, word2, word3, x0, x1, x2, x3, 6)
        sum7 += _of_four(word0, word1, word2, word3, x0, x1, x2, x3, 7)
    away = tl.zeros([PIECES, WORDS], tl.int32)
    if ZEROS:
        away = tl.load(zeros, mask=mask, other=0)
    sum0 -= (_place(away, 0) + zero) * of_x[:, None]
    sum1 -= (_place(away, 1) + zero) * of_x[:, None]
    sum2 -= (_place(away, 2) + zero) * of_x[:, None]
    sum3 -= (_place(away, 3) + zero) * of_x[:, None]
    sum4 -= (_place(away, 4) + zero) * of_x[:, None]
    sum5 -= (_place(away, 5) + zero) * of_x[:, None]
    sum6 -= (_place(away, 6) + zero) * of_x[:, None]
    sum7 -= (_place(away, 7) + zero) * of_x[:, None]
    # What is joined last follows each other.
    if INTERLEAVED:
        even = tl.join(tl.join(sum0, sum2), tl.join(sum1, sum3))
        odd = tl.join(tl.join(sum4, sum6), tl.join(sum5, sum7))
    else:
        even = tl.join(tl.join(sum0, sum4), tl.join(sum2, sum6))
        odd = tl.join(tl.join(sum1, sum5), tl.join(sum3, sum7))
    return tl.join(even, odd).reshape(PIECES, 8 * WORDS)


@triton.jit  # type: ignore[untyped-decorator]
def _zeros(at, right, row, mask, BITS: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    """Return the codes of rows [rows] that are packed from `at` [pieces, 1] on: [pieces, rows]."""
    shift = (row * BITS % 32)[None, :]
    here = at + (row * BITS // 32 * right)[None, :]
    code = tl.load(here, mask=mask, other=0) >> shift
    if BITS == 3:  # it may go on in the next word
        across = shift > 32 - BITS
        left = 32 - tl.where(across, shift, 31)
        after = tl.load(here + right, mask=mask & across, other=0)
        code = tl.where(across, (code & ((1 << left) - 1)) | (after << left), code)
    return code & ((1 << BITS) - 1)


@triton.jit  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
    y,
    x,
    held,
    scale,
    zeros,
    bias,
    words,
    pieces,
    in_group,
    zero,
    held_down,
    held_right,
    scale_down,
    scale_right,
    zeros_down,
    zeros_right,
    ALONG_OUTPUTS: tl.constexpr,  # noqa: N803
    INTERLEAVED: tl.constexpr,  # noqa: N803
    BITS: tl.constexpr,  # noqa: N803
    INPUTS: tl.constexpr,  # noqa: N803
    ZEROS: tl.constexpr,  # noqa: N803
    BIAS: tl.constexpr,  # noqa: N803
    PIECES: tl.constexpr,  # noqa: N803
    WORDS: tl.constexpr,  # noqa: N803
):
    """`in_group` is how many pieces a group has; `..._down` and `..._right` are strides."""
    EACH: tl.constexpr = 8 if ALONG_OUTPUTS else 1  # noqa: N806 (rows in a word)
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    row = tl.program_id(0) * (WORDS * EACH) + tl.arange(0, WORDS * EACH)
    there = row < words * EACH
    x += tl.program_id(1) * pieces * INPUTS
    y += tl.program_id(1) * words * EACH
    total = tl.zeros([PIECES, WORDS * EACH], tl.float32)
    for start in range(0, pieces, PIECES):
        piece = start + tl.arange(0, PIECES)
        inside = piece < pieces
        given = x + piece * INPUTS
        group = (piece // in_group)[:, None]
        mask = inside[:, None] & there[None, :]
        if ALONG_OUTPUTS:
            at = held + (piece * INPUTS * held_down)[:, None] + (word * held_right)[None, :]
            away = zeros + group * zeros_down + (word * zeros_right)[None, :]
            summed = _along_outputs(
                at,
                held_down,
                given,
                inside,
                word < words,
                away,
                zero,
                INPUTS,
                ZEROS,
                INTERLEAVED,
                PIECES,
                WORDS,
            )
        else:
            first = piece * (INPUTS * BITS // 32)
            at = held + (first * held_down)[:, None] + (word * held_right)[None, :]
            summed, of_x = _along_inputs(
                at, held_down, given, inside, there, INPUTS, BITS, PIECES, WORDS
            )
            if ZEROS:
                away = _zeros(zeros + group * zeros_down, zeros_right, row, mask, BITS) + zero
                summed -= away.to(tl.float32) * of_x[:, None]
            else:
                summed -= (of_x * zero)[:, None]
        factor = scale + group * scale_down + (row * scale_right)[None, :]
        total += summed * tl.load(factor, mask=mask, other=0.0).to(tl.float32)
    made = tl.sum(total, axis=0)
    if BIAS:
        made += tl.load(bias + row, mask=there, other=0.0).to(tl.float32)
    tl.store(y + row, made.to(y.dtype.element_ty), mask=there)


def takes(codes: WordCodes, x: Tensor) -> bool:
    """Say whether the kernel takes such codes, on the GPU where they are."""
    known = codes.bits == 4 if codes.along_outputs else not codes.interleaved
    small = codes.held.numel() < 2**31
    return known and small and x.is_contiguous() and _inputs(codes) > 0


def _inputs(codes: WordCodes) -> int:
    """Return how many inputs a piece has: whole words (of 3 bits, three), all of one group; 0:
    there is no such number."""
    along = codes.along_outputs
    unit = 4 if along else 32 if codes.bits == 3 else 32 // codes.bits
    sizes = range(INPUTS[along], 0, -unit)
    return next((size for size in sizes if codes.group_size % size == 0), 0)


@on_its_device
def product(x: Tensor, codes: WordCodes, bias: Tensor | None) -> Tensor:
    """Return x Wᵀ + bias, summed in float32, in the dtype of `x`.

    Args:
        x: [..., in_features], contiguous. Each token reads all words: those after the first from
            the GPU's cache, mostly, but for few tokens only that is fast.
        codes: of W, such as `takes` says yes to.
        bias: [out_features] or None.
    """
    along, held, scale = codes.along_outputs, codes.held, codes.scale
    inputs, words, rows = _inputs(codes), WORDS[along], scale.shape[1]
    pieces = x.shape[-1] // inputs
    tile = min(triton.next_power_of_2(pieces), PIECES[along])
    y = torch.empty(*x.shape[:-1], rows, dtype=x.dtype, device=x.device)
    zeros = held if codes.zeros is None else codes.zeros
    grid = (triton.cdiv(held.shape[1], words), x.numel() // x.shape[-1])
    _product[grid](
        y,
        x,
        held,
        scale,
        zeros,
        y if bias is None else bias,
        held.shape[1],
        pieces,
        codes.group_size // inputs,
        codes.zero,
        *held.stride(),
        *scale.stride(),
        *zeros.stride(),
        ALONG_OUTPUTS=along,
        INTERLEAVED=codes.interleaved,
        BITS=codes.bits,
        INPUTS=inputs,
        ZEROS=codes.zeros is not None,
        BIAS=bias is not None,
        PIECES=tile,
        WORDS=words,
        num_warps=max(1, tile * words // (32 * WORDS_OF_A_THREAD[along])),
    )
    return y
