"""What stands between the products of experts, each in one pass through the rows: the gate with
LoRA, bias and routing weights, its backward, and the sum over the experts of each token.

In plain torch, or by Triton's kernels on CUDA. LoRA comes as (x Aᵀ) and B, so that its product is
made where the rows are read anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..compiling import has_triton
from .grouped import Routing, grouped, is_one_product

MOST_RANKS = 128
"""With more, LoRA is a product of its own."""
BLOCK = {False: 2**18, True: 2**26}
"""Without Triton's kernels, so many bytes of rows are computed at a time: on a CPU what its caches
hold, on CUDA as many as are worth launching kernels for."""


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

    def onto(self, y: Tensor, ends: Tensor) -> Tensor:
        """Return y [rows, out_features] and it, in the memory of y."""
        start = 0
        for expert, end in enumerate(ends.tolist()):
            if end > start:  # of a few tokens most experts have none
                y[start:end].addmm_(self.h[start:end], self.b[expert].T)
            start = end
        return y


def add(y: Tensor, added: Added | None, routing: Routing) -> Tensor:
    """Return y [rows, out_features] and what LoRA adds to it, in its memory."""
    if added is None:
        return y
    if _kernels(y, added):
        from .triton_experts import add

        return add(y, added, routing)
    if is_one_product(y.device, y.dtype):
        return y.add_(grouped(added.h, added.b.transpose(1, 2), routing.ends))
    return added.onto(y, routing.ends)


def gated(
    experts: Any,
    y: Tensor,
    bias: Tensor | None,
    added: Added | None,
    share: Tensor,
    routing: Routing,
) -> Tensor:
    """Return the gate's output times the routing weights: [rows, intermediate]; 0 in rows of none.
    The memory of y is used again.

    Args:
        experts: the module; says what the gate is.
        y: [rows, out_features], what the first stack makes of the rows.
        bias: [experts, out_features].
        added: what LoRA adds to y.
        share: [rows], the routing weights.
    """
    gate = Gate.of(experts)
    if gate is not None and _kernels(y, added):
        from .triton_gates import gated

        return gated(gate, y, bias, added, share, routing)
    y, act, routed = add(y, added, routing), _activation(experts, gate), routing.is_routed()
    made: list[Tensor] = []
    for rows in _blocks(y):
        z = act(_with_bias(y, bias, rows, routing)) * share[rows].unsqueeze(-1)
        made = made or [y.new_empty(len(y), z.shape[1])]
        made[0][rows] = torch.where(routed[rows], z, 0).to(y.dtype)
    return made[0]


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
        from .triton_gates import gated_backward

        return gated_backward(gate, y, bias, added, share, routing, dz, d_added)
    y, dz = add(y, added, routing), add(dz, d_added, routing)
    act, routed = _activation(experts, gate), routing.is_routed()
    d_share = y.new_empty(len(y), dtype=torch.float32)
    for rows in _blocks(y):
        d_made, weight = torch.where(routed[rows], dz[rows], 0), share[rows].unsqueeze(-1)
        with torch.enable_grad():
            whole = torch.where(routed[rows], _with_bias(y, bias, rows, routing), 0)
            made = act(whole.requires_grad_())
        d_share[rows] = (d_made.float() * made.detach().float()).sum(-1)
        (dy,) = torch.autograd.grad(made, whole, (d_made * weight).to(made.dtype))
        y[rows] = dy.to(y.dtype)
        dz[rows] = torch.where(routed[rows], made.detach() * weight, 0).to(y.dtype)
    return y, dz, d_share


def combined(y: Tensor, routing: Routing) -> Tensor:
    """Return the sum over the rows of each token: [rows, n] -> [tokens, n]. Rows of no expert are
    set to 0."""
    if _kernels(y):
        from .triton_experts import combined

        return combined(y, routing)
    y, row = y.masked_fill_(~routing.is_routed(), 0), routing.row
    made = y.new_empty(len(row), y.shape[1])
    for tokens in _blocks(made, row.shape[1]):
        made[tokens] = y[row[tokens]].sum(1)
    return made


def _blocks(y: Tensor, times: int = 1) -> Iterator[slice]:
    """Yield slices of the rows of y, of so many that `times` what is in them makes a BLOCK: what is
    computed of them in several operations is there of a few rows at a time."""
    size = max(1, BLOCK[y.is_cuda] // (times * y.shape[1] * y.element_size()))
    for start in range(0, max(len(y), 1), size):
        yield slice(start, start + size)


def _with_bias(y: Tensor, bias: Tensor | None, rows: slice, routing: Routing) -> Tensor:
    """Return rows of y with the bias of each row's expert."""
    if bias is None:
        return y[rows]
    return y[rows] + bias[routing.expert[rows].clamp(max=len(bias) - 1).long()].to(y.dtype)


def _activation(experts: Any, gate: Gate | None) -> Callable[[Tensor], Tensor]:
    if gate is not None:
        return gate.__call__
    found: Callable[[Tensor], Tensor] = experts._apply_gate if experts.has_gate else experts.act_fn
    return found


def _kernels(y: Tensor, *added: Added | None) -> bool:
    """Say whether Triton's kernels are used."""
    small = all(part is None or part.h.shape[1] <= MOST_RANKS for part in added)
    return y.is_cuda and y.dtype is torch.bfloat16 and small and has_triton()
