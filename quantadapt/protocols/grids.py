"""The values that the weights of one module can take while its scales stay as they are.

A `Grid` is plain arithmetic of tensors, without the vendor: to round onto it, to train through it
and to compensate errors needs no module to be packed and unpacked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Grid(ABC):
    """For each group of weights, the values that they can take; a code is the number of a value.

    Attributes:
        scale: [out_features, groups of a row].
        zero: like `scale`, in any dtype, where values are counted from there; else None.
        group_size: neighbours in a row that share a scale.
        dtype: of the values, as `dequantize` gives them.
        groups: int64 [in_features], the group of each column, where these are no neighbours.
    """

    scale: Tensor
    group_size: int
    dtype: torch.dtype
    zero: Tensor | None = None
    groups: Tensor | None = None

    def codes(self, weight: Tensor, columns: slice | None = None) -> Tensor:
        """Return the code of the value that is nearest to each weight.

        Args:
            weight: floating point, [out_features, in_features], or of that the columns `columns`.
            columns: which columns of the module these are; None: all.
        """
        return self._by_group(self._codes, weight, columns)

    def values(self, codes: Tensor, columns: slice | None = None) -> Tensor:
        """Return what the codes stand for, bit for bit as `dequantize` does."""
        return self._by_group(self._values, codes, columns)

    def nearest(self, weight: Tensor, columns: slice | None = None) -> Tensor:
        """Return the value that is nearest to each weight, in the shape of `weight`."""
        return self.values(self.codes(weight, columns), columns)

    @abstractmethod
    def _codes(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Return the codes of weights, where the parts of their groups broadcast."""

    @abstractmethod
    def _values(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Return the values of codes, where the parts of their groups broadcast."""

    def _by_group(
        self, function: Callable[..., Tensor], each: Tensor, columns: slice | None
    ) -> Tensor:
        """Return function(each, scale, zero) with the scale and zero of each one's group."""
        scale, zero, count = self.scale, self.zero, self.scale.shape[1]
        if self.groups is None and count == 1:
            return function(each, scale, zero)
        if self.groups is None and columns is None:
            shape = (len(each), count, -1)
            zero = None if zero is None else zero[:, :, None]
            return function(each.reshape(shape), scale[:, :, None], zero).reshape(each.shape)
        groups = self._group_of_column if columns is None else self._group_of_column[columns]
        return function(each, scale[:, groups], None if zero is None else zero[:, groups])

    @cached_property
    def _group_of_column(self) -> Tensor:
        import torch

        if self.groups is not None:
            return self.groups
        counted = torch.arange(self.scale.shape[1], device=self.scale.device)
        return counted.repeat_interleave(self.group_size)


@dataclass(frozen=True, eq=False, kw_only=True)
class UniformGrid(Grid):
    """Values (code - zero) * scale, for codes from `lowest` to `highest`."""

    lowest: int
    highest: int

    def _codes(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        import torch

        exact = weight.to(torch.promote_types(weight.dtype, torch.float32)) / scale
        exact = exact if zero is None else exact + zero
        # A scale of 0 has one value, whatever the code.
        found = exact.nan_to_num(nan=0).round().clamp(self.lowest, self.highest).to(torch.int32)
        if self.highest - self.lowest < 128 or torch.finfo(self.dtype).bits > 16:
            return found
        # In 16 bits a value is so far off that its neighbour's code may come out.
        off = (self._values(found, scale, zero) - weight).abs()
        for step in (-1, 1):
            other = (found + step).clamp(self.lowest, self.highest)
            others = (self._values(other, scale, zero) - weight).abs()
            found = torch.where(others < off, other, found)
            off = torch.minimum(others, off)
        return found

    def _values(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        shifted = codes.to(self.dtype)
        shifted = shifted if zero is None else shifted - zero.to(self.dtype)
        return (shifted * scale).to(self.dtype)


@dataclass(frozen=True, eq=False, kw_only=True)
class CodebookGrid(Grid):
    """Values level[code] * scale, of one table for all groups.

    Attributes:
        levels: float32 [codes], in any order; NaN where a code is none.
    """

    levels: Tensor

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor]:
        """Return the codes in the order of their levels, and what lies halfway between these."""
        levels, order = self.levels.sort()
        count = int(levels.isfinite().sum())  # NaN sorts last
        levels, order = levels[:count], order[:count]
        return order.int(), (levels[1:] + levels[:-1]) / 2

    def _codes(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        import torch

        order, halfway = self._sorted
        exact = weight.to(torch.promote_types(weight.dtype, torch.float32)) / scale
        return order[torch.bucketize(exact.nan_to_num(nan=0), halfway)]

    def _values(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        return (self.levels[codes] * scale).to(self.dtype)
