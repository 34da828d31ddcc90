"""IA3 over facades as one autograd function: y = l (x Wᵀ + bias), or l x in place of x.

https://arxiv.org/abs/2205.05638. PEFT computes both in float32 of the size of activations, several
times. Backward needs what was scaled, and nothing else: x Wᵀ, or in feed-forward layers x.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from peft.tuners.ia3.layer import Linear as Ia3Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..facade import QuantLinear, kept
from .columns import scaled, scaled_back
from .fused_lora import flat, own
from .lent_forwards import Way, lent_forwards


def fused_ia3(layer: Any, adapter: str, x: Tensor) -> Tensor:
    """Return what PEFT's IA3 `layer` makes of x [..., in_features]: [..., out_features]."""
    factors, facade = layer.ia3_l[adapter], layer.base_layer
    if layer.is_feedforward:
        x, keeper = kept(x)
        output: Tensor = _ScaledInput.apply(x, factors, facade, keeper)  # type: ignore[no-untyped-call]
    else:
        output = _ScaledOutput.apply(x, factors, facade)  # type: ignore[no-untyped-call]
    return output


class _ScaledOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: Tensor, facade: QuantLinear) -> Tensor:
        made = facade.vendor_forward(x)
        z = made.reshape(-1, made.shape[-1])
        ctx.facade, ctx.like_x = facade, (x.shape, x.dtype)
        ctx.save_for_backward(z, factors)
        return own(scaled(z, factors.flatten()).view(made.shape))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        z, factors = ctx.saved_tensors
        dz, of_factors = scaled_back(flat(grad, z.dtype), z, factors.flatten())
        del z
        dx = None
        if ctx.needs_input_grad[0]:
            shape, dtype = ctx.like_x
            dx = ctx.facade.gradient(dz.to(ctx.facade.compute_dtype)).view(shape).to(dtype)
        return dx, of_factors.to(factors.dtype).view_as(factors), None


class _ScaledInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: Tensor, facade: QuantLinear, keeper: Any) -> Tensor:
        ctx.facade, ctx.keeper = facade, keeper
        ctx.save_for_backward(factors, *(() if keeper is not None else (x,)))
        y = facade.vendor_forward(scaled(flat(x, x.dtype), factors.flatten()).view(x.shape))
        return own(y)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        factors, *saved = ctx.saved_tensors
        (x,) = saved if ctx.keeper is None else ctx.keeper.saved_tensors
        du = ctx.facade.gradient(flat(grad, ctx.facade.compute_dtype)).to(x.dtype)
        made, of_factors = scaled_back(du, flat(x, x.dtype), factors.flatten(), out=du)
        dx = made.view(x.shape) if ctx.needs_input_grad[0] else None
        return dx, of_factors.to(factors.dtype).view_as(factors), None, None


def ia3_layers(model: nn.Module) -> AbstractContextManager[int]:
    """Inside, passes that train compute IA3's layers of `model` so; yield how many."""
    return lent_forwards(model, _WAYS)


_WAYS = {Ia3Linear: Way("ia3_l", fused_ia3)}
