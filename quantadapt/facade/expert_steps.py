"""What stands between the products of experts, each in one pass through the rows: the gate with
LoRA, bias and routing weights, its backward, and the sum over the experts of each token.

In plain torch, or by Triton's kernels on CUDA. LoRA comes as (x Aᵀ) and B, so that its product is
made where the rows are read anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..compiling import has_triton
from .grouped import Routing, grouped

MOST_RANKS = 128
"""With more, LoRA is a product of its own."""


class Gate(NamedTuple):
    """g σ(alpha g) (u + offset), with g at most `limit` and u within ± `limit`.

    Attributes:
        interleaved: whether g and u take turns; otherwise g is the first half.
    """

    interleaved: bool
    alpha: float
    limit: float
    offset: float

    def __call__(self, y: Tensor) -> Tensor:
        """Return it of [..., 2n]: [..., n]."""
        g, u = (y[..., ::2], y[..., 1::2]) if self.interleaved else y.chunk(2, -1)
        g, u = g.clamp(max=self.limit), u.clamp(-self.limit, self.limit)
        return g * torch.sigmoid(self.alpha * g) * (u + self.offset)

    @classmethod
    def of(cls, experts: Any) -> Gate | None:
        """Return the one that `experts` has; None where it is something else. Found by trying."""
        if experts not in _gates:
            _gates[experts] = cls._found(experts)
        return _gates[experts]

    @classmethod
    def _found(cls, experts: Any) -> Gate | None:
        function = getattr(experts, "act_fn", None)
        weights = isinstance(function, torch.nn.Module) and any(True for _ in function.parameters())
        if not experts.has_gate or weights:
            return None
        y = torch.linspace(-9, 9, 64).view(4, 16).sin() * 12
        with torch.no_grad():
            expected = experts._apply_gate(y)
        numbers = [getattr(experts, name, None) for name in ("alpha", "limit")]
        alphas, limits = (
            {usual, *([float(n)] if isinstance(n, (int, float)) else [])}
            for usual, n in zip((1.0, float("inf")), numbers, strict=True)
        )
        for interleaved, alpha, limit, offset in product((False, True), alphas, limits, (0.0, 1.0)):
            gate = cls(interleaved, alpha, limit, offset)
            made = gate(y)
            if made.shape == expected.shape and torch.allclose(made, expected, atol=1e-5):
                return gate
        return None


_gates: WeakKeyDictionary[Any, Gate | None] = WeakKeyDictionary()


class Added(NamedTuple):
    """What LoRA adds to rows: h Bᵀ, with h [rows, r] and B [experts, out_features, r]."""

    h: Tensor
    b: Tensor

    def product(self, ends: Tensor) -> Tensor:
        """Return it, [rows, out_features]."""
        return grouped(self.h, self.b.transpose(1, 2), ends)


def add(y: Tensor, added: Added | None, routing: Routing) -> Tensor:
    """Return y [rows, out_features] and what LoRA adds to it, in its memory."""
    if added is None:
        return y
    if _kernels(y, added):
        from .triton_experts import add

        return add(y, added, routing)
    return y.add_(added.product(routing.ends))


def gated(
    experts: Any,
    y: Tensor,
    bias: Tensor | None,
    added: Added | None,
    share: Tensor,
    routing: Routing,
) -> Tensor:
    """Return the gate's output times the routing weights: [rows, intermediate]; 0 in rows of none.

    Args:
        experts: the module; says what the gate is.
        y: [rows, out_features], what the first stack makes of the rows.
        bias: [experts, out_features].
        added: what LoRA adds to y.
        share: [rows], the routing weights.
    """
    gate = Gate.of(experts)
    if gate is not None and _kernels(y, added):
        from .triton_experts import gated

        return gated(gate, y, bias, added, share, routing)
    made = _activation(experts, gate)(_whole(y, bias, added, routing))
    return torch.where(routing.is_routed(), made * share.unsqueeze(-1), 0).to(y.dtype)


def gated_backward(
    experts: Any,
    y: Tensor,
    bias: Tensor | None,
    added: Added | None,
    share: Tensor,
    routing: Routing,
    dz: Tensor,
    d_added: Added | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dy, z, d_share) where z is what `gated` returns of the same. The memory of y and dz
    is used again.

    Args:
        dz: [rows, intermediate], the gradient of z.
        d_added: what LoRA on the second stack adds to dz.

    Returns:
        dy [rows, out_features]; z [rows, intermediate]; d_share float32 [rows].
    """
    gate = Gate.of(experts)
    if gate is not None and _kernels(y, added, d_added):
        from .triton_experts import gated_backward

        return gated_backward(gate, y, bias, added, share, routing, dz, d_added)
    routed = routing.is_routed()
    dz = torch.where(routed, add(dz, d_added, routing), 0)
    with torch.enable_grad():
        whole = torch.where(routed, _whole(y, bias, added, routing), 0).requires_grad_()
        made = _activation(experts, gate)(whole)
    d_share = (dz.float() * made.detach().float()).sum(-1)
    share = share.unsqueeze(-1)
    (dy,) = torch.autograd.grad(made, whole, (dz * share).to(made.dtype))
    z = torch.where(routed, made.detach() * share, 0).to(y.dtype)
    return dy.to(y.dtype), z, d_share


def combined(y: Tensor, routing: Routing) -> Tensor:
    """Return the sum over the rows of each token: [rows, n] -> [tokens, n]."""
    if _kernels(y):
        from .triton_experts import combined

        return combined(y, routing)
    y = torch.where(routing.is_routed(), y, 0)
    return y[routing.row].sum(1)


def _whole(y: Tensor, bias: Tensor | None, added: Added | None, routing: Routing) -> Tensor:
    """Return y with what LoRA adds to it, and the bias of each row's expert."""
    if added is not None:
        y = y + added.product(routing.ends)
    if bias is not None:
        y = y + bias[routing.expert.clamp(max=len(bias) - 1).long()].to(y.dtype)
    return y


def _activation(experts: Any, gate: Gate | None) -> Callable[[Tensor], Tensor]:
    if gate is not None:
        return gate.__call__
    found: Callable[[Tensor], Tensor] = experts._apply_gate if experts.has_gate else experts.act_fn
    return found


def _kernels(y: Tensor, *added: Added | None) -> bool:
    """Say whether Triton's kernels are used."""
    small = all(part is None or part.h.shape[1] <= MOST_RANKS for part in added)
    return y.is_cuda and y.dtype is torch.bfloat16 and small and has_triton()
