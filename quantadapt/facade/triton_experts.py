"""The steps of `expert_steps` as kernels; those of gates are in `triton_gates`. Rows are sorted by
expert: a block of them goes through the experts that it has rows of, mostly one or two."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl
from torch import Tensor

from ..compiling import on_its_device

if TYPE_CHECKING:
    from .expert_steps import Added
    from .grouped import Routing

ROWS = 32
WIDE = 128
SIZE = 64
WARPS = 4


@triton.jit  # type: ignore[untyped-decorator]
def kinds_of(expert, at, rows, experts):  # type: ignore[no-untyped-def]
    """Return the expert of each row, and the first and the last of a block of rows."""
    kinds = tl.load(expert + at, mask=at < rows, other=experts).to(tl.int32)
    first = tl.min(kinds, axis=0)
    last = tl.max(tl.where(kinds < experts, kinds, -1), axis=0)
    return kinds, first, last


@triton.jit  # type: ignore[untyped-decorator]
def tile_of(y, columns, at, at_n, within, rows):  # type: ignore[no-untyped-def]
    """Return y at rows `at` and columns `at_n`: float32, 0 where not `within`."""
    mask = (at < rows)[:, None] & within[None, :]
    return tl.load(y + at[:, None] * columns + at_n[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def h_of(h, stride, at, rows, ranks, R: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    """Return rows `at` of h [rows, ranks]."""
    at_r = tl.arange(0, R)
    mask = (at < rows)[:, None] & (at_r < ranks)[None, :]
    return tl.load(h + at[:, None] * stride + at_r[None, :], mask=mask, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def b_of(  # type: ignore[no-untyped-def]
    b,
    stride_n,
    stride_r,
    at_n,
    within,
    ranks,
    R: tl.constexpr,  # noqa: N803
):
    """Return B of one expert, transposed, at columns `at_n`: [R, columns]."""
    at_r = tl.arange(0, R)
    mask = (at_r < ranks)[:, None] & within[None, :]
    return tl.load(b + at_n[None, :] * stride_n + at_r[:, None] * stride_r, mask=mask, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _add(  # type: ignore[no-untyped-def]
    y,
    h,
    stride_h,
    b,
    stride_e,
    stride_n,
    stride_r,
    expert,
    experts,
    rows,
    columns,
    ranks,
    R: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at_n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    within = at_n < columns
    made = tile_of(y, columns, at, at_n, within, rows)
    left = h_of(h, stride_h, at, rows, ranks, R)
    kinds, first, last = kinds_of(expert, at, rows, experts)
    for kind in range(first, last + 1):
        own = tl.where((kinds == kind)[:, None], left, 0.0).to(left.dtype)
        made += tl.dot(own, b_of(b + kind * stride_e, stride_n, stride_r, at_n, within, ranks, R))
    mask = (at < rows)[:, None] & within[None, :]
    tl.store(y + at[:, None] * columns + at_n[None, :], made.to(y.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _transposed(  # type: ignore[no-untyped-def]
    made,
    x,
    rows,
    columns,
    SIZE: tl.constexpr,  # noqa: N803
):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    at_n = tl.program_id(1).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    mask = (at < rows)[:, None] & (at_n < columns)[None, :]
    tile = tl.load(x + at[:, None] * columns + at_n[None, :], mask=mask, other=0.0)
    mask = (at_n < columns)[:, None] & (at < rows)[None, :]
    place = made + at_n[:, None] * rows + at[None, :]
    tl.store(place, tl.trans(tile).to(made.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _combined(  # type: ignore[no-untyped-def]
    output,
    y,
    row,
    ends,
    experts,
    columns,
    K: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    end = tl.load(ends + experts - 1)
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for i in range(K):
        place = tl.load(row + token * K + i)
        mask = at < tl.where(place < end, columns, 0)  # rows of no expert hold anything
        total += tl.load(y + place * columns + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(output + token * columns + at, total.to(y.dtype.element_ty), mask=at < columns)


@on_its_device
def add(y: Tensor, added: Added, routing: Routing) -> Tensor:
    """As `expert_steps.add`."""
    rows, columns = y.shape
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(columns, WIDE))
    if rows:
        _add[grid](
            y,
            *lora_of(added),
            *routing_of(routing),
            rows,
            columns,
            *ranks_of(added),
            ROWS,
            WIDE,
            num_warps=WARPS,
        )
    return y


@on_its_device
def transposed(x: Tensor, made: Tensor) -> Tensor:
    """Write x [m, n], contiguous, into `made` [n, m], in its dtype."""
    rows, columns = x.shape
    _transposed[(triton.cdiv(rows, SIZE), triton.cdiv(columns, SIZE))](made, x, rows, columns, SIZE)
    return made


@on_its_device
def combined(y: Tensor, routing: Routing) -> Tensor:
    """As `expert_steps.combined`."""
    (tokens, k), columns = routing.row.shape, y.shape[1]
    output = y.new_empty(tokens, columns)
    block = min(triton.next_power_of_2(columns), 2048)
    if tokens:
        _combined[(tokens, triton.cdiv(columns, block))](
            output, y, routing.row, routing.ends, len(routing.ends), columns, k, block
        )
    return output


def lora_of(added: Added | None) -> tuple[Any, ...]:
    """Return h and its stride, and B and its strides."""
    if added is None:
        return None, 0, None, 0, 0, 0
    return added.h, added.h.stride(0), added.b, *added.b.stride()


def ranks_of(added: Added | None) -> tuple[int, int]:
    """Return how many ranks there are, and how many a product takes: 16 at least."""
    ranks = 0 if added is None else added.h.shape[1]
    return ranks, max(triton.next_power_of_2(ranks), 16) if ranks else 0


def routing_of(routing: Routing) -> tuple[Tensor, int]:
    """Return the expert of each row, and how many experts there are."""
    return routing.expert, len(routing.ends)
