"""The values that the weights of one module can take while its scales stay as they are.

A `Grid` is plain arithmetic of tensors, without the vendor: to round onto it, to train through it
and to compensate errors needs no module to be packed and unpacked.

What an adapter adds is small against the steps of a grid. Rounded to nearest, nearly all of it is
gone. Dithered, a change of a tenth of a step becomes a whole step for one weight in ten: what is
lost of each is random, and sums over many weights keep the change.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, fields
from functools import cache, cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from ..compiling import one_kernel
from ..model.noise import fixed_noise

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
        return self._by_group(self._codes, columns, weight)

    def values(self, codes: Tensor, columns: slice | None = None) -> Tensor:
        """Return what the codes stand for, bit for bit as `dequantize` does."""
        return self._by_group(self._values, columns, codes)

    def nearest(self, weight: Tensor, columns: slice | None = None) -> Tensor:
        """Return the value that is nearest to each weight, in the shape of `weight`."""
        return self.values(self.codes(weight, columns), columns)

    def dithered(self, start: Tensor, change: Tensor) -> Tensor:
        """Return values that on average are `start + change`: each changes by a step, or by none,
        as a noise decides that is fixed for each place. No change gives `start`, bit for bit.

        Args:
            start: values of this grid, [out_features, in_features].
            change: what is to be added, in float32.
        """
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        own = {name: part for name, part in parts.items() if hasattr(part, "is_cuda")}
        rest = tuple((name, part) for name, part in parts.items() if name not in own)
        layout = (type(self), tuple(own), rest)
        return one_kernel(_dithered, start, change, *own.values(), *self.tables, static=layout)

    @cached_property
    def tables(self) -> tuple[Tensor, ...]:
        """Small tensors that `_dithered` looks numbers up in."""
        return ()

    @abstractmethod
    def _dithered(
        self, start: Tensor, change: Tensor, noise: Tensor, scale: Tensor, zero: Tensor | None
    ) -> Tensor:
        """Return the values of `dithered`; a noise of -0.5 to 0.5 spans what rounds to `start`."""

    @abstractmethod
    def _codes(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Return the codes of weights, where the parts of their groups broadcast."""

    @abstractmethod
    def _values(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Return the values of codes, where the parts of their groups broadcast."""

    def _by_group(
        self, function: Callable[..., Tensor], columns: slice | None, *each: Tensor
    ) -> Tensor:
        """Return function(*each, scale, zero) with the scale and zero of each one's group."""
        scale, zero, count = self.scale, self.zero, self.scale.shape[1]
        if self.groups is None and count == 1:
            return function(*each, scale, zero)
        if self.groups is None and columns is None:
            shape = (len(scale), count, -1)
            zero = None if zero is None else zero[:, :, None]
            found = function(*(part.reshape(shape) for part in each), scale[:, :, None], zero)
            return found.reshape(each[0].shape)
        groups = self._group_of_column if columns is None else self._group_of_column[columns]
        return function(*each, scale[:, groups], None if zero is None else zero[:, groups])

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

    def _dithered(
        self, start: Tensor, change: Tensor, noise: Tensor, scale: Tensor, zero: Tensor | None
    ) -> Tensor:
        began = self._codes(start, scale, zero)
        moved = began + ((change / scale).nan_to_num(nan=0) + noise)
        moved = moved.round().clamp(self.lowest, self.highest).to(began.dtype)
        return self._values(moved, scale, zero)

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
    def tables(self) -> _Codebook:
        """Levels, codes, edges and gaps."""
        return _codebook(self.levels)

    def _codes(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        import torch

        exact = weight.to(torch.promote_types(weight.dtype, torch.float32)) / _divisor(scale)
        return _at(self.tables.codes, _place(exact, self.tables.edges))

    def _dithered(
        self, start: Tensor, change: Tensor, noise: Tensor, scale: Tensor, zero: Tensor | None
    ) -> Tensor:
        levels, _, edges, gaps = self.tables
        step = _divisor(scale)
        place = _place(start.float() / step, edges)
        moved = _at(levels, place) + change / step
        moved = moved + noise * _at(gaps, place + (noise >= 0))
        return (_at(levels, _place(moved, edges)) * scale).to(self.dtype)

    def _values(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        return (_at(self.levels, codes) * scale).to(self.dtype)


@lru_cache(maxsize=16)
def float8_levels(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what the 256 codes of an 8-bit float stand for: float32, made once for a device."""
    import torch

    with torch.inference_mode(False):
        return torch.arange(256, device=device).to(torch.uint8).view(dtype).float()


class _Codebook(NamedTuple):
    """What is looked up of a table of levels, in float32 but for the codes.

    Attributes:
        levels: in order; infinity where a code is no number, or that of another code.
        codes: int32, of these.
        edges: what lies halfway between two.
        gaps: from each to the one before it, and one more; at both ends the gap that is next to it.
    """

    levels: Tensor
    codes: Tensor
    edges: Tensor
    gaps: Tensor


def _codebook(levels: Tensor) -> _Codebook:
    """Return what is looked up of `levels`, made once for as long as they live."""
    import torch

    known = _codebooks()
    if (found := known.get(levels)) is None:
        with torch.inference_mode(False), torch.no_grad():
            found = known[levels] = _made_codebook(levels.detach().float().clone())
    return found


@cache
def _codebooks() -> MutableMapping[Tensor, _Codebook]:
    from torch.utils.weak import WeakTensorKeyDictionary

    return WeakTensorKeyDictionary()  # type: ignore[no-untyped-call, no-any-return]


def _made_codebook(levels: Tensor) -> _Codebook:
    import torch

    ordered, order = levels.masked_fill(~levels.isfinite(), torch.inf).sort()
    again = torch.zeros_like(ordered, dtype=torch.bool)
    again[1:] = ordered[1:] == ordered[:-1]
    ordered, places = ordered.masked_fill(again, torch.inf).sort(stable=True)
    gaps = ordered.diff()
    known = gaps.isfinite()
    last = gaps.index_select(0, (known.sum() - 1).clamp(0).view(1))  # does not wait for a GPU
    gaps = torch.cat([gaps[:1], gaps.where(known, last), last])
    return _Codebook(ordered, order[places].int(), (ordered[1:] + ordered[:-1]) / 2, gaps)


def _divisor(scale: Tensor) -> Tensor:
    """Return scales to divide by: where one is 0, all values are, and any code will do."""
    return scale.masked_fill(scale == 0, 1)


_MANY = 2**14
"""Numbers from which on a CPU looks them up rather than searches among the edges."""


def _place(numbers: Tensor, edges: Tensor) -> Tensor:
    """Return how many of the ascending `edges` are below each number; of NaN, all or none."""
    import torch

    found = None
    if not numbers.is_cuda and numbers.numel() >= _MANY and numbers.dtype == torch.float32:
        found = _buckets(tuple(edges.tolist()))
    if found is None:
        return torch.bucketize(numbers, edges, out_int32=True)
    below, edge = found
    bucket = _bucket(numbers)
    return _at(below, bucket) + (numbers > _at(edge, bucket))


def _at(table: Tensor, places: Tensor) -> Tensor:
    """Return table[places], all of them inside; on a CPU in a half of the time. A compiled kernel
    would look at each place and wait for all others to be looked at."""
    import torch

    if table.is_cuda:
        found: Tensor = torch.ops.aten._unsafe_index(table, [places])
        return found
    return table.index_select(0, places.reshape(-1)).view(places.shape)


def _bucket(numbers: Tensor) -> Tensor:
    """Return the bucket of each number in float32, by sign, exponent and four bits more: int32,
    0 to 8191, and the higher the larger the number."""
    import torch

    bits = numbers.contiguous().view(torch.int32)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> 19) + 4096


@lru_cache(maxsize=16)
def _buckets(edges: tuple[float, ...]) -> tuple[Tensor, Tensor] | None:
    """Return for each bucket how many edges are in those below it, int64 [8192], and the edge that
    it holds, infinity where there is none; None where one holds several."""
    import torch

    with torch.inference_mode(False):
        finite = torch.tensor([edge + 0.0 for edge in edges if math.isfinite(edge)])  # no -0.0
        counts = torch.bincount(places := _bucket(finite), minlength=8192)
        if counts.max() > 1:
            return None
        held = torch.full((8192,), torch.inf)
        held[places.long()] = finite
        return counts.cumsum(0) - counts, held


def _dithered(start: Tensor, change: Tensor, *rest: Any) -> Tensor:
    """As `Grid.dithered` does, of a grid that is taken apart."""
    *tensors, kind, names, others = rest
    own, tables = tensors[: len(names)], tensors[len(names) :]
    grid: Grid = kind(**dict(zip(names, own, strict=True)), **dict(others))
    vars(grid)["tables"] = tables  # made already
    small = start.device.type == "cpu" and start.numel() <= _KEPT
    noise = (_kept_noise if small else fixed_noise)(*start.shape, device=start.device)
    # The change that a merge into float32 weights leaves, so that both round to the same values.
    exact = start.float()
    change = (exact + change).sub_(exact)
    return grid._by_group(grid._dithered, None, start, change, noise)


_KEPT = 2**22
"""Numbers of noise that are kept on the CPU, where making them takes as long as all else."""


@lru_cache(maxsize=8)
def _kept_noise(rows: int, columns: int, *, device: torch.device) -> Tensor:
    import torch

    with torch.inference_mode(False):
        return fixed_noise(rows, columns, device=device)
