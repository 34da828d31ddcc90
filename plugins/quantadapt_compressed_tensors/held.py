"""The codes of a layer, as the core's kernels for few tokens read them: where they are held."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantadapt.protocols import ByteCodes, UniformGrid, WordCodes
from quantadapt_compressed_tensors.layers import scheme_of, sizes_of, tensors_of


def word_codes(module: nn.Module) -> WordCodes | None:
    """Return what a layer holds; None where it is no integers in words or floats of 4 bits, a scale
    for neighbours of a row."""
    scheme, tensors, (rows, columns) = scheme_of(module), tensors_of(module), sizes_of(module)
    args = scheme.weights
    bits, (height, width) = args.num_bits, args.block(rows, columns)
    held, scale = tensors.get("weight_packed"), tensors.get("weight_scale")
    if held is None or scale is None or "weight_g_idx" in tensors:
        return None
    if height > 1 or columns % width or scale.shape != (rows, columns // width):
        return None
    if held.dtype == torch.uint8:
        return _of_floats(held, scale, width, tensors.get("weight_global_scale"))
    if scheme.format != "pack-quantized" or scheme.inputs is not None or bits not in (2, 3, 4, 8):
        return None
    zeros = tensors.get("weight_zero_point")
    whole = zeros is None or (zeros.dtype == torch.int32 and len(zeros) * 32 == rows * bits)
    if held.shape[1] * 32 != columns * bits or not whole:
        return None  # padded, for one
    return WordCodes(
        held=held.t(),
        bits=bits,
        scale=scale.t(),
        group_size=width,
        zeros=None if zeros is None else zeros.t(),
        zero=2 ** (bits - 1) if zeros is None else 0,  # half the range, which is added to both
    )


def _of_floats(held: Tensor, scale: Tensor, width: int, whole: Tensor | None) -> WordCodes | None:
    """Return floats of 4 bits, two of a row in a byte."""
    if held.shape[1] % 4 or not held.is_contiguous():
        return None
    powers = scale.dtype == torch.uint8
    return WordCodes(
        held=held.view(torch.int32).t(),
        bits=4,
        scale=(scale.view(torch.float8_e8m0fnu) if powers else scale).t(),
        group_size=width,
        floats=True,
        divisor=whole,
    )


def byte_codes(module: nn.Module) -> ByteCodes | None:
    """Return what a layer holds; None where it is no numbers of a byte each, or has zero points."""
    scheme, tensors, (rows, columns) = scheme_of(module), tensors_of(module), sizes_of(module)
    held, scale = tensors.get("weight"), tensors.get("weight_scale")
    whole = held is not None and held.dtype in (torch.int8, torch.float8_e4m3fn)
    if not whole or scale is None or {"weight_zero_point", "weight_g_idx"} & tensors.keys():
        return None
    assert held is not None
    height, width = scheme.weights.block(rows, columns)
    scale = scale.view(1, 1) if scale.ndim < 2 else scale
    powers = scale.dtype == torch.uint8
    # The kernel takes any codes that are the numbers themselves.
    grid = UniformGrid(
        scale=scale.view(torch.float8_e8m0fnu) if powers else scale,
        group_size=width,
        dtype=torch.float32,
        lowest=-128,
        highest=127,
    )
    return ByteCodes(held=held, grid=grid, height=height)
