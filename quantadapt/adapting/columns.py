"""Columns of activations times a factor of their own, which is trained: IA3's, and DoRA's.

Between two matrix products such a pass waits for memory alone. So forward is one, which also adds
what a low-rank adapter adds, and backward is one, which makes the gradient of what was scaled and
that of the factors. Both compute in float32 and hold nothing of that size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..compiling import has_triton

CHUNK = 2**22
"""Numbers that are there at a time in float32 where no kernel does it."""


def scaled(
    z: Tensor,
    c: Tensor,
    low: Tensor | None = None,
    b: Tensor | None = None,
    scaling: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Return c (z + scaling low bᵀ) + bias, [tokens, columns] in the dtype of z, rounded once.

    Args:
        z: [tokens, columns]. c: [columns], in float32 or as precise as z.
        low: [tokens, r]. b: [columns, r]. Both in the dtype of z.
        bias: [columns].
    """
    if _on_cuda(z):
        from .triton_columns import scaled as kernel

        low, b = (None if part is None else part.contiguous() for part in (low, b))
        return kernel(z.contiguous(), c.contiguous(), low, b, scaling, bias)
    if low is None or b is None:
        y = torch.mul(z, c, out=torch.empty_like(z))
        return y if bias is None else y.add_(bias)
    right = (b * (c * scaling)[:, None]).to(z.dtype).T
    y = low @ right if bias is None else torch.addmm(bias.to(z.dtype), low, right)
    return y.addcmul_(z, c)


def scaled_back(
    dy: Tensor, z: Tensor, c: Tensor, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return c dy, the gradient of z, and Σ dy z, that of c, over the tokens.

    Args:
        dy: [tokens, columns]. z: likewise, in the same dtype. c: as in `scaled`.
        out: where the first goes, `dy` or `z` themselves; None: into a new tensor.

    Returns:
        [tokens, columns] in the dtype of z; [columns] in float32 or better.
    """
    dy, z, c = dy.contiguous(), z.contiguous(), c.contiguous()
    dz = torch.empty_like(z) if out is None else out
    if _on_cuda(z):
        from .triton_columns import scaled_back as kernel

        return dz, kernel(dy, z, c, dz)
    dtype = torch.promote_types(z.dtype, torch.float32)
    sums = z.new_zeros(z.shape[1], dtype=dtype)
    rows = max(CHUNK // z.shape[1], 1)
    for start in range(0, len(z), rows):
        some = slice(start, start + rows)
        sums += (dy[some].to(dtype) * z[some]).sum(0)
    return torch.mul(dy, c, out=dz), sums


def _on_cuda(z: Tensor) -> bool:
    return z.is_cuda and has_triton() and z.dtype != torch.float64
