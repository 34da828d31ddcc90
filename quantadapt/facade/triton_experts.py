"""The steps of `expert_steps` as kernels. Rows are sorted by expert: a block of them goes through
the experts that it has rows of, mostly one or two."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from .expert_steps import Added, Gate
    from .grouped import Routing

ROWS = 32
COLUMNS = 64
WIDE = 128
SIZE = 64


@triton.jit  # type: ignore[untyped-decorator]
def _kinds(expert, at, rows, experts):  # type: ignore[no-untyped-def]
    """Return the expert of each row, and the first and the last of a block of rows."""
    kinds = tl.load(expert + at, mask=at < rows, other=experts).to(tl.int32)
    first = tl.min(kinds, axis=0)
    last = tl.max(tl.where(kinds < experts, kinds, -1), axis=0)
    return kinds, first, last


@triton.jit  # type: ignore[untyped-decorator]
def _whole(  # type: ignore[no-untyped-def]
    y,
    columns,
    h,
    stride_h,
    b,
    stride_e,
    stride_n,
    stride_r,
    ranks,
    bias,
    at,
    at_n,
    within,
    kinds,
    first,
    last,
    rows,
    R: tl.constexpr,  # noqa: N803
    HAS_BIAS: tl.constexpr,  # noqa: N803
):
    """Return y, with what LoRA adds to it, and the bias: float32, rows `at`, columns `at_n` where
    `within`."""
    mask = (at < rows)[:, None] & within[None, :]
    made = tl.load(y + at[:, None] * columns + at_n[None, :], mask=mask, other=0.0).to(tl.float32)
    if R:
        at_r = tl.arange(0, R)
        mask = (at < rows)[:, None] & (at_r < ranks)[None, :]
        left = tl.load(h + at[:, None] * stride_h + at_r[None, :], mask=mask, other=0.0)
        mask = (at_r < ranks)[:, None] & within[None, :]
        inner = b + at_n[None, :] * stride_n + at_r[:, None] * stride_r
        for kind in range(first, last + 1):
            right = tl.load(inner + kind * stride_e, mask=mask, other=0.0)
            own = tl.where((kinds == kind)[:, None], left, 0.0).to(right.dtype)
            made += tl.dot(own, right)
    if HAS_BIAS:
        for kind in range(first, last + 1):
            own = tl.load(bias + kind * columns + at_n, mask=within, other=0.0).to(tl.float32)
            made += tl.where((kinds == kind)[:, None], own[None, :], 0.0)
    return made


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
    kinds, first, last = _kinds(expert, at, rows, experts)
    made = _whole(
        y, columns, h, stride_h, b, stride_e, stride_n, stride_r, ranks, y,
        at, at_n, at_n < columns, kinds, first, last, rows, R, False,
    )  # fmt: skip
    mask = (at < rows)[:, None] & (at_n < columns)[None, :]
    tl.store(y + at[:, None] * columns + at_n[None, :], made.to(y.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _halves(  # type: ignore[no-untyped-def]
    y,
    h,
    stride_h,
    b,
    stride_e,
    stride_n,
    stride_r,
    ranks,
    bias,
    at,
    start,
    kinds,
    first,
    last,
    rows,
    columns,
    INTERLEAVED: tl.constexpr,  # noqa: N803
    R: tl.constexpr,  # noqa: N803
    HAS_BIAS: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    """Return what the gate takes, g and u."""
    width = 2 * columns
    if INTERLEAVED:
        at_y = 2 * start + tl.arange(0, 2 * COLUMNS)
        made = _whole(
            y, width, h, stride_h, b, stride_e, stride_n, stride_r, ranks, bias,
            at, at_y, at_y < width, kinds, first, last, rows, R, HAS_BIAS,
        )  # fmt: skip
        g, u = tl.split(tl.reshape(made, (ROWS, COLUMNS, 2)))
    else:
        at_z = start + tl.arange(0, COLUMNS)
        g = _whole(
            y, width, h, stride_h, b, stride_e, stride_n, stride_r, ranks, bias,
            at, at_z, at_z < columns, kinds, first, last, rows, R, HAS_BIAS,
        )  # fmt: skip
        u = _whole(
            y, width, h, stride_h, b, stride_e, stride_n, stride_r, ranks, bias,
            at, at_z + columns, at_z < columns, kinds, first, last, rows, R, HAS_BIAS,
        )  # fmt: skip
    return g, u


@triton.jit  # type: ignore[untyped-decorator]
def _gated(  # type: ignore[no-untyped-def]
    z,
    y,
    h,
    stride_h,
    b,
    stride_e,
    stride_n,
    stride_r,
    bias,
    share,
    expert,
    experts,
    rows,
    columns,
    ranks,
    alpha,
    limit,
    offset,
    INTERLEAVED: tl.constexpr,  # noqa: N803
    R: tl.constexpr,  # noqa: N803
    HAS_BIAS: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * COLUMNS
    kinds, first, last = _kinds(expert, at, rows, experts)
    g, u = _halves(
        y, h, stride_h, b, stride_e, stride_n, stride_r, ranks, bias,
        at, start, kinds, first, last, rows, columns, INTERLEAVED, R, HAS_BIAS, ROWS, COLUMNS,
    )  # fmt: skip
    g = tl.minimum(g, limit)
    u = tl.minimum(tl.maximum(u, -limit), limit)
    part = tl.load(share + at, mask=at < rows, other=0.0).to(tl.float32)
    made = g * tl.sigmoid(alpha * g) * (u + offset) * part[:, None]
    made = tl.where((kinds < experts)[:, None], made, 0.0)
    at_z = start + tl.arange(0, COLUMNS)
    mask = (at < rows)[:, None] & (at_z < columns)[None, :]
    tl.store(z + at[:, None] * columns + at_z[None, :], made.to(z.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _gated_backward(  # type: ignore[no-untyped-def]
    z,
    y,
    h,
    stride_h,
    b,
    stride_e,
    stride_n,
    stride_r,
    dh,
    stride_dh,
    db,
    stride_de,
    stride_dn,
    stride_dr,
    bias,
    share,
    d_share,
    expert,
    experts,
    rows,
    columns,
    ranks,
    d_ranks,
    alpha,
    limit,
    offset,
    INTERLEAVED: tl.constexpr,  # noqa: N803
    R: tl.constexpr,  # noqa: N803
    DR: tl.constexpr,  # noqa: N803
    HAS_BIAS: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    """`z` holds dz and gets z, `y` gets dy, `d_share` [column blocks, rows] its parts."""
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * COLUMNS
    kinds, first, last = _kinds(expert, at, rows, experts)
    g, u = _halves(
        y, h, stride_h, b, stride_e, stride_n, stride_r, ranks, bias,
        at, start, kinds, first, last, rows, columns, INTERLEAVED, R, HAS_BIAS, ROWS, COLUMNS,
    )  # fmt: skip
    at_z = start + tl.arange(0, COLUMNS)
    dz = _whole(
        z, columns, dh, stride_dh, db, stride_de, stride_dn, stride_dr, d_ranks, bias,
        at, at_z, at_z < columns, kinds, first, last, rows, DR, False,
    )  # fmt: skip
    part = tl.load(share + at, mask=at < rows, other=0.0).to(tl.float32)[:, None]
    below, between = g <= limit, (u <= limit) & (u >= -limit)
    g = tl.minimum(g, limit)
    u = tl.minimum(tl.maximum(u, -limit), limit) + offset
    s = tl.sigmoid(alpha * g)
    made = g * s
    mask = (at < rows)[:, None] & (at_z < columns)[None, :]
    used = mask & (kinds < experts)[:, None]
    total = tl.sum(tl.where(used, dz * made * u, 0.0), axis=1)
    dz = dz * part
    dg = tl.where(below & used, dz * u * s * (1 + alpha * g * (1 - s)), 0.0)
    du = tl.where(between & used, dz * made, 0.0)
    made = tl.where(used, made * u * part, 0.0)
    tl.debug_barrier()  # what was read is written over
    kind = z.dtype.element_ty
    tl.store(z + at[:, None] * columns + at_z[None, :], made.to(kind), mask=mask)
    row = y + at[:, None] * (2 * columns)
    if INTERLEAVED:
        at_y = 2 * start + tl.arange(0, 2 * COLUMNS)
        dy = tl.reshape(tl.join(dg, du), (ROWS, 2 * COLUMNS)).to(kind)
        mask = (at < rows)[:, None] & (at_y < 2 * columns)[None, :]
        tl.store(row + at_y[None, :], dy, mask=mask)
    else:
        tl.store(row + at_z[None, :], dg.to(kind), mask=mask)
        tl.store(row + columns + at_z[None, :], du.to(kind), mask=mask)
    tl.store(d_share + tl.program_id(1).to(tl.int64) * rows + at, total, mask=at < rows)


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


def add(y: Tensor, added: Added, routing: Routing) -> Tensor:
    """As `expert_steps.add`."""
    rows, columns = y.shape
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(columns, WIDE))
    if rows:
        _add[grid](y, *_lora(added), *_routing(routing), rows, columns, *_ranks(added), ROWS, WIDE)
    return y


def gated(
    gate: Gate,
    y: Tensor,
    bias: Tensor | None,
    added: Added | None,
    share: Tensor,
    routing: Routing,
) -> Tensor:
    """As `expert_steps.gated`, with its gate."""
    rows, columns = y.shape[0], y.shape[1] // 2
    z = y.new_empty(rows, columns)
    ranks, r = _ranks(added)
    if rows:
        _gated[(triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS))](
            *(z, y, *_lora(added), bias, share, *_routing(routing)),
            *(rows, columns, ranks, gate.alpha, gate.limit, gate.offset),
            *(gate.interleaved, r, bias is not None, ROWS, COLUMNS),
        )
    return z


def gated_backward(
    gate: Gate,
    y: Tensor,
    bias: Tensor | None,
    added: Added | None,
    share: Tensor,
    routing: Routing,
    dz: Tensor,
    d_added: Added | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `expert_steps.gated_backward`, with its gate."""
    rows, columns = dz.shape
    blocks = triton.cdiv(columns, COLUMNS)
    d_share = torch.empty(blocks, rows, dtype=torch.float32, device=y.device)
    (ranks, r), (d_ranks, dr) = _ranks(added), _ranks(d_added)
    if rows:
        _gated_backward[(triton.cdiv(rows, ROWS), blocks)](
            *(dz, y, *_lora(added), *_lora(d_added), bias, share, d_share),
            *(*_routing(routing), rows, columns, ranks, d_ranks),
            *(gate.alpha, gate.limit, gate.offset),
            *(gate.interleaved, r, dr, bias is not None, ROWS, COLUMNS),
        )
    return y, dz, d_share.sum(0)


def transposed(x: Tensor, made: Tensor) -> Tensor:
    """Write x [m, n], contiguous, into `made` [n, m], in its dtype."""
    rows, columns = x.shape
    _transposed[(triton.cdiv(rows, SIZE), triton.cdiv(columns, SIZE))](made, x, rows, columns, SIZE)
    return made


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


def _lora(added: Added | None) -> tuple[Any, ...]:
    """Return h and its stride, and B and its strides."""
    if added is None:
        return None, 0, None, 0, 0, 0
    return added.h, added.h.stride(0), added.b, *added.b.stride()


def _ranks(added: Added | None) -> tuple[int, int]:
    """Return how many ranks there are, and how many a product takes: 16 at least."""
    ranks = 0 if added is None else added.h.shape[1]
    return ranks, max(triton.next_power_of_2(ranks), 16) if ranks else 0


def _routing(routing: Routing) -> tuple[Tensor, int]:
    return routing.expert, len(routing.ends)

