"""The steps of `expert_steps` as kernels. Rows are sorted by expert: a block of them goes through
the experts that it has rows of, mostly one or two."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compiling import on_its_device

if TYPE_CHECKING:
    from .expert_steps import Added, Gate
    from .grouped import Routing

ROWS = 32
COLUMNS = 64
WIDE = 128
SIZE = 64
WARPS = 4


@triton.jit  # type: ignore[untyped-decorator]
def _kinds(expert, at, rows, experts):  # type: ignore[no-untyped-def]
    """Return the expert of each row, and the first and the last of a block of rows."""
    kinds = tl.load(expert + at, mask=at < rows, other=experts).to(tl.int32)
    first = tl.min(kinds, axis=0)
    last = tl.max(tl.where(kinds < experts, kinds, -1), axis=0)
    return kinds, first, last


@triton.jit  # type: ignore[untyped-decorator]
def _tile(y, columns, at, at_n, within, rows):  # type: ignore[no-untyped-def]
    """Return y at rows `at` and columns `at_n`: float32, 0 where not `within`."""
    mask = (at < rows)[:, None] & within[None, :]
    return tl.load(y + at[:, None] * columns + at_n[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _h(h, stride, at, rows, ranks, R: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    """Return rows `at` of h [rows, ranks]."""
    at_r = tl.arange(0, R)
    mask = (at < rows)[:, None] & (at_r < ranks)[None, :]
    return tl.load(h + at[:, None] * stride + at_r[None, :], mask=mask, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _b(  # type: ignore[no-untyped-def]
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
    made = _tile(y, columns, at, at_n, within, rows)
    left = _h(h, stride_h, at, rows, ranks, R)
    kinds, first, last = _kinds(expert, at, rows, experts)
    for kind in range(first, last + 1):
        own = tl.where((kinds == kind)[:, None], left, 0.0).to(left.dtype)
        made += tl.dot(own, _b(b + kind * stride_e, stride_n, stride_r, at_n, within, ranks, R))
    mask = (at < rows)[:, None] & within[None, :]
    tl.store(y + at[:, None] * columns + at_n[None, :], made.to(y.dtype.element_ty), mask=mask)


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
    at_z = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    within, width = at_z < columns, 2 * columns
    if INTERLEAVED:
        at_y = tl.program_id(1) * (2 * COLUMNS) + tl.arange(0, 2 * COLUMNS)
        within_y = at_y < width
        both = _tile(y, width, at, at_y, within_y, rows)
        g, u = 0.0, 0.0
    else:
        at_y, within_y, both = at_z, within, 0.0
        g = _tile(y, width, at, at_z, within, rows)
        u = _tile(y, width, at, at_z + columns, within, rows)
    if R:
        left = _h(h, stride_h, at, rows, ranks, R)
    part = tl.load(share + at, mask=at < rows, other=0.0).to(tl.float32)
    kinds, first, last = _kinds(expert, at, rows, experts)
    for kind in range(first, last + 1):
        mine = (kinds == kind)[:, None]
        if R:
            own, of_kind = tl.where(mine, left, 0.0).to(left.dtype), b + kind * stride_e
            if INTERLEAVED:
                both += tl.dot(own, _b(of_kind, stride_n, stride_r, at_y, within_y, ranks, R))
            else:
                g += tl.dot(own, _b(of_kind, stride_n, stride_r, at_z, within, ranks, R))
                of_u = of_kind + columns * stride_n
                u += tl.dot(own, _b(of_u, stride_n, stride_r, at_z, within, ranks, R))
        if HAS_BIAS:
            row = bias + kind * width
            if INTERLEAVED:
                own = tl.load(row + at_y, mask=within_y, other=0.0).to(tl.float32)
                both += tl.where(mine, own[None, :], 0.0)
            else:
                own = tl.load(row + at_z, mask=within, other=0.0).to(tl.float32)
                g += tl.where(mine, own[None, :], 0.0)
                own = tl.load(row + columns + at_z, mask=within, other=0.0).to(tl.float32)
                u += tl.where(mine, own[None, :], 0.0)
    if INTERLEAVED:
        g, u = tl.split(tl.reshape(both, (ROWS, COLUMNS, 2)))
    g = tl.minimum(g, limit)
    u = tl.minimum(tl.maximum(u, -limit), limit)
    made = g * tl.sigmoid(alpha * g) * (u + offset) * part[:, None]
    made = tl.where((kinds < experts)[:, None], made, 0.0)
    mask = (at < rows)[:, None] & within[None, :]
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
    """`z` holds dz and gets z, `y` gets dy, `d_share` [column blocks, rows] its parts. Begins as
    `_gated`: a helper that returns either of two layouts is not to be had."""
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at_z = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    within, width = at_z < columns, 2 * columns
    dz = _tile(z, columns, at, at_z, within, rows)
    if INTERLEAVED:
        at_y = tl.program_id(1) * (2 * COLUMNS) + tl.arange(0, 2 * COLUMNS)
        within_y = at_y < width
        both = _tile(y, width, at, at_y, within_y, rows)
        g, u = 0.0, 0.0
    else:
        at_y, within_y, both = at_z, within, 0.0
        g = _tile(y, width, at, at_z, within, rows)
        u = _tile(y, width, at, at_z + columns, within, rows)
    if R:
        left = _h(h, stride_h, at, rows, ranks, R)
    if DR:
        d_left = _h(dh, stride_dh, at, rows, d_ranks, DR)
    part = tl.load(share + at, mask=at < rows, other=0.0).to(tl.float32)[:, None]
    kinds, first, last = _kinds(expert, at, rows, experts)
    for kind in range(first, last + 1):
        mine = (kinds == kind)[:, None]
        if R:
            own, of_kind = tl.where(mine, left, 0.0).to(left.dtype), b + kind * stride_e
            if INTERLEAVED:
                both += tl.dot(own, _b(of_kind, stride_n, stride_r, at_y, within_y, ranks, R))
            else:
                g += tl.dot(own, _b(of_kind, stride_n, stride_r, at_z, within, ranks, R))
                of_u = of_kind + columns * stride_n
                u += tl.dot(own, _b(of_u, stride_n, stride_r, at_z, within, ranks, R))
        if DR:
            d_own, of_kind = tl.where(mine, d_left, 0.0).to(d_left.dtype), db + kind * stride_de
            dz += tl.dot(d_own, _b(of_kind, stride_dn, stride_dr, at_z, within, d_ranks, DR))
        if HAS_BIAS:
            row = bias + kind * width
            if INTERLEAVED:
                own = tl.load(row + at_y, mask=within_y, other=0.0).to(tl.float32)
                both += tl.where(mine, own[None, :], 0.0)
            else:
                own = tl.load(row + at_z, mask=within, other=0.0).to(tl.float32)
                g += tl.where(mine, own[None, :], 0.0)
                own = tl.load(row + columns + at_z, mask=within, other=0.0).to(tl.float32)
                u += tl.where(mine, own[None, :], 0.0)
    if INTERLEAVED:
        g, u = tl.split(tl.reshape(both, (ROWS, COLUMNS, 2)))
    below, between = g <= limit, (u <= limit) & (u >= -limit)
    g = tl.minimum(g, limit)
    u = tl.minimum(tl.maximum(u, -limit), limit) + offset
    s = tl.sigmoid(alpha * g)
    made = g * s
    mask = (at < rows)[:, None] & within[None, :]
    used = mask & (kinds < experts)[:, None]
    total = tl.sum(tl.where(used, dz * made * u, 0.0), axis=1)
    dz = dz * part
    dg = tl.where(below & used, dz * u * s * (1 + alpha * g * (1 - s)), 0.0)
    du = tl.where(between & used, dz * made, 0.0)
    made = tl.where(used, made * u * part, 0.0)
    tl.debug_barrier()  # what was read is written over
    kind_of = z.dtype.element_ty
    tl.store(z + at[:, None] * columns + at_z[None, :], made.to(kind_of), mask=mask)
    row_of = y + at[:, None] * width
    if INTERLEAVED:
        dy = tl.reshape(tl.join(dg, du), (ROWS, 2 * COLUMNS)).to(kind_of)
        tl.store(row_of + at_y[None, :], dy, mask=(at < rows)[:, None] & within_y[None, :])
    else:
        tl.store(row_of + at_z[None, :], dg.to(kind_of), mask=mask)
        tl.store(row_of + columns + at_z[None, :], du.to(kind_of), mask=mask)
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


@on_its_device
def add(y: Tensor, added: Added, routing: Routing) -> Tensor:
    """As `expert_steps.add`."""
    rows, columns = y.shape
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(columns, WIDE))
    if rows:
        _add[grid](
            y,
            *_lora(added),
            *_routing(routing),
            rows,
            columns,
            *_ranks(added),
            ROWS,
            WIDE,
            num_warps=WARPS,
        )
    return y


@on_its_device
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
            num_warps=WARPS,
        )
    return z


@on_its_device
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
            num_warps=WARPS,
        )
    return y, dz, d_share.sum(0)


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
