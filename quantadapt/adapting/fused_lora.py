"""LoRA over facades as one autograd function: y = x Wᵀ + s (x Aᵀ) Bᵀ.

Backward needs x and nothing else: the weight is dequantized again instead of being kept, and x Aᵀ,
which is small, is kept where no recomputation comes between. A and B stay in their own precision
(float32 masters) and are cast inside. Layers that get the same x (query, key and value; gate and
up) are one function, which reads x once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..compiling import has_triton
from ..facade import QuantLinear, comes_again, kept, lora_change, taken

HALF = (torch.bfloat16, torch.float16)
MOST_RANKS = 128
"""Kernels for one token hold this many ranks of a block of rows in registers."""


@dataclass
class Magnitude:
    """DoRA's part of a layer: its trained magnitudes [out_features], and Σ W² of each row.

    The base is frozen, so `squares` is computed once for as long as this object lives: a training
    run, or else a single pass. `made` are norms and factors of the latest pass.
    """

    weight: Tensor
    squares: Tensor | None = None
    made: tuple[Tensor, Tensor] | None = None


class LoraTerm(NamedTuple):
    """One layer: its frozen base, A [r, in_features], B [out_features, r] and the factor.

    `a_cast` and `b_cast` are A and B in the dtype of the computation, or as they are. With a
    magnitude it is DoRA. One that `rounds` computes with the weight that a merge keeps, in place of
    base and adapter. Factors that are `made` in a pass are saved as autograd's tensors are: a
    layer that is recomputed makes them again, and what else a node holds would stay.
    """

    facade: QuantLinear
    a: Tensor
    b: Tensor
    scaling: float
    a_cast: Tensor
    b_cast: Tensor
    magnitude: Magnitude | None = None
    rounds: bool = False
    made: bool = False

    def without_made(self) -> LoraTerm:
        """Return the term as a node of autograd holds it."""
        if not self.made:
            return self
        none: Any = None
        return self._replace(a=none, b=none, a_cast=none, b_cast=none)

    def change(self) -> Tensor | None:
        """Return scaling B A in float32 where it is rounded together with the base."""
        if not self.rounds:
            return None
        with no_autocast(self.a.device.type):
            return lora_change(self.a.detach().float(), self.b.detach().float(), self.scaling)


def fused_lora(x: Tensor, dropped: Tensor | None, terms: Sequence[LoraTerm]) -> tuple[Tensor, ...]:
    """Return x Wᵀ + bias + scaling (dropped Aᵀ) Bᵀ of each term.

    Args:
        x: [..., in_features].
        dropped: x after dropout, which only the adapters see; None if there is none.
        terms: the layers; all get the same x, and all round or none; those that do, without
            dropout.
    """
    if not torch.is_grad_enabled():
        return _outputs(x, dropped, terms)[0]
    x, keeper = kept(x, *_made(terms))
    weights = [weight for term in terms for weight in (term.a, term.b)]
    outputs: tuple[Tensor, ...] = _FusedLora.apply(x, dropped, terms, keeper, *weights)  # type: ignore[no-untyped-call]
    return outputs


class _FusedLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        terms: Sequence[LoraTerm],
        keeper: Any,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        outputs, low = _outputs(x, dropped, terms)
        # No autograd's: what is saved there would be another where layers are computed together.
        ctx.low = None if comes_again() or any(term.made for term in terms) else low
        ctx.keeper, ctx.dtypes = keeper, (x.dtype, outputs[0].dtype)
        ctx.of_weights = [weight.dtype for weight in weights]
        ctx.terms = [term.without_made() for term in terms]
        ctx.set_materialize_grads(False)
        ctx.has_dropped = dropped is not None
        saved = () if keeper is not None else (x, *_made(terms))
        ctx.save_for_backward(*saved, *(() if dropped is None else (dropped,)))
        return outputs

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        saved = list(taken(ctx))
        dropped = saved.pop() if ctx.has_dropped else None
        x, *made = saved if ctx.keeper is None else taken(ctx.keeper)
        saved.clear()
        shape, (x_dtype, dtype) = x.shape, ctx.dtypes
        used = [i for i, grad in enumerate(grads) if grad is not None]
        all_terms = _with(made, ctx.terms)
        terms = [all_terms[i] for i in used]
        dys = [flat(grads[i], dtype) for i in used]  # type: ignore[arg-type]
        with no_autocast(x.device.type):
            seen = flat(x if dropped is None else dropped, dtype)
            a = _stacked_a(terms, dtype)
            g = torch.cat([_through_b(dy, term) for dy, term in zip(dys, terms, strict=True)], 1)
            low, ctx.low = ctx.low, None
            low = _through_a(seen, all_terms, dtype) if low is None else low
            parts = _split(low, all_terms)
            of_a = _split(_product(g.T, seen, ctx.of_weights[0]), terms, dim=0)
            of_weights: list[Tensor | None] = [None] * (2 * len(ctx.terms))
            for i, dy, da in zip(used, dys, of_a, strict=True):
                at_a, at_b = 2 * i, 2 * i + 1
                of_weights[at_a] = da.to(ctx.of_weights[at_a])
                of_weights[at_b] = _product(dy.T, parts[i], ctx.of_weights[at_b])
            d_dropped = None if dropped is None else (g @ a).view(shape).to(dropped.dtype)
            del x, seen, saved, dropped, low, parts  # before dx, which is as large, needs memory
            adapters = (g, a) if d_dropped is None and not terms[0].rounds else None
            dx = _input_gradient(terms, dys, adapters) if ctx.needs_input_grad[0] else None
        dx = None if dx is None else dx.view(shape).to(x_dtype)
        return dx, d_dropped, None, None, *of_weights


def _made(terms: Sequence[LoraTerm]) -> list[Tensor]:
    """Return the factors that were made for this pass, as they are multiplied with."""
    return [cast for term in terms if term.made for cast in (term.a_cast, term.b_cast)]


def _with(made: Iterable[Tensor], terms: Sequence[LoraTerm]) -> list[LoraTerm]:
    """Return the terms with what `_made` returned of them."""
    left = iter(made)
    return [t._replace(a_cast=next(left), b_cast=next(left)) if t.made else t for t in terms]


def _outputs(
    x: Tensor, dropped: Tensor | None, terms: Sequence[LoraTerm]
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Return the outputs, and what `_through_a` returns where that was made."""
    facades = [term.facade for term in terms]
    if not terms[0].rounds and all(facade.multiplies_dense(x) for facade in facades):
        return _onto_adapters(x, dropped, terms)
    rows = next((f.rows_of(x) for f in facades if f.in_float8 and not f.rounds_activations), None)
    outputs = [term.facade.vendor_forward(x, term.change(), rows) for term in terms]
    del rows
    if terms[0].rounds:
        return tuple(map(own, outputs)), None
    dtype = outputs[0].dtype
    if dropped is None and _is_one_token(x, terms):
        return tuple(map(partial(_added_to_one_token, x), outputs, terms)), None
    with no_autocast(x.device.type):
        low = _through_a(flat(x if dropped is None else dropped, dtype), terms, dtype)
        return tuple(map(_add, outputs, _split(low, terms), terms)), low


