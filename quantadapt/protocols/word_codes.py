"""Weights whose codes lie in 32-bit words, as GPTQ's and AWQ's files have them, and as the kernel
for a few tokens reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class WordCodes:
    """A layer's codes, and what they stand for: a weight is scale * (code - zero). Tensors may have
    any strides.

    Attributes:
        held: int32. The codes of neighbouring inputs follow each other, from the lowest bits on:
            [in_features * bits / 32, out_features]. Or those of neighbouring outputs do:
            [in_features, out_features * bits / 32].
        bits: of a code: 2, 3, 4 or 8, and 4 along outputs. Of 3 bits some lie across two words.
        scale: [groups, out_features], in a floating dtype; float8_e4m3fn and float8_e8m0fnu, too.
        group_size: neighbouring inputs that share a scale.
        zeros: of neighbouring outputs, packed likewise, [groups, out_features * bits / 32]; or
            None.
        zero: what is added to each of `zeros`; without these, the zero point of all.
        along_outputs: whether words hold codes of neighbouring outputs.
        interleaved: whether a word (of zeros, too) holds codes 0, 2, 4, ... before 1, 3, 5, ...; as
            AWQ has them, along outputs.
        floats: whether codes are floats of 4 bits (e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6, and from 8 on
            negative), and no integers. They are those of neighbouring inputs, without zero points.
        divisor: of floats, what scales are divided by: [1], or [out_features]; or None.
    """

    held: Tensor
    bits: int
    scale: Tensor
    group_size: int
    zeros: Tensor | None = None
    zero: int = 0
    along_outputs: bool = False
    interleaved: bool = False
    floats: bool = False
    divisor: Tensor | None = None
