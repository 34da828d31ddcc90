"""Noise that decides how numbers are rounded, the same in every process and on every device."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def fixed_noise(
    rows: int, columns: int, *, device: torch.device, first: tuple[int, int] = (0, 0)
) -> Tensor:
    """Return numbers between -0.5 and 0.5, evenly spread and without a pattern: float32 [rows,
    columns], of all that there are those from the row and column of `first` on; the same whenever
    and wherever this is called."""
    import torch

    # A hash in 32 bits; of these torch's are signed, so what a shift brings in is masked away.
    # A compiler would compute with indices as they are, beyond 32 bits; not behind an `&`.
    row, column = (
        torch.arange(start, start + n, dtype=torch.int32, device=device) & 0x7FFFFFFF
        for start, n in zip(first, (rows, columns), strict=True)
    )
    mixed = row[:, None] * (0x9E3779B1 - 2**32) + column * (0x85EBCA77 - 2**32)
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39), (15, 1)):
        mixed = (mixed ^ ((mixed >> shift) & (2 ** (32 - shift) - 1))) * factor
    # A little less, so that the rounding of sums does not carry it over the edge.
    return (((mixed >> 8) & 0xFFFFFF) + 0.5) * (0.9999 / 2**24) - 0.9999 / 2
