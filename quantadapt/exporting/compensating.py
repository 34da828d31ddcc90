"""Round a tuned weight so that the outputs of its layer stay what they are, on data.

A weight that is rounded to nearest by itself forgets what was learned: an adapter moves weights by
less than half a step. Here columns make up for what others were rounded by, as in GPTQ
(https://arxiv.org/abs/2210.17323), and are then looked at again, one by one, as in QuantEase
(https://arxiv.org/abs/2309.01885), until hardly any is rounded otherwise. All that the error of the
outputs depends on is the second moment of the inputs: ||X (W - V)^T||^2 = tr((W - V) X^T X (W - V)^T).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Nearest = Callable[[Tensor, slice], Tensor]
"""Gets columns of a weight, [out_features, n], and which columns these are; returns the nearest
values that they can take. `Grid.nearest` of `quantadapt.protocols` is one."""

CHUNK = 128
"""Columns that are rounded before all others learn of it; the result depends on it by rounding."""
DAMPING = 0.01
SWEEPS = 10


@torch.no_grad()
def compensated(
    weight: Tensor,
    second_moment: Tensor,
    nearest: Nearest,
    *,
    damping: float = DAMPING,
    sweeps: int = SWEEPS,
) -> Tensor:
    """Return values of a grid that give the outputs of `weight`, as far as its inputs are known.

    Args:
        weight: floating point, [out_features, in_features].
        second_moment: X^T X of the inputs X, [in_features, in_features], e.g. that of
            `calibration.LayerInputs`; where it is 0, the weight is rounded to nearest.
        nearest: rounds columns onto the grid.
        damping: share of the mean of the moment's diagonal that is added to it: how little inputs
            are believed that were hardly seen.
        sweeps: how often all columns are looked at again, at most.

    Returns:
        float32, [out_features, in_features], on the grid. In no row is the squared error of the
        outputs, damping included, larger than that of rounding to nearest.
    """
    weight, plain = weight.float(), nearest(weight.float(), slice(None)).float()
    moment = second_moment.to(weight.device, torch.float32)
    mean = moment.diagonal().mean()
    if not mean > 0:
        return plain
    moment = moment / mean  # so that float32 suffices, whatever the inputs
    moment.diagonal().add_(damping)
    found = _descended(weight, moment, nearest, _gptq(weight, moment, nearest), sweeps)
    worse = _errors(weight, moment, found) > _errors(weight, moment, plain)
    return torch.where(worse[:, None], plain, found)


def _errors(weight: Tensor, moment: Tensor, rounded: Tensor) -> Tensor:
    """Return the squared error of each output, summed over the inputs, [out_features]."""
    off = rounded - weight
    return ((off @ moment) * off).sum(1)


def _gptq(weight: Tensor, moment: Tensor, nearest: Nearest) -> Tensor:
    """Round column by column, those with large inputs first; the others make up for the error."""
    order = moment.diagonal().argsort(descending=True)
    left, moment = weight[:, order], moment[order][:, order]
    factor, columns = _factor(moment), order.tolist()
    rounded = torch.empty_like(left)
    for start in range(0, len(columns), CHUNK):
        stop = min(start + CHUNK, len(columns))
        part, own = left[:, start:stop], factor[start:stop, start:stop]
        errors = torch.empty_like(part)
        for k, column in enumerate(columns[start:stop]):
            value = nearest(part[:, k : k + 1], slice(column, column + 1)).float()
            errors[:, k : k + 1] = (part[:, k : k + 1] - value) / own[k, k]
            part[:, k + 1 :] -= errors[:, k : k + 1] * own[k, k + 1 :]
            rounded[:, start + k : start + k + 1] = value
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return rounded[:, order.argsort()]


def _factor(moment: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse; where rounding keeps it from being one, of
    a moment that is damped more."""
    extra = 0.0
    while True:
        damped = moment + extra * torch.eye(len(moment), device=moment.device)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        extra = max(10 * extra, 1e-3)


def _descended(
    weight: Tensor, moment: Tensor, nearest: Nearest, rounded: Tensor, sweeps: int
) -> Tensor:
    """Round each column to what is best while all others stay, again and again."""
    width, spread = len(moment), moment.diagonal()
    rounded = rounded.clone()
    for _ in range(sweeps):
        moved = 0
        for start in range(0, width, CHUNK):
            stop = min(start + CHUNK, width)
            slope = (rounded - weight) @ moment[:, start:stop]
            for column in range(start, stop):
                before = rounded[:, column]
                best = before - slope[:, column - start] / spread[column]
                value = nearest(best[:, None], slice(column, column + 1))[:, 0].float()
                change = value - before
                slope += change[:, None] * moment[column, start:stop]
                moved += int(change.count_nonzero())
                rounded[:, column] = value
        if moved < 1e-3 * rounded.numel():
            break
    return rounded
