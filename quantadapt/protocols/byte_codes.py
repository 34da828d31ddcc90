"""Weights whose codes lie in bytes, as the kernel for one token reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from .grids import Grid


@dataclass(frozen=True, eq=False, kw_only=True)
class ByteCodes:
    """A layer's codes, and what they stand for.

    Attributes:
        held: contiguous [out_features / n, in_features], where n = 8 / bits codes share a byte:
            uint8; int8 or an 8-bit float, in which a code is the number itself, where n is 1.
            Code i of byte [r, c] is that of row r + i out_features / n and column c.
        bits: of a code: 8, 4, 2 or 1.
        high_first: whether code 0 has a byte's highest bits, or the lowest.
        grid: scales and zero points. Scales may be float8_e8m0fnu, too.
        shifted: whether a weight is scale * code - zero, instead of scale * (code - zero).
        height: neighbouring rows that share scales: `grid` has a row of them for each `height`.
        zero: the zero point of all, where `grid` has none.
        run: of two neighbouring rows, so many columns of one and of the other alternate, in the
            memory of `held`; None where rows lie one after the other.
    """

    held: Tensor
    grid: Grid
    bits: int = 8
    high_first: bool = False
    shifted: bool = False
    height: int = 1
    zero: int = 0
    run: int | None = None
