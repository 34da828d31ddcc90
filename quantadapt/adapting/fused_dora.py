"""DoRA over facades as one autograd function: y = c (x Wᵀ + s (x Aᵀ) Bᵀ) + bias.

c = magnitude / ‖W + s B A‖, row by row, and the norm counts as a constant in backward
(https://arxiv.org/abs/2402.09353, section 4.3). B A is never made dense. Backward needs x and two
vectors a layer; x Wᵀ, which the gradient of the magnitude asks for, is computed again: what follows
a layer may overwrite its output (Liger's kernels do).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..facade import is_recomputing, kept, taken
from .columns import scaled, scaled_back
from .fused_lora import LoraTerm, Magnitude, flat, no_autocast


def fused_dora(x: Tensor, dropped: Tensor | None, term: LoraTerm) -> Tensor:
    """Return x Wᵀ + bias + (c - 1) d Wᵀ + c scaling (d Aᵀ) Bᵀ, where d is x after dropout.

    Args:
        x: [..., in_features].
        dropped: d, which DoRA's part sees; None if it is x itself.
        term: the layer; it has a magnitude.
    """
    seen, keeper = kept(x if dropped is None else dropped)
    base = None if dropped is None else x
    trained = (term.a, term.b, _magnitude(term).weight)
    output: Tensor = _FusedDora.apply(seen, base, term, keeper, *trained)  # type: ignore[no-untyped-call]
    return output


class _FusedDora(torch.autograd.Function):
    """`seen` is what DoRA's part gets, `base` the x of the base alone where that is another."""

    @staticmethod
    def forward(
        ctx: Any, seen: Tensor, base: Tensor | None, term: LoraTerm, keeper: Any, *trained: Tensor
    ) -> Tensor:
        device_type = seen.device.type
        dtype = term.facade.compute_dtype_for(device_type)
        out = dtype if torch.is_autocast_enabled(device_type) else seen.dtype
        with no_autocast(device_type):
            weight = term.facade.weight_for_forward(seen).to(dtype)
            norm, c = _norms_and_factors(term, weight)
            x, bias = flat(seen, out), term.facade.bias
            low, b = x @ term.a_cast.to(out).T, term.b_cast.to(out)
            # One rounding for all of it: rounded before, a c close to 1 would be lost.
            product = _product(x, weight, term)
            term.facade.keep_product(seen, product)
            y = scaled(product, c, low, b, term.scaling, bias)
            if base is not None:  # which c is not for, nor the mask
                y += _product(flat(base, out).sub(x), weight, term)
        ctx.term, ctx.keeper, ctx.dtypes = term, keeper, (dtype, out)
        ctx.base_dtype = None if base is None else base.dtype
        # Not by save_for_backward, or a recomputation would go on up to here.
        ctx.norm, ctx.c = norm, c
        ctx.save_for_backward(*(() if keeper is not None else (seen,)))
        output: Tensor = torch.ops.aten._unsafe_view(y, (*seen.shape[:-1], y.shape[1]))
        return output

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (seen,) = taken(ctx if ctx.keeper is None else ctx.keeper)
        term, (dtype, out) = ctx.term, ctx.dtypes
        shape, seen_dtype, dy = seen.shape, seen.dtype, flat(grad, out)
        d_seen = d_base = None
        with no_autocast(seen.device.type):
            weight = term.facade.weight_for_backward().to(dtype)
            product = term.facade.product_for_backward(seen)
            if product is None:
                product = _product(flat(seen, out), weight, term)
            dz, of_c = scaled_back(dy, product, ctx.c, out=product)
            del product
            through_b = (dz @ term.b_cast.to(out)).mul_(term.scaling)
            of_trained = _trained_gradients(ctx, flat(seen, out), dy, through_b, of_c)
            del seen  # before its gradient, which is as large, needs memory
            if ctx.needs_input_grad[0]:
                if ctx.base_dtype is not None:
                    torch.mul(dy, ctx.c - 1, out=dz)
                d_seen = (
                    term.facade.times_back(dz.to(dtype), weight)
                    .to(out)
                    .addmm_(through_b, term.a_cast.to(out))
                )
                d_seen = d_seen.view(shape).to(seen_dtype)
            if ctx.needs_input_grad[1]:
                d_base = term.facade.times_back(dy.to(dtype), weight).view(shape).to(ctx.base_dtype)
        return d_seen, d_base, None, None, *of_trained


def _trained_gradients(
    ctx: Any, x: Tensor, dy: Tensor, through_b: Tensor, of_c: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of A, B and the magnitude.

    Args:
        through_b: c s dy B.
        of_c: what c gets through the base; overwritten.
    """
    term, magnitude = ctx.term, _magnitude(ctx.term).weight
    outer = dy.T @ (x @ term.a_cast.to(x.dtype).T)
    of_c += term.scaling * (outer * term.b_cast).sum(1, dtype=of_c.dtype)
    return (
        (through_b.T @ x).to(term.a.dtype),
        (outer * (ctx.c * term.scaling)[:, None]).to(term.b.dtype),
        (of_c / ctx.norm).to(magnitude.dtype),
    )


def _norms_and_factors(term: LoraTerm, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the norms and c; a recomputation has those of the pass that it repeats."""
    magnitude = _magnitude(term)
    if magnitude.made is None or not is_recomputing():
        norms = _row_norms(term, weight)
        magnitude.made = norms, magnitude.weight / norms
    return magnitude.made


def _row_norms(term: LoraTerm, weight: Tensor) -> Tensor:
    """Return ‖W + s B A‖ of each row from its square: ‖w‖² + 2 s (W Aᵀ) · b + s² bᵀ (A Aᵀ) b.

    [out_features], in float32 or better; A and B are taken as the products get them.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    magnitude, s = _magnitude(term), term.scaling
    if magnitude.squares is None:
        magnitude.squares = torch.linalg.vector_norm(weight, dim=1, dtype=dtype).square_()
    a, b = term.a_cast.to(weight.dtype), term.b_cast.to(weight.dtype).to(dtype)
    of_a = a.to(dtype)
    linear = weight @ a.T  # rounded to the weight's dtype, as every product with it
    twice = linear.to(dtype).mul_(2 * s).addmm_(b, of_a @ of_a.T, alpha=s * s)
    return twice.mul_(b).sum(1).add_(magnitude.squares).sqrt_()


def _product(x: Tensor, weight: Tensor, term: LoraTerm) -> Tensor:
    """Return x Wᵀ, computed in the dtype of the weight and returned in that of x."""
    return term.facade.times(x.to(weight.dtype), weight).to(x.dtype)


def _magnitude(term: LoraTerm) -> Magnitude:
    assert term.magnitude is not None
    return term.magnitude
