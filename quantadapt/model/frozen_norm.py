"""Liger's RMSNorm with another backward where the weight is frozen, as it is beside adapters."""

from __future__ import annotations

from typing import Any

import torch
from liger_kernel.ops import LigerRMSNormFunction
from torch import Tensor

from .triton_norm import NARROWEST, WIDEST, norm_back


class FrozenNorm(LigerRMSNormFunction):  # type: ignore[misc]
    """Liger's function, whose forward saves x, the weight and one over the root of its squares."""

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        """Return the gradient of x, for that of the output, and of what else forward takes."""
        frozen = ctx.elementwise_affine and not ctx.needs_input_grad[1]
        if not frozen or not NARROWEST <= dy.shape[-1] <= WIDEST:
            return LigerRMSNormFunction.backward(ctx, dy)
        x, weight, factors = ctx.saved_tensors
        given = dy.contiguous().view(x.shape)
        dx = given if ctx.in_place else torch.empty_like(given)
        norm_back(given, x, weight, factors, ctx.offset, dx)
        return dx.view(dy.shape), *[None] * (len(ctx.needs_input_grad) - 1)
