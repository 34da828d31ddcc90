"""Products by expert: tokens sorted by expert, one product for all of them.

On CUDA all experts are one product (`torch._grouped_mm`), elsewhere a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import frexp
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..compiling import has_triton

ALIGNED = 8
"""Numbers of two bytes in 16, of which `torch._grouped_mm` wants all rows to be made."""


class Routing(NamedTuple):
    """Which rows are whose. A row is one token in one of its experts; rows are sorted by expert,
    and those of no expert come last.

    Attributes:
        token: int64 [rows], the token of each row.
        row: int64 [tokens, k], where the rows of each token are.
        expert: int16 or int64 [rows]; the number of experts where it is none.
        ends: int32 [experts], where the rows of each expert end.
    """

    token: Tensor
    row: Tensor
    expert: Tensor
    ends: Tensor

    @classmethod
    def of(cls, index: Tensor, experts: int) -> Routing:
        """Sort `index`, int64 [tokens, k], the experts of each token; those from `experts` on are
        none. Waits for no device."""
        # Each byte of what is sorted is a pass.
        small = torch.int16 if experts < 2**15 else torch.int64
        expert, order = torch.sort(index.reshape(-1).clamp(max=experts).to(small), stable=True)
        kinds = torch.arange(experts, device=index.device, dtype=small)
        ends = torch.searchsorted(expert, kinds, right=True).to(torch.int32)
        row = torch.empty_like(order)
        row[order] = torch.arange(len(order), device=order.device)
        return cls(order // index.shape[1], row.view(index.shape), expert, ends)

    def by_row(self, of_tokens: Tensor) -> Tensor:
        """Return [tokens, k] as [rows]."""
        found = of_tokens.new_empty(of_tokens.numel())
        found[self.row.view(-1)] = of_tokens.reshape(-1)
        return found

    def by_token(self, of_rows: Tensor) -> Tensor:
        """Return [rows] as [tokens, k]."""
        return of_rows[self.row]

    def is_routed(self) -> Tensor:
        """Say of each row whether it is an expert's: bool [rows, 1]."""
        return (self.expert < len(self.ends)).unsqueeze(-1)


