"""Integers that stand for weights: packed into 32-bit words, and how weights are rounded to them.

Codes and weights are [out_features, in_features] here; scales and zeros are [out_features, groups].
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

IN_ORDER: tuple[int, ...] = tuple(range(32))
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where AWQ puts each of eight neighbouring codes in a word."""
LEAST_SCALE = 2.0**-24
"""The smallest float16; scales are stored as float16."""
ROUNDING = 1e-6
"""A little more than the square of what float16 rounds off."""


def pack(codes: Tensor, bits: int, order: tuple[int, ...] = IN_ORDER) -> Tensor:
    """Return the last dimension as a stream of bits in int32 words.

    Args:
        codes: integers from 0 to 2**bits - 1.
        bits: 3-bit codes may lie across two words; 32 of them fill three.
        order: the place in its word of each of the codes that share it.
    """
    lanes = 32 if bits == 3 else 32 // bits
    grouped = in_groups(codes.long(), lanes)
    words = grouped.new_zeros(*grouped.shape[:-1], lanes * bits // 32)
    for lane in range(lanes):
        word, shift = divmod(order[lane] * bits, 32)
        words[..., word] |= grouped[..., lane] << shift
        if shift + bits > 32:
            words[..., word + 1] |= grouped[..., lane] >> (32 - shift)
    return words.flatten(-2).to(torch.int32)


def unpack(words: Tensor, bits: int, order: tuple[int, ...] = IN_ORDER) -> Tensor:
    """Return the codes that `pack` put into `words`, as int32."""
    mask = 2**bits - 1
    if bits != 3:
        shifts = _shifts(bits, order, words.device)
        return words.unsqueeze(-1).bitwise_right_shift(shifts).bitwise_and_(mask).flatten(-2)
    threes = in_groups(words, 3)
    lanes = []
    for lane in range(32):
        word, shift = divmod(lane * bits, 32)
        value = threes[..., word] >> shift
        if shift + bits > 32:
            value = value & (2 ** (32 - shift) - 1) | threes[..., word + 1] << (32 - shift)
        lanes.append(value & mask)
    return torch.stack(lanes, -1).flatten(-2)


@cache
def _shifts(bits: int, order: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(order[: 32 // bits], dtype=torch.int32, device=device) * bits


def add_to_packed(words: Tensor, bits: int, step: int) -> Tensor:
    """Add `step`, 1 or -1, to each code. As in gptqmodel, the carry of one of 2, 4 or 8 bits goes
    into its neighbour, so that what is taken away can always be given back."""
    if bits == 3:
        return pack((unpack(words, bits) + step) & 7, bits)
    ones = sum(1 << shift for shift in range(0, 32, bits))
    return (words.long() + step * ones).to(torch.int32)


def weight_of(codes: Tensor, scales: Tensor, zeros: Tensor, g_idx: Tensor | None) -> Tensor:
    """Return the weight, in the dtype of the scales, as the vendor's kernels compute it.

    Args:
        codes, scales, zeros: as `unpack` returns them.
        g_idx: the group of each column; None where equal groups follow each other.
    """
    zeros = zeros.to(scales.dtype)
    if g_idx is not None:
        g_idx = g_idx.to(codes.device, torch.long)
        return codes.to(scales.dtype).sub_(zeros[:, g_idx]).mul_(scales[:, g_idx])
    grouped = in_groups(codes, codes.shape[-1] // zeros.shape[-1]).to(scales.dtype)
    return grouped.sub_(zeros.unsqueeze(-1)).mul_(scales.unsqueeze(-1)).flatten(-2)


def grid_of(groups: Tensor, bits: int, sym: bool) -> tuple[Tensor, Tensor]:
    """Return scale and zero of weights [..., group], so that all of them are within reach."""
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if sym:
        high = torch.maximum(high, -low)
        low = -high
    scale = ((high - low) / (2**bits - 1)).clamp(min=LEAST_SCALE)
    if sym:
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    return scale, (-low / scale).round()


def codes_of(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Return the codes nearest to `weight`; scale and zero have a value for each weight."""
    return ((weight / scale).round() + zero).clamp(0, 2**bits - 1)


def rounded(groups: Tensor, bits: int, sym: bool) -> Tensor:
    """Return weights [..., group] as they are after rounding to the nearest code."""
    scale, zero = (value.unsqueeze(-1) for value in grid_of(groups, bits, sym))
    return (codes_of(groups, scale, zero, bits) - zero) * scale


def nearest(
    weight: Tensor,
    g_idx: Tensor,
    bits: int,
    sym: bool,
    old: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scales and zeros of `weight`, rounded to nearest.

    Args:
        weight: float32.
        g_idx: the group of each column.
        bits, sym: see `grid_of`.
        old: scales and zeros to keep for the groups that they suit better. So a weight that came
            from these stays as it is.
    """
    scales, zeros = grid_of(_by_group(weight, g_idx), bits, sym)
    scales = scales.half().float()  # as they will be stored
    if old is not None:
        new_cost, old_cost = (_costs(weight, g_idx, bits, *g) for g in ((scales, zeros), old))
        rounded_off = ROUNDING * _by_group(weight.square(), g_idx).sum(-1)
        keep = old_cost <= new_cost + rounded_off
        scales, zeros = torch.where(keep, old[0], scales), torch.where(keep, old[1], zeros)
    return codes_of(weight, scales[:, g_idx], zeros[:, g_idx], bits), scales, zeros


def _costs(weight: Tensor, g_idx: Tensor, bits: int, scales: Tensor, zeros: Tensor) -> Tensor:
    scale, zero = scales[:, g_idx], zeros[:, g_idx]
    error = (codes_of(weight, scale, zero, bits) - zero) * scale - weight
    return _by_group(error.square(), g_idx).sum(-1)


def _by_group(columns: Tensor, g_idx: Tensor) -> Tensor:
    """Return [out, groups, size]. The last group may be smaller: zeros fill it."""
    count = int(g_idx.max()) + 1
    size = -(-len(g_idx) // count)
    together = columns[:, g_idx.argsort(stable=True)]
    return in_groups(nn.functional.pad(together, (0, count * size - len(g_idx))), size)


def in_groups(x: Tensor, size: int) -> Tensor:
    """Split the last dimension."""
    return x.reshape(*x.shape[:-1], -1, size)


def groups_of(in_features: int, group_size: int, device: Any = None) -> Tensor:
    """Return the group of each column where groups follow each other."""
    size = in_features if group_size == -1 else group_size
    return torch.arange(in_features, device=device) // size
