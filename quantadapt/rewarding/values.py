"""Arithmetic of rewards, in which NaN stands for what a function did not score."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..distributed.talking import reduced, summed
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
    """Return the values [n] of all processes in one tensor, with NaN where one has fewer than
    others, as it may of an epoch's last rows."""
    import torch

    mine = world()
    if mine.size == 1:
        return values
    here, talk = len(values), torch.device("cpu")
    table = values.new_zeros(mine.size, 2, int(reduced(float(here), talk, "max")))
    table[mine.rank, 0, :here], table[mine.rank, 1] = values.nan_to_num(), 1
    table[mine.rank, 1, :here] = values.isnan().double()
    found = summed(table, talk).to(values.device)
    whole: Tensor = found[:, 0].masked_fill(found[:, 1] > 0, float("nan")).flatten()
    return whole
