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

ROWS = 64
COLUMNS = 64
WIDE = 128


@triton.jit  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
    made,
    h,
    stride_h,
    b,
    stride_e,
    stride_n,
    stride_r,
    scaling,
    at,
    at_n,
    kinds,
    first,
    last,
    rows,
    columns,
    ranks,
    R: tl.constexpr,  # noqa: N803
):
    """Add scaling * h Bᵀ to `made`, float32: rows `at`, columns `at_n` of B."""
    at_r = tl.arange(0, R)
    mask = (at < rows)[:, None] & (at_r < ranks)[None, :]
    left = tl.load(h + at[:, None] * stride_h + at_r[None, :], mask=mask, other=0.0)
    mask = (at_r < ranks)[:, None] & (at_n < columns)[None, :]
    inner = b + at_n[None, :] * stride_n + at_r[:, None] * stride_r
    total = tl.zeros_like(made)
    for kind in range(first, last + 1):
        right = tl.load(inner + kind * stride_e, mask=mask, other=0.0)
        own = tl.where((kinds == kind)[:, None], left, 0.0).to(right.dtype)
        total += tl.dot(own, right)
    return made + scaling * total


@triton.jit  # type: ignore[untyped-decorator]
def _kinds(expert, at, rows, experts):  # type: ignore[no-untyped-def]
    """Return the expert of each row, and the first and the last of a block of rows."""
    kinds = tl.load(expert + at, mask=at < rows, other=experts)
    first = tl.min(kinds, axis=0)
    last = tl.max(tl.where(kinds < experts, kinds, -1), axis=0)
    return kinds, first, last


