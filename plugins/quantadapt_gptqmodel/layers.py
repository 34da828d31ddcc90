"""gptqmodel's layers: how they hold integers in 32-bit words, and how weights get in and out.

Codes and weights are [out_features, in_features] here; scales and zeros are [out_features, groups].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

from quantadapt.compiling import one_kernel
from quantadapt.dense_words import dense_of_words, whole_words
from quantadapt.protocols import WordCodes, rows_of_units

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


# Layers ----------------------------------------------------------------------------------------


def method_of(module: nn.Module) -> str | None:
    """Return "gptq" or "awq" for a layer of gptqmodel. AWQ's classes have GPTQ's among their bases
    in some versions, so they are asked for first."""
    names = [base.__name__ for base in type(module).__mro__]
    if "AWQuantLinear" in names:
        return "awq"
    return "gptq" if "GPTQQuantLinear" in names else None


def unpacked(module: Any) -> tuple[Tensor, Tensor]:
    """Return codes and zeros of a layer."""
    method, bits, _ = _packing(module)
    return _codes(module.qweight, method, bits), zeros_of(module)


def zeros_of(module: Any) -> Tensor:
    """Return the zeros of a layer, [out_features, groups]."""
    return _zeros(module.qzeros, *_packing(module))


def _packing(module: Any) -> tuple[str | None, int, int]:
    """Return method, bits, and what zeros were lowered by before they were packed."""
    method = method_of(module)
    less_one = method != "awq" and not module.REQUIRES_FORMAT_V2 and module.qzero_format() == 1
    return method, module.bits, int(less_one)


def _codes(packed: Tensor, method: str | None, bits: int) -> Tensor:
    if method == "awq":
        return unpack(packed, bits, AWQ_ORDER).t()
    return unpack(packed.t().contiguous(), bits)


def _zeros(packed: Tensor, method: str | None, bits: int, lowered: int) -> Tensor:
    if method == "awq":
        return unpack(packed, bits, AWQ_ORDER).t()
    return unpack(packed, bits).t() + lowered


def g_idx_of(module: Any) -> Tensor | None:
    """Return the group of each column; None where equal groups follow each other."""
    ragged = module.in_features % len(module.scales)
    found: Tensor | None = module.g_idx if module.desc_act or ragged else None
    return found


def word_codes(module: Any) -> WordCodes | None:
    """Return what a layer holds; None where its groups are scattered."""
    if g_idx_of(module) is not None:
        return None
    method, bits, lowered = _packing(module)
    return WordCodes(
        held=module.qweight,
        bits=bits,
        scale=module.scales,
        group_size=module.in_features // len(module.scales),
        zeros=module.qzeros,
        zero=lowered,
        along_outputs=method == "awq",
        interleaved=method == "awq",
    )


def dequantized(module: Any) -> Tensor:
    """Return the weight of a layer."""
    return _weight(module, module.qweight, module.qzeros, module.scales)


def dequantized_rows(module: Any, first: int, last: int) -> Tensor:
    """Return the rows from `first` to before `last` of the weight, which are columns of the tensors
    and in words of int32 together."""
    bits = module.bits

    def read(start: int, end: int) -> Tensor:
        words, own = slice(start * bits // 32, end * bits // 32), slice(start, end)
        packed = module.qweight[:, words if method_of(module) == "awq" else own]
        return _weight(module, packed, module.qzeros[:, words], module.scales[:, own])

    return rows_of_units(first, last, 32 // gcd(32, bits), read)


def _weight(module: Any, *tensors: Tensor) -> Tensor:
    """Return the weight, or rows of it, of codes, zeros and scales as they are packed."""
    packing = _packing(module)
    if (g_idx := g_idx_of(module)) is None:
        size = module.in_features // len(module.scales)
        fits = whole_words(module.bits, size, packing[0] == "awq")
        written = _dequantize_in_order if fits else None
        return one_kernel(_dequantize, *tensors, static=packing, written=written)
    packed, zeros, scales = tensors
    codes, zeros = _codes(packed, *packing[:2]), _zeros(zeros, *packing)
    return weight_of(codes, scales.t(), zeros, g_idx).contiguous()


def _dequantize(
    packed: Tensor, zeros: Tensor, scales: Tensor, method: str | None, bits: int, lowered: int
) -> Tensor:
    codes, zeros = _codes(packed, method, bits), _zeros(zeros, method, bits, lowered)
    return weight_of(codes, scales.t(), zeros, None).contiguous()


def _dequantize_in_order(
    packed: Tensor,
    zeros: Tensor,
    scales: Tensor,
    method: str | None,
    bits: int,
    lowered: int,
    dtype: torch.dtype | None,
) -> Tensor:
    added = 0 if method == "awq" else lowered
    return dense_of_words(packed, zeros, scales, bits, added, method == "awq", dtype)


def vendor_product(module: Any, dtype: torch.dtype) -> Callable[[Any, Tensor], Tensor] | None:
    """Return gptqmodel's Triton kernel for a layer on CUDA, which computes in `dtype` and leaves
    the layer as it is; None where there is none. Its other kernels repack buffers, or are compiled
    with nvcc."""
    method, bits, lowered = _packing(module)
    if find_spec("triton") is None or lowered or dtype == torch.float32:
        return None
    if method == "awq":  # it computes in float16, for which other dtypes' numbers may be too large
        size = module.in_features / len(module.scales)
        fits = dtype == torch.float16 and size in (32, 64, 128, module.in_features)
        return _awq_product if fits else None
    return _gptq_product if bits in (2, 4, 8) else None


def _gptq_product(module: Any, x: Tensor) -> Tensor:
    """Dequantize in one kernel, and multiply."""
    from gptqmodel.nn_modules.triton_utils.dequant import dequant

    tensors = module.qweight, module.scales, module.qzeros, module.g_idx
    weight = dequant(x.dtype, *tensors, module.bits, 32, 2**module.bits - 1)
    return _with_bias(x @ weight, module)


def _awq_product(module: Any, x: Tensor) -> Tensor:
    """Compute in float16, by a kernel for few tokens."""
    from gptqmodel.nn_modules.qlinear.gemm_awq_triton import AwqGemmTritonFn

    with torch.cuda.device(x.device):
        tensors = module.qweight, module.qzeros, module.scales
        size = module.in_features // len(module.scales)
        product = AwqGemmTritonFn.apply(x, *tensors, module.bits, size, None, module.out_features)
        return _with_bias(product, module)


def _with_bias(y: Tensor, module: Any) -> Tensor:
    return y if module.bias is None else y + module.bias.to(y.dtype)


@cache
def plain(vendor: Any) -> Any:
    """Return gptqmodel's class `vendor` with a forward in plain torch and in the dtype of its
    input. Theirs compiles kernels and moves buffers, or (AWQ) computes in float16 at most."""

    def forward(self: Any, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, dequantized(self).to(x.dtype), bias)

    own = {name: value for name, value in vars(vendor).items() if name.isupper()}
    own["SUPPORTS_BACKEND_SELECTION"] = False  # or gptqmodel finds it when it looks for kernels
    return type(vendor.__name__, (vendor,), {**own, "forward": forward})
