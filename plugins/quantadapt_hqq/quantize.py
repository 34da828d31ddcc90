"""hqq's quantization of a weight, in chunks: hqq's own works with ten times the weight in memory.

Groups are independent, except for when hqq stops: once the mean error of the whole weight no longer
falls. So chunk after chunk goes through hqq's step, and the error is that of all of them.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK = {"cpu": 2**18, "cuda": 2**24}
"""Weights that are worked on at once: as many as a CPU's cache holds with the step's temporaries;
on CUDA enough to keep the GPU busy, at 16 bytes each."""


class Chunk(NamedTuple):
    """Some groups: their weights, inverse scales and zero points, which broadcast."""

    weight: Tensor
    scale: Tensor
    zero: Tensor


@torch.no_grad()
def quantize(
    weight: Tensor, *, nbits: int, group_size: int, axis: int, round_zero: bool
) -> tuple[Tensor, dict[str, Any]]:
    """Return what `hqq.core.quantize.Quantizer.quantize` does: packed codes, and `meta`.

    Args:
        weight: floating point, [out_features, in_features].
        nbits: bits of a code, one of hqq's.
        group_size: weights that share a scale; it divides their number.
        axis: groups lie along in_features (1) or along out_features (0).
        round_zero: start from a zero point that is an integer.
    """
    from hqq.core.quantize import Quantizer

    shape = (-1, group_size) if axis == 1 else (group_size, -1)
    groups, most = weight.reshape(shape), 2**nbits - 1
    together = CHUNK.get(weight.device.type, CHUNK["cuda"]) // group_size
    together = max(together // 64, 1) * 64  # as vectorized sums go: they are rounded as hqq's
    parts = torch.split(groups, together, dim=1 - axis)
    chunks = _optimized([_start(part, most, axis, round_zero) for part in parts], most, axis)
    codes = torch.cat([_codes(chunk, most) for chunk in chunks], dim=1 - axis)
    packing = Quantizer.bit_to_packing[nbits]
    return Quantizer.pack[packing](codes), {
        "nbits": nbits,
        "group_size": group_size,
        "shape": weight.shape,
        "scale": 1.0 / torch.cat([chunk.scale for chunk in chunks], dim=1 - axis),
        "zero": torch.cat([chunk.zero for chunk in chunks], dim=1 - axis),
        "axis": axis,
        "packing": packing,
        "unpack_view_dtype": Quantizer.unpack_view_dtype[packing],
        "view_as_float": False,
        "quant_scale": False,
        "quant_zero": False,
    }


def _start(weight: Tensor, most: int, axis: int, round_zero: bool) -> Chunk:
    """Spread the codes 0 to `most` over each group's range."""
    low = weight.amin(axis, keepdim=True).float()
    width = weight.amax(axis, keepdim=True).float() - low
    scale = torch.where(width.abs() <= 1e-4, 1.0, most / width).clamp(max=2e4)
    zero = -low * scale
    return Chunk(weight, scale, zero.round() if round_zero else zero)


def _optimized(chunks: list[Chunk], most: int, axis: int) -> list[Chunk]:
    """Return the chunks with hqq's zero points, and both in the dtype that hqq works in."""
    from hqq.core import optimize

    function = optimize.optimize_weights_proximal_legacy
    options = inspect.signature(function).parameters["opt_params"].default
    beta, norm = options["beta"], options["lp_norm"]
    dtype = torch.float16 if chunks[0].weight.is_cuda else torch.float32
    chunks = [Chunk(c.weight, c.scale.to(dtype), c.zero.to(dtype)) for c in chunks]
    weights = sum(chunk.weight.numel() for chunk in chunks)
    best = torch.inf
    for _ in range(options["iters"]):
        error = torch.zeros((), device=chunks[0].weight.device)
        for i, (part, scale, zero) in enumerate(chunks):
            weight = part.to(dtype)
            restored, _, better, _ = optimize.optimize_weights_proximal_legacy_step(
                weight, scale, zero, [0, most], beta, norm, axis
            )
            error += restored.sub_(weight).abs_().sum(dtype=torch.float32)
            chunks[i] = Chunk(part, scale, better)
            del weight, restored
        mean = float((error / weights).to(dtype))
        if not mean < best:
            break
        best = mean
    return chunks


def _codes(chunk: Chunk, most: int) -> Tensor:
    codes = (chunk.weight.float() * chunk.scale).add_(chunk.zero)
    return codes.round_().clamp_(0, most).to(torch.uint8)
