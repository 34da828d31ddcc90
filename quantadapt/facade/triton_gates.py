"""Gate and up of experts as kernels, which go through the experts of a block of rows as those of
`triton_experts` do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compiling import on_its_device
from .triton_experts import (
    ROWS,
    WARPS,
    b_of,
    h_of,
    kinds_of,
    lora_of,
    ranks_of,
    routing_of,
    tile_of,
)

if TYPE_CHECKING:
    from .expert_steps import Added, Gate
    from .grouped import Routing

COLUMNS = 64


@triton.jit  # type: ignore[untyped-decorator]
def _gate_and_up(  # type: ignore[no-untyped-def]
    y,
    columns,
    at,
    at_z,
    at_y,
    rows,
    INTERLEAVED: tl.constexpr,  # noqa: N803
):
    """Return y as (both, 0, 0) where gate and up take turns, else as (0, gate, up)."""
    both, g, u = 0.0, 0.0, 0.0
    if INTERLEAVED:
        both = tile_of(y, 2 * columns, at, at_y, at_y < 2 * columns, rows)
    else:
        g = tile_of(y, 2 * columns, at, at_z, at_z < columns, rows)
        u = tile_of(y, 2 * columns, at, at_z + columns, at_z < columns, rows)
    return both, g, u


@triton.jit  # type: ignore[untyped-decorator]
def _plus_expert(  # type: ignore[no-untyped-def]
    both,
    g,
    u,
    kind,
    mine,
    left,
    b,
    stride_e,
    stride_n,
    stride_r,
    ranks,
    bias,
    columns,
    at_z,
    at_y,
    INTERLEAVED: tl.constexpr,  # noqa: N803
    R: tl.constexpr,  # noqa: N803
    HAS_BIAS: tl.constexpr,  # noqa: N803
):
    """Add what expert `kind` adds to the rows that are `mine`, to what `_gate_and_up` returns."""
    within, within_y = at_z < columns, at_y < 2 * columns
    if R:
        own, of_kind = tl.where(mine, left, 0.0).to(left.dtype), b + kind * stride_e
        if INTERLEAVED:
            both += tl.dot(own, b_of(of_kind, stride_n, stride_r, at_y, within_y, ranks, R))
        else:
            g += tl.dot(own, b_of(of_kind, stride_n, stride_r, at_z, within, ranks, R))
            of_u = of_kind + columns * stride_n
            u += tl.dot(own, b_of(of_u, stride_n, stride_r, at_z, within, ranks, R))
    if HAS_BIAS:
        row = bias + kind * (2 * columns)
        if INTERLEAVED:
            own = tl.load(row + at_y, mask=within_y, other=0.0).to(tl.float32)
            both += tl.where(mine, own[None, :], 0.0)
        else:
            own = tl.load(row + at_z, mask=within, other=0.0).to(tl.float32)
            g += tl.where(mine, own[None, :], 0.0)
            own = tl.load(row + columns + at_z, mask=within, other=0.0).to(tl.float32)
            u += tl.where(mine, own[None, :], 0.0)
    return both, g, u


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
    at_y = tl.program_id(1) * (2 * COLUMNS) + tl.arange(0, 2 * COLUMNS)
    within = at_z < columns
    both, g, u = _gate_and_up(y, columns, at, at_z, at_y, rows, INTERLEAVED)
    left = h_of(h, stride_h, at, rows, ranks, R) if R else None
    part = tl.load(share + at, mask=at < rows, other=0.0).to(tl.float32)
    kinds, first, last = kinds_of(expert, at, rows, experts)
    for kind in range(first, last + 1):
        mine = (kinds == kind)[:, None]
        both, g, u = _plus_expert(
            both, g, u, kind, mine, left, b, stride_e, stride_n, stride_r, ranks,
            bias, columns, at_z, at_y, INTERLEAVED, R, HAS_BIAS,
        )  # fmt: skip
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
    """`z` holds dz and gets z, `y` gets dy, `d_share` [column blocks, rows] its parts."""
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at_z = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at_y = tl.program_id(1) * (2 * COLUMNS) + tl.arange(0, 2 * COLUMNS)
    within = at_z < columns
    dz = tile_of(z, columns, at, at_z, within, rows)
    both, g, u = _gate_and_up(y, columns, at, at_z, at_y, rows, INTERLEAVED)
    left = h_of(h, stride_h, at, rows, ranks, R) if R else None
    if DR:
        d_left = h_of(dh, stride_dh, at, rows, d_ranks, DR)
    part = tl.load(share + at, mask=at < rows, other=0.0).to(tl.float32)[:, None]
    kinds, first, last = kinds_of(expert, at, rows, experts)
    for kind in range(first, last + 1):
        mine = (kinds == kind)[:, None]
        both, g, u = _plus_expert(
            both, g, u, kind, mine, left, b, stride_e, stride_n, stride_r, ranks,
            bias, columns, at_z, at_y, INTERLEAVED, R, HAS_BIAS,
        )  # fmt: skip
        if DR:
            d_own, of_kind = tl.where(mine, d_left, 0.0).to(d_left.dtype), db + kind * stride_de
            dz += tl.dot(d_own, b_of(of_kind, stride_dn, stride_dr, at_z, within, d_ranks, DR))
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
    row_of = y + at[:, None] * (2 * columns)
    if INTERLEAVED:
        dy = tl.reshape(tl.join(dg, du), (ROWS, 2 * COLUMNS)).to(kind_of)
        mask = (at < rows)[:, None] & (at_y < 2 * columns)[None, :]
        tl.store(row_of + at_y[None, :], dy, mask=mask)
    else:
        tl.store(row_of + at_z[None, :], dg.to(kind_of), mask=mask)
        tl.store(row_of + columns + at_z[None, :], du.to(kind_of), mask=mask)
    tl.store(d_share + tl.program_id(1).to(tl.int64) * rows + at, total, mask=at < rows)


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
    ranks, r = ranks_of(added)
    if rows:
        _gated[(triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS))](
            *(z, y, *lora_of(added), bias, share, *routing_of(routing)),
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
    (ranks, r), (d_ranks, dr) = ranks_of(added), ranks_of(d_added)
    if rows:
        _gated_backward[(triton.cdiv(rows, ROWS), blocks)](
            *(dz, y, *lora_of(added), *lora_of(d_added), bias, share, d_share),
            *(*routing_of(routing), rows, columns, ranks, d_ranks),
            *(gate.alpha, gate.limit, gate.offset),
            *(gate.interleaved, r, dr, bias is not None, ROWS, COLUMNS),
            num_warps=WARPS,
        )
    return y, dz, d_share.sum(0)
