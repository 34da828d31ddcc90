"""The product of a few tokens with weights whose codes lie in 32-bit words along outputs, eight of
4 bits in each: these are read as they are held, once for each token.

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

INPUTS = 16
"""Of a piece, at most."""
TILE = {"words": 4, "pieces": 256, "words_of_a_thread": 4}
"""Words of a row of a tile, pieces of a tile at most, and words side by side of a thread."""


@triton.jit  # type: ignore[untyped-decorator]
def _number(at, mask):  # type: ignore[no-untyped-def]
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


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
    over each piece: [PIECES, 8 * WORDS].

    Args:
        at: the first words of the pieces, `down` apart from those that follow.
        given: their first inputs.
        zeros: those of the pieces, in words.
    """
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
    INTERLEAVED: tl.constexpr,  # noqa: N803
    INPUTS: tl.constexpr,  # noqa: N803
    ZEROS: tl.constexpr,  # noqa: N803
    BIAS: tl.constexpr,  # noqa: N803
    PIECES: tl.constexpr,  # noqa: N803
    WORDS: tl.constexpr,  # noqa: N803
):
    """`in_group` is how many pieces a group has; `..._down` and `..._right` are strides."""
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    row = tl.program_id(0) * (WORDS * 8) + tl.arange(0, WORDS * 8)
    there = row < words * 8
    x += tl.program_id(1) * pieces * INPUTS
    y += tl.program_id(1) * words * 8
    total = tl.zeros([PIECES, WORDS * 8], tl.float32)
    for start in range(0, pieces, PIECES):
        piece = start + tl.arange(0, PIECES)
        inside = piece < pieces
        given = x + piece * INPUTS
        group = (piece // in_group)[:, None]
        mask = inside[:, None] & there[None, :]
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
        factor = scale + group * scale_down + (row * scale_right)[None, :]
        total += summed * tl.load(factor, mask=mask, other=0.0).to(tl.float32)
    made = tl.sum(total, axis=0)
    if BIAS:
        made += tl.load(bias + row, mask=there, other=0.0).to(tl.float32)
    tl.store(y + row, made.to(y.dtype.element_ty), mask=there)


def inputs_of_a_piece(codes: WordCodes) -> int:
    """Return how many inputs a piece has, all of one group; 0: there is no such number."""
    if codes.bits != 4:
        return 0
    return next((size for size in range(INPUTS, 0, -4) if codes.group_size % size == 0), 0)


@on_its_device
def product(x: Tensor, codes: WordCodes, bias: Tensor | None) -> Tensor:
    """Return x Wᵀ + bias; see `triton_words.product`."""
    held, scale, inputs = codes.held, codes.scale, inputs_of_a_piece(codes)
    pieces, words = x.shape[-1] // inputs, TILE["words"]
    tile = min(triton.next_power_of_2(pieces), TILE["pieces"])
    y = torch.empty(*x.shape[:-1], scale.shape[1], dtype=x.dtype, device=x.device)
    zeros = held if codes.zeros is None else codes.zeros
    _product[(triton.cdiv(held.shape[1], words), x.numel() // x.shape[-1])](
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
        INTERLEAVED=codes.interleaved,
        INPUTS=inputs,
        ZEROS=codes.zeros is not None,
        BIAS=bias is not None,
        PIECES=tile,
        WORDS=words,
        num_warps=max(1, tile * words // (32 * TILE["words_of_a_thread"])),
    )
    return y