class StackLora(NamedTuple):
    """LoRA on a stack of experts, as PEFT keeps it.

    Attributes:
        a: [experts * r, in_features].
        b: [out_features, r * experts], the experts of each rank beside each other.
        scaling: the factor.
        experts: how many there are.
        magnitude: DoRA's, [experts, out_features]; None of a plain LoRA.
        rounds: whether the stack computes with the weight that a merge keeps, in place of base and
            adapter.
    """

    a: Tensor
    b: Tensor
    scaling: float
    experts: int
    magnitude: Tensor | None = None
    rounds: bool = False

    @property
    def trained(self) -> tuple[Tensor, ...]:
        """What of it is trained: A, B and the magnitudes."""
        return (self.a, self.b) if self.magnitude is None else (self.a, self.b, self.magnitude)

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[0] // self.experts

    def views(self) -> tuple[Tensor, Tensor]:
        """Return A as [experts, r, in_features] and B as [experts, out_features, r]."""
        a = self.a.view(self.experts, -1, self.a.shape[1])
        return a, self.b.view(self.b.shape[0], -1, self.experts).permute(2, 0, 1)

    def by_expert(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the two of `views`, contiguous, in `dtype`, with ranks of zeros added where
        grouped products want them."""
        a, b = self.a.detach(), self.b.detach()
        added = -self.rank % ALIGNED if is_one_product(a.device, dtype) else 0
        by_rank = b.new_empty(self.experts, b.shape[0], self.rank, dtype=dtype)
        transpose(b.view(-1, self.experts), by_rank.view(self.experts, -1))
        a = a.to(dtype).view(self.experts, self.rank, -1)
        if added:
            return pad(a, (0, 0, 0, added)), pad(by_rank, (0, added))
        return a, by_rank

    def change(self) -> Tensor | None:
        """Return what is added to the tall weight, [experts * out_features, in_features] in
        float32, where it is rounded together with the base."""
        if not self.rounds:
            return None
        with torch.autocast(self.a.device.type, enabled=False):
            a, b = (part.detach().float() for part in self.views())
            return lora_change(a, b, self.scaling).flatten(0, 1)

    def scaled(self, h: Tensor) -> Tensor:
        """Return h times the factor, in its memory."""
        return h if self.scaling == 1 else h.mul_(self.scaling)

    def gradients(self, da: Tensor, db: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of `a` and `b`, of those of the two of `by_expert`."""
        made = torch.empty_like(self.b, memory_format=torch.contiguous_format)
        transpose(db[:, :, : self.rank].reshape(self.experts, -1), made.view(-1, self.experts))
        return da[:, : self.rank].to(self.a.dtype).reshape(self.a.shape), made


def lora_change(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return scaling * (b @ a), bit for bit as PEFT merges it. A power of two, as usual, goes into
    the small `b`, which spares a pass through the result."""
    if frexp(scaling)[0] == 0.5:
        return (b * scaling) @ a
    return (b @ a).mul_(scaling)


def transpose(x: Tensor, made: Tensor) -> None:
    """Write x [m, n] into `made` [n, m], in its dtype; both contiguous."""
    if x.is_cuda and has_triton():
        from .triton_experts import transposed

        transposed(x, made)
    else:
        made.copy_(x.t())


def is_one_product(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether all groups can be one product."""
    return device.type == "cuda" and dtype is torch.bfloat16


def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Return x times the weight of each row's group.

    Args:
        x: [rows, n], sorted by group.
        weight: [groups, n, m].
        ends: int32 [groups], where the rows of each group end.

    Returns:
        [rows, m]. Rows behind the last group are not set on CUDA, and 0 elsewhere.
    """
    if is_one_product(x.device, x.dtype) and not (
        x.shape[1] % ALIGNED or weight.shape[2] % ALIGNED
    ):
        product: Tensor = torch._grouped_mm(x, weight, offs=ends)
        return product
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return torch.cat([part for _, part in _by_group(x, weight, ends)])
    made = x.new_empty(x.shape[0], weight.shape[2])
    for rows, part in _by_group(x, weight, ends):
        made[rows] = part
    return made


def _by_group(x: Tensor, weight: Tensor, ends: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield which rows each group has, and what it makes of them; of the rows behind them zeros."""
    start = 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            yield slice(start, end), x[start:end] @ weight[group]
        start = end
    yield slice(start, None), x.new_zeros(x.shape[0] - start, weight.shape[2])


def grouped_in_parts(
    x: Tensor, ends: Tensor, size: int, columns: int, weight: Callable[[int, int], Tensor]
) -> Tensor:
    """As `grouped`, with the weights of `size` groups there at a time. Waits for the device, as it
    has to be known whose rows are where.

    Args:
        columns: m.
        weight: returns the weights of the groups from its first argument to before its second.
    """
    stops = ends.tolist()
    made, start = x.new_empty(x.shape[0], columns), 0
    for first in range(0, len(stops), size):
        last = min(first + size, len(stops))
        stop = stops[last - 1]
        if stop > start:
            own = ends[first:last] - start
            made[start:stop] = grouped(x[start:stop], weight(first, last), own)
        start = stop
    made[start:].zero_()
    return made


def grouped_outer(y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """Return yᵀ x over the rows of each group: [groups, m, n], of [rows, m] and [rows, n]."""
    if is_one_product(x.device, x.dtype) and not (y.shape[1] % ALIGNED or x.shape[1] % ALIGNED):
        product: Tensor = torch._grouped_mm(y.t(), x, offs=ends)
        return product
    made = x.new_zeros(len(ends), y.shape[1], x.shape[1])
    start = 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            torch.mm(y[start:end].t(), x[start:end], out=made[group])
        start = end
    return made