def _onto_adapters(
    x: Tensor, dropped: Tensor | None, terms: Sequence[LoraTerm]
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return the same, each output begun as the adapter's part: a product reads what it is added to
    on its way, which a pass of its own for the adapter takes longer for."""
    dtype = _dtype_of(x)
    outputs = []
    with no_autocast(x.device.type):
        rows = flat(x, dtype)
        low = _through_a(rows if dropped is None else flat(dropped, dtype), terms, dtype)
        for part, term in zip(_split(low, terms), terms, strict=True):
            y = term.facade.add_product(rows, partial(_adapters_part, part, term))
            outputs.append(own(y.view(*x.shape[:-1], y.shape[-1])))
    return tuple(outputs), low


def _dtype_of(x: Tensor) -> torch.dtype:
    """Return the dtype in which x is multiplied: its own, or that of autocast."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _adapters_part(low: Tensor, term: LoraTerm) -> Tensor:
    """Return the bias and what the adapter makes of `low`."""
    bias, b = term.facade.bias, term.b_cast.to(low.dtype).T
    return low @ b if bias is None else torch.addmm(bias.to(low.dtype), low, b)


def _is_one_token(x: Tensor, terms: Sequence[LoraTerm]) -> bool:
    """Say whether x is one token, and the adapters are such that our kernels add them."""
    if not x.is_cuda or x.numel() != x.shape[-1] or not has_triton():
        return False
    return all(
        t.a_cast.is_contiguous() and t.b_cast.is_contiguous() and len(t.a_cast) <= MOST_RANKS
        for t in terms
    )


def _added_to_one_token(x: Tensor, y: Tensor, term: LoraTerm) -> Tensor:
    from .triton_lora import add_to_one_token

    y = y.contiguous()
    add_to_one_token(y.view(-1), x.reshape(-1), term.a_cast, term.b_cast, term.scaling)
    return own(y)


def _through_a(rows: Tensor, terms: Sequence[LoraTerm], dtype: torch.dtype) -> Tensor:
    """Return scaling x Aᵀ of each term, [tokens, sum of the ranks]."""
    low = rows @ _stacked_a(terms, dtype).T
    if len({term.scaling for term in terms}) == 1:
        return _scaled(low, terms[0].scaling)
    for part, term in zip(_split(low, terms), terms, strict=True):
        _scaled(part, term.scaling)
    return low


def _split(stacked: Tensor, terms: Sequence[LoraTerm], dim: int = 1) -> tuple[Tensor, ...]:
    """Return the part of each term."""
    return stacked.split_with_sizes([term.a_cast.shape[0] for term in terms], dim)


def _stacked_a(terms: Sequence[LoraTerm], dtype: torch.dtype) -> Tensor:
    """Return the A of all terms, one below the other: [sum of the ranks, in_features]."""
    if len(terms) == 1:
        return terms[0].a_cast.to(dtype)
    return torch.cat([term.a_cast for term in terms]).to(dtype)


def _add(y: Tensor, low: Tensor, term: LoraTerm) -> Tensor:
    """Add the adapter's part to the base's output, in place."""
    y = y if y.is_contiguous() else y.contiguous()
    y.view(-1, y.shape[-1]).addmm_(low, term.b_cast.to(y.dtype).T)
    return own(y)


def own(y: Tensor) -> Tensor:
    """Return `y` as no view: autograd forbids in-place changes of one that was made in here."""
    return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y


def _through_b(dy: Tensor, term: LoraTerm) -> Tensor:
    """Return scaling dy B, the gradient of x Aᵀ: [tokens, r]."""
    return _scaled(dy @ term.b_cast.to(dy.dtype), term.scaling)


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x.mul_(factor)


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return left right in `dtype`: float32 as it is summed, where a GPU gives that."""
    if left.is_cuda and dtype == torch.float32 and left.dtype in HALF:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)


def _input_gradient(
    terms: Sequence[LoraTerm], dys: Sequence[Tensor], adapters: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Return Σ dy W, the gradient through the bases, and with `adapters` the product of its two,
    the gradient through the adapters: [tokens, in_features]."""
    last = terms[0].facade.in_float8  # whose products are added to nothing
    begin = None if adapters is None or last else partial(torch.mm, *adapters)
    dx = None
    for term, dy in zip(terms, dys, strict=True):
        dx = term.facade.gradient(dy, dx, term.change(), begin if dx is None else None)
    assert dx is not None
    return dx.addmm_(*adapters) if adapters is not None and last else dx


def no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Switch autocast off inside, where it is on."""
    on = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if on else nullcontext()


def flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x as [tokens, features] in `dtype`."""
    return x.reshape(-1, x.shape[-1]).to(dtype)
