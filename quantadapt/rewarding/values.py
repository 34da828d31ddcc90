"""Arithmetic of rewards, in which NaN stands for what a function did not score."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..distributed.talking import summed
from ..distributed.world import world

if TYPE_CHECKING:
    from torch import Tensor


def nanstd(values: Tensor) -> Tensor:
    """Return the sample standard deviation of each row, without what is NaN, float64 [rows]."""
    known = ~values.isnan()
    count = known.sum(1)
    squares = (values - values.nanmean(1, keepdim=True)).nan_to_num() ** 2
    found: Tensor = (squares.sum(1) / (count - 1).clamp(min=1)).sqrt()
    return found


def gathered(values: Tensor) -> Tensor:
    """Return the values [n] of all processes, which all have as many, in one tensor."""
    import torch

    mine = world()
    if mine.size == 1:
        return values
    table = values.new_zeros(mine.size, 2, len(values))
    table[mine.rank] = values.new_zeros(2, len(values))
    table[mine.rank, 0], table[mine.rank, 1] = values.nan_to_num(), values.isnan().double()
    found = summed(table, torch.device("cpu")).to(values.device)
    whole: Tensor = found[:, 0].masked_fill(found[:, 1] > 0, float("nan")).flatten()
    return whole