@triton.jit  # type: ignore[untyped-decorator]
def _add(  # type: ignore[no-untyped-def]
    y,
    h,
    stride_h,
    b,
    stride_e,
    stride_n,
    stride_r,
    scaling,
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
    mask = (at < rows)[:, None] & (at_n < columns)[None, :]
    place = y + at[:, None] * columns + at_n[None, :]
    made = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    made = _product(
        made, h, stride_h, b, stride_e, stride_n, stride_r, scaling,
        at, at_n, kinds, first, last, rows, columns, ranks, R,
    )  # fmt: skip
    tl.store(place, made.to(y.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _biased(made, bias, at_n, kinds, first, last, columns, width):  # type: ignore[no-untyped-def]
    for kind in range(first, last + 1):
        own = tl.load(bias + kind * width + at_n, mask=at_n < columns, other=0.0)
        made += tl.where((kinds == kind)[:, None], own.to(tl.float32)[None, :], 0.0)
    return made


@triton.jit  # type: ignore[untyped-decorator]
def _half(  # type: ignore[no-untyped-def]
    y,
    place,
    h,
    stride_h,
    b,
    stride_e,
    stride_n,
    stride_r,
    scaling,
    bias,
    at,
    at_n,
    kinds,
    first,
    last,
    rows,
    width,
    ranks,
    R: tl.constexpr,  # noqa: N803
    HAS_BIAS: tl.constexpr,  # noqa: N803
):
    """Return the columns `at_n` of y, with what LoRA adds to it, and the bias: float32."""
    mask = (at < rows)[:, None] & (at_n < width)[None, :]
    made = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    if R:
        made = _product(
            made, h, stride_h, b, stride_e, stride_n, stride_r, scaling,
            at, at_n, kinds, first, last, rows, width, ranks, R,
        )  # fmt: skip
    if HAS_BIAS:
        made = _biased(made, bias, at_n, kinds, first, last, width, width)
    return made


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
    scaling,
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
    kinds, first, last = _kinds(expert, at, rows, experts)
    width = 2 * columns
    if INTERLEAVED:
        at_g, at_u = 2 * at_z, 2 * at_z + 1
    else:
        # behind the last column, so that nothing of the other half is read
        at_g, at_u = tl.where(at_z < columns, at_z, width), at_z + columns
    row = y + at[:, None] * width
    g = _half(
        y, row + at_g[None, :], h, stride_h, b, stride_e, stride_n, stride_r, scaling, bias,
        at, at_g, kinds, first, last, rows, width, ranks, R, HAS_BIAS,
    )  # fmt: skip
    u = _half(
        y, row + at_u[None, :], h, stride_h, b, stride_e, stride_n, stride_r, scaling, bias,
        at, at_u, kinds, first, last, rows, width, ranks, R, HAS_BIAS,
    )  # fmt: skip
    g = tl.minimum(g, limit)
    u = tl.minimum(tl.maximum(u, -limit), limit)
    part = tl.load(share + at, mask=at < rows, other=0.0).to(tl.float32)
    made = g * tl.sigmoid(alpha * g) * (u + offset) * part[:, None]
    made = tl.where((kinds < experts)[:, None], made, 0.0)
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
    scaling,
    dh,
    stride_dh,
    db,
    stride_de,
    stride_dn,
    stride_dr,
    d_scaling,
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
    """`z` holds dz and gets z, `y` gets dy."""
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    kinds, first, last = _kinds(expert, at, rows, experts)
    routed = (kinds < experts)[:, None]
    width = 2 * columns
    row = y + at[:, None] * width
    part = tl.load(share + at, mask=at < rows, other=0.0).to(tl.float32)[:, None]
    total = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, columns, COLUMNS):
        at_z = start + tl.arange(0, COLUMNS)
        if INTERLEAVED:
            at_g, at_u = 2 * at_z, 2 * at_z + 1
        else:
            at_g, at_u = tl.where(at_z < columns, at_z, width), at_z + columns
        g = _half(
            y, row + at_g[None, :], h, stride_h, b, stride_e, stride_n, stride_r, scaling, bias,
            at, at_g, kinds, first, last, rows, width, ranks, R, HAS_BIAS,
        )  # fmt: skip
        u = _half(
            y, row + at_u[None, :], h, stride_h, b, stride_e, stride_n, stride_r, scaling, bias,
            at, at_u, kinds, first, last, rows, width, ranks, R, HAS_BIAS,
        )  # fmt: skip
        mask = (at < rows)[:, None] & (at_z < columns)[None, :]
        place = z + at[:, None] * columns + at_z[None, :]
        dz = _half(
            z, place, dh, stride_dh, db, stride_de, stride_dn, stride_dr, d_scaling, bias,
            at, at_z, kinds, first, last, rows, columns, d_ranks, DR, False,
        )  # fmt: skip
        below, within = g <= limit, (u <= limit) & (u >= -limit)
        g = tl.minimum(g, limit)
        u = tl.minimum(tl.maximum(u, -limit), limit) + offset
        s = tl.sigmoid(alpha * g)
        made = g * s
        dz = tl.where(routed & mask, dz, 0.0)
        total += tl.sum(tl.where(routed & mask, dz * made * u, 0.0), axis=1)
        dz = dz * part
        dg = tl.where(below & routed, dz * u * s * (1 + alpha * g * (1 - s)), 0.0)
        du = tl.where(within & routed, dz * made, 0.0)
        made = tl.where(routed, made * u * part, 0.0)
        tl.debug_barrier()  # what was read is written over
        kind = z.dtype.element_ty
        tl.store(place, made.to(kind), mask=mask)
        tl.store(row + at_g[None, :], dg.to(kind), mask=mask)
        tl.store(row + at_u[None, :], du.to(kind), mask=mask)
    tl.store(d_share + at, total, mask=at < rows)


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
            *(z, y, *_lora(added), _or(bias, y), share, *_routing(routing)),
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
    d_share = torch.empty(rows, dtype=torch.float32, device=y.device)
    (ranks, r), (d_ranks, dr) = _ranks(added), _ranks(d_added)
    if rows:
        _gated_backward[(triton.cdiv(rows, ROWS),)](
            *(dz, y, *_lora(added), *_lora(d_added), _or(bias, y), share, d_share),
            *(*_routing(routing), rows, columns, ranks, d_ranks),
            *(gate.alpha, gate.limit, gate.offset),
            *(gate.interleaved, r, dr, bias is not None, ROWS, COLUMNS),
        )
    return y, dz, d_share


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
    """Return h and its stride, B and its strides, and the factor."""
    if added is None:
        return None, 0, None, 0, 0, 0, 0.0
    return added.h, added.h.stride(0), added.b, *added.b.stride(), added.scaling


def _ranks(added: Added | None) -> tuple[int, int]:
    """Return how many ranks there are, and how many a product takes: 16 at least."""
    ranks = 0 if added is None else added.h.shape[1]
    return ranks, max(triton.next_power_of_2(ranks), 16) if ranks else 0


def _routing(routing: Routing) -> tuple[Tensor, int]:
    return routing.expert, len(routing.ends)


def _or(bias: Tensor | None, other: Tensor) -> Tensor:
    return other if bias is None else bias
