"""Softmax cross-entropy and its gradient over the logits, one row per program, in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compiling import on_its_device

BLOCK = 8192


@triton.jit  # type: ignore[untyped-decorator]
def _capped(z, cap, HAS_CAP: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    if HAS_CAP:
        z = cap * (2 * tl.sigmoid(2 * z / cap) - 1)
    return z


@triton.jit  # type: ignore[untyped-decorator]
def _rows(  # type: ignore[no-untyped-def]
    logits,
    labels,
    losses,
    columns,
    stride,
    cap,
    HAS_CAP: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0).to(tl.int64)
    start_of_row = logits + row * stride
    top = -float("inf")
    total = 0.0
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(start_of_row + at, mask=at < columns, other=-float("inf")).to(tl.float32)
        z = tl.where(at < columns, _capped(z, cap, HAS_CAP), -float("inf"))
        new_top = tl.maximum(top, tl.max(z, axis=0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top), axis=0)
        top = new_top
    log_total = top + tl.log(total)
    label = tl.load(labels + row)
    chosen = _capped(tl.load(start_of_row + label).to(tl.float32), cap, HAS_CAP)
    tl.store(losses + row, log_total - chosen)
    tl.debug_barrier()  # the label's logit is overwritten below
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(start_of_row + at, mask=at < columns, other=0.0).to(tl.float32)
        z = _capped(z, cap, HAS_CAP)
        gradient = tl.exp(z - log_total) - tl.where(at == label, 1.0, 0.0)
        if HAS_CAP:
            gradient *= 1 - (z / cap) * (z / cap)
        tl.store(start_of_row + at, gradient.to(logits.dtype.element_ty), mask=at < columns)


@on_its_device
def to_gradient(logits: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    """Return the losses, float32 [rows], and turn `logits` [rows, columns] into their gradient."""
    losses = torch.empty(len(labels), dtype=torch.float32, device=logits.device)
    rows, columns = logits.shape
    if rows:
        cap, has_cap = softcap or 1.0, softcap is not None
        grid = (rows,)
        _rows[grid](
            logits, labels, losses, columns, logits.stride(0), cap, has_cap, BLOCK, num_warps=16
        )
    return losses
