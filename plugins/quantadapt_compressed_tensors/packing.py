"""Codes in words, and weights of codes and scales: what compressed-tensors' files hold, as numbers.

Codes and weights are [out_features, in_features].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """What tells the tensors of a layer apart, and how they make a weight.

    Attributes:
        names: of the tensors that are given, in their order; codes first.
        bits: of a code.
        rows, columns: of the weight.
        height, width: of the block that shares a scale.
        powers: whether scales are exponents of two, biased by 127.
    """

    names: tuple[str, ...]
    bits: int
    rows: int
    columns: int
    height: int
    width: int
    powers: bool


def weight_of(*given: Tensor | Layout) -> Tensor:
    """Return the weight in float32. In bfloat16 it is what compressed-tensors computes there: a
    code times a scale is rounded once."""
    *tensors, layout = given
    assert isinstance(layout, Layout)
    by_name: dict[str, Tensor] = dict(zip(layout.names, tensors, strict=True))  # type: ignore[arg-type]
    codes = _codes(by_name, layout).float()
    scale = by_name["weight_scale"]
    scale = torch.exp2(scale.float() - 127) if layout.powers else scale.float()
    if (whole := by_name.get("weight_global_scale")) is not None:
        scale = scale / whole
    if (zeros := by_name.get("weight_zero_point")) is not None:
        if zeros.dtype == torch.int32:
            zeros = unpack(zeros.t(), layout.bits, layout.rows).t()
        codes = codes - _spread(zeros.float(), by_name, layout)
    return codes * _spread(scale, by_name, layout)


def _codes(by_name: dict[str, Tensor], layout: Layout) -> Tensor:
    words = by_name[layout.names[0]]
    if words.dtype == torch.int32:
        return unpack(words, layout.bits, layout.columns)
    if words.dtype == torch.uint8:
        return unpack_fp4(words)
    return words


def _spread(scale: Tensor, by_name: dict[str, Tensor], layout: Layout) -> Tensor:
    """Return scales, or zero points, for each number of the weight (or as they spread by
    themselves)."""
    if scale.ndim < 2:
        return scale
    if (group_of := by_name.get("weight_g_idx")) is not None:
        return scale[:, group_of.long()]
    if layout.height > 1:
        scale = scale.repeat_interleave(layout.height, 0)[: layout.rows]
    if scale.shape[1] > 1:
        scale = scale.repeat_interleave(layout.width, 1)[:, : layout.columns]
    return scale


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """Return signed codes, int32 [rows, columns], of int32 words in which they lie one after the
    other, bit by bit, with half their range added."""
    mask, offset = 2**bits - 1, 2 ** (bits - 1)
    if 32 % bits == 0:
        shifts = torch.arange(32 // bits, dtype=torch.int32, device=words.device) * bits
        codes = words.unsqueeze(-1).bitwise_right_shift(shifts).bitwise_and(mask).flatten(-2)
        return codes[:, :columns].sub(offset)
    start = torch.arange(columns, device=words.device) * bits
    word, shift = start // 32, (start % 32).int()
    inside = (32 - shift).clamp(max=bits)  # bits of it that are in the first word
    one = torch.ones_like(inside)
    low = words[:, word] >> shift & (one << inside) - 1
    after = words[:, (word + 1).clamp(max=words.shape[1] - 1)]
    high = after & (one << bits - inside) - 1
    signed: Tensor = (low | high << inside) - offset
    return signed


def unpack_fp4(words: Tensor) -> Tensor:
    """Return e2m1 numbers, float32 [rows, 2 * words], of bytes with the first in their low half."""
    codes = torch.stack((words & 15, words >> 4), -1).flatten(-2).int()
    exponent, mantissa = codes >> 1 & 3, codes & 1
    twice = torch.where(exponent == 0, mantissa, mantissa + 2 << (exponent - 1).clamp(min=0))
    return twice.float() * torch.where(codes > 7, -0.5, 0.5)
