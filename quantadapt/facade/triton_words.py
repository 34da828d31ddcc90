"""The product of a few tokens with weights whose codes lie in 32-bit words: these are read as they
are held, once for each token, and no dense weight is made.

Here are words that hold codes along inputs. Four that lie side by side are read at once, be they of
neighbouring outputs or of a row. Inputs are taken in pieces, each of one group; a thread multiplies
a piece of four outputs, and threads beside it have the next outputs, or pieces. Tensors have five
axes: threads (two axes: as memory goes, first), what else a thread reads, words side by side, and
lanes, which are codes of a word. All of the last three is in a thread's registers, so that nothing
goes between threads before the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compiling import on_its_device
from ..protocols import WordCodes
from . import triton_words_along_outputs as along_outputs
from .triton_codes import joined, of_float, of_lane, words
from .triton_scales import in_float32, readable

TILES = {
    False: {"rows": 4, "units": 4, "threads": 8, "pieces": 32},
    True: {"rows": 4, "units": 4, "threads": 1, "pieces": 128},
}
"""By whether the words of a row lie side by side: outputs ("rows") of a thread; words (of 3 bits:
three words) of a piece along inputs, at most; threads along outputs; pieces, which are threads
along inputs, at most. Four words lie side by side: rows are four, or else units are."""
PROGRAMS = 256
"""Of a layer with fewer, two a GPU's processor, threads along outputs become threads along inputs,
while there are more than two: with four words each, that many read 32 bytes."""
POWER = 0x4B000000
"""2 ** 23 as a float. An argument, so that it is in a register: with two constants an `and` and an
`or` are two instructions."""
FLIP = tl.constexpr(0 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) else 4)
"""Triton lays threads along the first axes first; from 3.7 on, along the last ones."""


@triton.jit  # type: ignore[untyped-decorator]
def _axis(SIZE: tl.constexpr, AXIS: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    """Return 0, 1, ... along one of the five axes."""
    line = tl.arange(0, SIZE)
    for axis in tl.static_range(5):
        if axis != (FLIP - AXIS if FLIP else AXIS):
            line = tl.expand_dims(line, axis)
    return line


@triton.jit  # type: ignore[untyped-decorator]
def _sum(x, AXIS: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    return tl.sum(x, FLIP - AXIS if FLIP else AXIS, True)


@triton.jit  # type: ignore[untyped-decorator]
def _lane(x, LANE: tl.constexpr, LANES: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    """Return one of the last axis, which a thread has in registers: no instruction is left of it,
    as nothing is added, which integers may show."""
    bits = tl.where(_axis(LANES, 4) == LANE, x.to(tl.int32, bitcast=True), 0)
    return _sum(bits, 4).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _of_units(  # type: ignore[no-untyped-def]
    at,
    down,
    given,
    away,
    power,
    mask,
    inside,
    BITS: tl.constexpr,  # noqa: N803
    FLOATS: tl.constexpr,  # noqa: N803
):
    """Return codes less `away` times inputs, summed over the lanes of each unit; 2 ** -62 times
    that, of floats.

    Args:
        at: first words of units; of 3 bits two more follow, `down` apart.
        given: first inputs of units.
    """
    LANES: tl.constexpr = 32 if BITS == 3 else 32 // BITS  # noqa: N806
    READ: tl.constexpr = 128 // given.dtype.element_ty.primitive_bitwidth  # noqa: N806
    EACH: tl.constexpr = READ if READ < LANES else LANES  # noqa: N806 (16 bytes, in one read)
    first = words(at, mask)
    second, third = first, first
    if BITS == 3:
        second, third = words(at + down, mask), words(at + 2 * down, mask)
    summed = tl.zeros_like(first).to(tl.float32)
    for start in tl.static_range(0, LANES, EACH):
        x = tl.load(given + start + _axis(EACH, 4), mask=inside, other=0.0).to(tl.float32)
        for lane in tl.static_range(EACH):
            own = _lane(x, lane, EACH)
            if FLOATS:
                summed += of_float(first, own, (start + lane) * BITS)
            else:
                summed += of_lane(
                    first, second, third, own, away, power, (start + lane) * BITS, BITS
                )
    return summed


@triton.jit  # type: ignore[untyped-decorator]
def _zeros(  # type: ignore[no-untyped-def]
    at,
    right,
    lead,
    row,
    inside,
    mask,
    BITS: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
):
    """Return the codes of rows that are packed from `at` on; `lead` is the first of a thread's."""
    shift = row * BITS % 32
    if 32 % (ROWS * BITS) == 0:  # they lie in one word
        code = words(at + lead * BITS // 32 * right, inside) >> shift
    else:
        here = at + row * BITS // 32 * right
        code = words(here, mask) >> shift
        if BITS == 3:
            code = joined(words(here, mask), words(here + right, mask & (shift > 29)), shift)
    return (code & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
    y,
    x,
    held,
    scale,
    zeros,
    divisor,
    bias,
    rows,
    pieces,
    zero,
    power,
    held_down,
    held_right,
    scale_down,
    scale_right,
    zeros_down,
    zeros_right,
    divisor_right,
    ROWWISE: tl.constexpr,  # noqa: N803
    BITS: tl.constexpr,  # noqa: N803
    UNITS: tl.constexpr,  # noqa: N803
    IN_GROUP: tl.constexpr,  # noqa: N803
    ZEROS: tl.constexpr,  # noqa: N803
    FLOATS: tl.constexpr,  # noqa: N803
    KIND: tl.constexpr,  # noqa: N803
    DIVISOR: tl.constexpr,  # noqa: N803
    BIAS: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    THREADS: tl.constexpr,  # noqa: N803
    PIECES: tl.constexpr,  # noqa: N803
):
    """`IN_GROUP` is how many pieces a group has; `..._down` and `..._right` are strides."""
    WORDS: tl.constexpr = 3 if BITS == 3 else 1  # noqa: N806 (of a unit)
    LANES: tl.constexpr = WORDS * 32 // BITS  # noqa: N806
    UNIT: tl.constexpr = 3 if ROWWISE else 2  # noqa: N806 (axes)
    PIECE: tl.constexpr = 0 if ROWWISE else 1  # noqa: N806
    lead = (tl.program_id(0) * THREADS + _axis(THREADS, 1 - PIECE)) * ROWS
    row = lead + _axis(ROWS, 5 - UNIT)
    there = row < rows
    x += tl.program_id(1) * pieces * (UNITS * LANES)
    y += tl.program_id(1) * rows
    total = tl.zeros_like(row + _axis(PIECES, PIECE)).to(tl.float32)
    for start in range(0, pieces, PIECES):
        piece = start + _axis(PIECES, PIECE)
        inside = piece < pieces
        unit = piece * UNITS + _axis(UNITS, UNIT)
        given, _ = tl.broadcast(x + unit * LANES, lead)  # a thread reads those it needs itself
        at = held + unit * (WORDS * held_down) + row * held_right
        mask = inside & there
        group = piece // IN_GROUP
        away = zero + 0.0
        if ZEROS:
            known, at_zeros = inside & (lead < rows), zeros + group * zeros_down
            away += _zeros(at_zeros, zeros_right, lead, row, known, mask, BITS, ROWS)
        factor = tl.load(scale + group * scale_down + row * scale_right, mask=mask, other=0)
        summed = _of_units(at, held_down, given, away, power, mask, inside, BITS, FLOATS)
        summed = _sum(summed, UNIT)
        if FLOATS:
            summed *= 4611686018427387904.0
        total += summed * in_float32(factor, KIND)
    made = _sum(total, PIECE)
    if DIVISOR:
        made /= tl.load(divisor + row * divisor_right, mask=there, other=1.0)
    if BIAS:
        made += tl.load(bias + row, mask=there, other=0.0).to(tl.float32)
    tl.store(y + row, made.to(y.dtype.element_ty), mask=there)


def takes(codes: WordCodes, x: Tensor) -> bool:
    """Say whether a kernel takes such codes, on the GPU where they are."""
    small = codes.held.numel() < 2**31
    return small and x.is_contiguous() and _taken(codes)


def _taken(codes: WordCodes) -> bool:
    if codes.along_outputs:
        return along_outputs.inputs_of_a_piece(codes) > 0
    return not codes.interleaved and codes.group_size % _lanes(codes) == 0


def _lanes(codes: WordCodes) -> int:
    """Return how many inputs a word has; of 3 bits, three words."""
    return 32 if codes.bits == 3 else 32 // codes.bits


def product(x: Tensor, codes: WordCodes, bias: Tensor | None) -> Tensor:
    """Return x Wᵀ + bias, summed in float32, in the dtype of `x`.

    Args:
        x: [..., in_features], contiguous. Each token reads all words: those after the first from
            the GPU's cache, mostly, but for few tokens only that is fast.
        codes: of W, such as `takes` says yes to.
        bias: [out_features] or None.
    """
    multiply = along_outputs.product if codes.along_outputs else _product_along_inputs
    made: Tensor = multiply(x, codes, bias)
    return made


def _units(codes: WordCodes) -> int:
    """Return how many words (of 3 bits: three words) along inputs a piece has, all of one group."""
    units = TILES[codes.held.stride(0) == 1]["units"]
    while codes.group_size % (units * _lanes(codes)):
        units //= 2
    return units


def _threads(rowwise: bool, rows: int, pieces: int) -> tuple[int, int]:
    """Return how many threads a program has along outputs and along inputs: powers of two."""
    tile = TILES[rowwise]
    threads, most = tile["threads"], tile["pieces"]
    while threads > 2 and triton.cdiv(rows, tile["rows"] * threads) < PROGRAMS:
        threads, most = threads // 2, most * 2
    most = min(triton.next_power_of_2(pieces), most)
    return threads, max(most, 32 // threads)  # a warp, at least


@on_its_device
def _product_along_inputs(x: Tensor, codes: WordCodes, bias: Tensor | None) -> Tensor:
    held, rows, (scale, kind) = codes.held, codes.scale.shape[1], readable(codes.scale)
    rowwise, units = held.stride(0) == 1, _units(codes)
    own, inputs = TILES[rowwise]["rows"], units * _lanes(codes)
    threads, pieces = _threads(rowwise, rows, x.shape[-1] // inputs)
    y = torch.empty(*x.shape[:-1], rows, dtype=x.dtype, device=x.device)
    zeros = held if codes.zeros is None else codes.zeros
    divisor = codes.divisor
    grid = (triton.cdiv(rows, own * threads), x.numel() // x.shape[-1])
    _product[grid](
        y,
        x,
        held,
        scale,
        zeros,
        y if divisor is None else divisor,
        y if bias is None else bias,
        rows,
        x.shape[-1] // inputs,
        codes.zero,
        POWER,
        *held.stride(),
        *scale.stride(),
        *zeros.stride(),
        0 if divisor is None or divisor.numel() == 1 else 1,
        ROWWISE=rowwise,
        BITS=codes.bits,
        UNITS=units,
        IN_GROUP=codes.group_size // inputs,
        ZEROS=codes.zeros is not None,
        FLOATS=codes.floats,
        KIND=kind,
        DIVISOR=divisor is not None,
        BIAS=bias is not None,
        ROWS=own,
        THREADS=threads,
        PIECES=pieces,
        num_warps=pieces * threads // 32,
    )
    return y
