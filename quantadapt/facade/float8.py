"""Products with a frozen weight in 8-bit floats (float8_e4m3fn), which take about half the time.

Each row of both sides, a token's or an output's, is divided by a factor of its own, so that its
largest number becomes the largest that the format has; then it is rounded to the nearest code.
Products of codes are added up in float32 and multiplied with the factors of their row and column.
The gradient of the input goes through the very weight that forward had: its factors, which belong
to what is summed over there, are multiplied into the gradient of the output before that is rounded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..compiling import has_triton

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest number of the format."""
LEAST = 1e-30
"""Of a row's largest number: one of zeros has no other."""
MULTIPLE = 16
"""Both sizes of a weight have to be multiples of it."""


class Rows(NamedTuple):
    """A matrix in 8-bit floats: codes [rows, columns] times factors, float32 [rows, 1]."""

    codes: Tensor
    factors: Tensor

    def numel(self) -> int:
        """Return how many numbers it has."""
        return self.codes.numel()

    @property
    def nbytes(self) -> int:
        """What the codes take."""
        return self.codes.nbytes


def in_float8(x: Tensor, by: Tensor | None = None) -> Rows:
    """Return x [rows, columns] in 8-bit floats.

    Args:
        by: each column is multiplied with its number first, float32 [columns]. What is no finite
            number makes its row one of nan.
    """
    if x.is_cuda and has_triton():
        from .triton_float8 import in_float8 as on_cuda

        return Rows(*on_cuda(x, by))
    z = x.float() if by is None else x.float() * by
    factors = z.abs().amax(1, keepdim=True).clamp_(min=LEAST).div_(LARGEST)
    codes = (z / factors).clamp_(-LARGEST, LARGEST).to(DTYPE)
    return Rows(codes, factors)


def product(x: Rows, weight: Rows, dtype: torch.dtype) -> Tensor:
    """Return x Wᵀ, [tokens, out_features] in `dtype`: on CUDA that has to be bfloat16."""
    return _scaled(x, weight.codes.t(), weight.factors.t(), dtype)


def gradient(dy: Tensor, weight: Rows) -> Tensor:
    """Return dy W, [tokens, in_features] in the dtype of dy."""
    rows = in_float8(dy, weight.factors[:, 0])
    ones = weight.factors.new_ones(1, weight.codes.shape[1])
    # The kernels take a right side whose columns lie one after the other.
    return _scaled(rows, _transposed(weight.codes).t(), ones, dy.dtype)


def _scaled(x: Rows, right: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    # Row-wise kernels are only fast where they add up as the tensor cores do.
    return torch._scaled_mm(
        x.codes, right, scale_a=x.factors, scale_b=factors, out_dtype=dtype, use_fast_accum=True
    )


def _transposed(codes: Tensor) -> Tensor:
    if codes.is_cuda and has_triton():
        from .triton_float8 import transposed

        return transposed(codes)
    return codes.t().contiguous()


def refused(device: torch.device) -> str:
    """Try a small product on `device`; return why it cannot be had there, or nothing."""
    if not hasattr(torch, "_scaled_mm"):
        return f"torch {torch.__version__} has no product of 8-bit floats (_scaled_mm)"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = torch.ones(MULTIPLE, MULTIPLE, device=device, dtype=dtype)
    try:
        gradient(product(in_float8(x), in_float8(x), dtype), in_float8(x)).sum().item()
    except Exception as error:  # whatever kernels, their compiler or the driver say
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return ""
