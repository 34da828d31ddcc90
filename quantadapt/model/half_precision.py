"""Merged weights in 16 bits that keep what an adapter adds.

The weights of a base in bfloat16 are numbers of bfloat16. What an adapter adds to one is often less
than half of what lies between it and the next, and rounded to nearest the sum is the base again: an
adapter that was trained at a small learning rate loses a quarter of its gain so. Rounded up or down
as a fixed noise decides, a sum keeps its value on average (stochastic rounding, Gupta et al. 2015,
https://arxiv.org/abs/1502.02551), and a weight that does not change stays bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import NumbersError
from .noise import fixed_noise

HALF = (torch.float16, torch.bfloat16)
_AT_ONCE = {"cpu": 2**17}
_AT_ONCE_ELSEWHERE = 2**24
"""Numbers that are rounded at a time, by type of device: all of an expert's weight is not held many
times over, and a CPU has what it works with in its cache, which makes it five times as fast."""


def exactly(module: nn.Module) -> dict[str, torch.dtype]:
    """Turn the weights of `module` that have 16 bits into float32, in place; return their names and
    dtypes, for `rounded_back`."""
    found = {name: p.dtype for name, p in module.named_parameters() if p.dtype in HALF}
    for name in found:
        parameter = module.get_parameter(name)
        parameter.data = parameter.data.float()
    return found


def rounded_back(module: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Round the weights named in `dtypes` to these, in place.

    Raises:
        ValueError: one is too large for its dtype; named NaN, as PEFT does in such a case.
    """
    for name, dtype in dtypes.items():
        parameter = module.get_parameter(name)
        parameter.data = rounded_to(dtype, parameter.data)
        if not torch.isfinite(parameter.data).all():
            raise ValueError(f"NaN or infinity in {name}")


def rounded_to(dtype: torch.dtype, exact: Tensor) -> Tensor:
    """Return numbers in `dtype`: of float32 in 16 bits, those of a matrix as the noise of their
    place decides; biases and the like, of which there is one for a whole row, to nearest.

    Args:
        exact: floating point, [rows, ...].
    """
    if exact.dtype != torch.float32 or dtype not in HALF or exact.dim() < 2:
        return exact.to(dtype)
    rows = exact.flatten(1)
    made = torch.empty_like(rows, dtype=dtype)
    at_once = _AT_ONCE.get(exact.device.type, _AT_ONCE_ELSEWHERE)
    width = max(1, min(at_once, rows.shape[1]))
    height = max(1, at_once // width)
    for row in range(0, rows.shape[0], height):
        for column in range(0, rows.shape[1], width):
            part = slice(row, row + height), slice(column, column + width)
            made[part] = _rounded(rows[part], dtype, (row, column))
    return made.view(exact.shape)


def in_file(key: str, dtype: torch.dtype, merged: Tensor) -> Tensor:
    """Return merged weights as a file holds them under `key`, in `dtype`; see `rounded_to`.

    Raises:
        NumbersError: one is too large for it.
    """
    made = rounded_to(dtype, merged.detach())
    if dtype in HALF and not torch.isfinite(made).all() and torch.isfinite(merged).all():
        name = str(dtype).removeprefix("torch.")
        what = f"merged with the adapter, {key} holds numbers that are too large for {name}"
        fix = "merge onto a base in bfloat16 or float32, or train again with a lower learning rate"
        raise NumbersError(what, fix=fix)
    return made.cpu()


def _rounded(exact: Tensor, dtype: torch.dtype, first: tuple[int, int]) -> Tensor:
    """Return a part of a matrix that begins at the row and column of `first`: each number, or its
    neighbour on the other side of the exact one, as often as that is near it."""
    nearest = exact.to(dtype)
    off = exact - nearest.float()
    other = _next(nearest, off)
    share = off / (other.float() - nearest.float())
    noise = fixed_noise(*exact.shape, device=exact.device, first=first) + 0.5
    # Beyond the largest number there is no neighbour.
    return torch.where((noise < share) & torch.isfinite(other), other, nearest)


def _next(numbers: Tensor, towards: Tensor) -> Tensor:
    """Return the numbers of the same dtype beside `numbers`, on the side of the sign of `towards`.

    In sign and magnitude, which floats are, the next magnitude is the next integer. (nextafter is
    not there for float16 on every device.)
    """
    bits = numbers.view(torch.int16)
    magnitude = bits & 0x7FFF
    down = towards < 0
    sign = torch.where(magnitude == 0, down, bits < 0)
    grown = magnitude + torch.where(sign == down, 1, -1).to(torch.int16)
    return (grown | (sign.to(torch.int16) << 15)).view(numbers.dtype)
