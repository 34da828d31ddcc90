"""Grids, the scales and zero points of a weight, and weights that are rounded onto them.

The rounding is the library's own code, so what is made here has the library's codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantadapt_compressed_tensors.layers import (
    Tensors,
    codes_name,
    library_args,
    scheme_of,
    tensors_of,
)
from quantadapt_compressed_tensors.packing import unpack
from quantadapt_compressed_tensors.schemes import Args, Scheme

GRID = "quantadapt_grid"
"""Attribute of a dense layer: a grid, as `fresh_grid` gives it, that its weight may lie on."""


def fresh_grid(args: Args, weight: Tensor, dtype: torch.dtype) -> Tensors:
    """Return scales and zero points for a weight, float32 [rows, columns], whose smallest and
    largest number of a block are the ends of its range.

    Args:
        args: how it is rounded.
        weight: where columns have groups of their own, in their order.
        dtype: which the scales have in files; they are numbers of it.
    """
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    grid: Tensors = {}
    if args.strategy == "tensor_group":
        grid["weight_global_scale"] = generate_gparam(*weight.aminmax())
    whole = grid.get("weight_global_scale")
    ends = _by_block(args, weight)
    scales, zeros = calculate_qparams(
        ends.amin((1, 3)), ends.amax((1, 3)), library_args(args), global_scale=whole
    )
    shape = args.scales(*weight.shape)
    if args.scale_dtype is None:
        least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        scales = scales.to(dtype).float().clamp(min=max(least, torch.finfo(torch.float32).tiny))
    grid["weight_scale"] = scales.view(shape)
    if not args.symmetric:
        grid["weight_zero_point"] = zeros.view(shape)
    return grid


def _by_block(args: Args, weight: Tensor) -> Tensor:
    """Return a weight as [blocks, height, blocks, width], filled up with zeros."""
    height, width = args.block(*weight.shape)
    rows, columns = weight.shape
    filled = nn.functional.pad(weight, (0, -columns % width, 0, -rows % height))
    return filled.view(filled.shape[0] // height, height, -1, width)


def on_grid(args: Args, weight: Tensor, grid: Mapping[str, Tensor]) -> Tensor:
    """Return `weight`, float32, rounded to nearest onto a grid as `fresh_grid` gives it."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    rounded: Tensor = fake_quantize(weight, *_spelled(grid), library_args(args), _whole(grid))
    return rounded


def _spelled(grid: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    return grid["weight_scale"], grid.get("weight_zero_point")


def _whole(grid: Mapping[str, Tensor]) -> Tensor | None:
    return grid.get("weight_global_scale")


def better_grid(args: Args, weight: Tensor, *grids: Tensors) -> Tensors:
    """Return the grid that is closer to `weight`, block by block; of one that has a scale for the
    whole weight, in all."""
    first, second = grids
    errors = [
        _by_block(args, (on_grid(args, weight, grid) - weight).square()).sum((1, 3))
        for grid in grids
    ]
    if args.strategy == "tensor_group":
        return second if errors[1].sum() < errors[0].sum() else first
    closer = (errors[1] < errors[0]).view(args.scales(*weight.shape))
    return {name: torch.where(closer, second[name], first[name]) for name in first}


def grid_of(module: nn.Module) -> Tensors:
    """Return the grid that a layer has, as `fresh_grid` gives it."""
    scheme, tensors = scheme_of(module), tensors_of(module)
    scales = tensors["weight_scale"]
    powers = scheme.has_power_scales
    grid = {"weight_scale": torch.exp2(scales.float() - 127) if powers else scales.float()}
    if "weight_zero_point" in tensors:
        grid["weight_zero_point"] = zeros_of(scheme, tensors, int(module.out_features))  # type: ignore[arg-type]
    if (whole := tensors.get("weight_global_scale")) is not None:
        grid["weight_global_scale"] = whole
    return grid


def zeros_of(scheme: Scheme, tensors: Mapping[str, Tensor], rows: int) -> Tensor:
    """Return the zero points of a layer, int8, in the shape of its scales."""
    zeros = tensors["weight_zero_point"]
    if zeros.dtype == torch.int32:
        zeros = unpack(zeros.t(), scheme.weights.num_bits, rows).t()
    return zeros.to(torch.int8)


def pack_zeros(scheme: Scheme, zeros: Tensor) -> Tensor:
    """Return zero points, int8 in the shape of the scales, as the format has them."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    if scheme.format != "pack-quantized":
        return zeros.contiguous()
    words: Tensor = pack_to_int32(zeros.contiguous(), scheme.weights.num_bits, packed_dim=0)
    return words.contiguous()


def packed(scheme: Scheme, weight: Tensor, grid: Mapping[str, Tensor], dtype: Any) -> Tensors:
    """Return what a file holds of a weight, float32, that is rounded onto a grid.

    Args:
        scheme: how.
        weight: [out_features, in_features].
        grid: as `fresh_grid` gives it; with `weight_g_idx` where columns have groups of their own.
        dtype: of the scales where the format leaves it open.
    """
    from compressed_tensors.compressors.mx_utils import compress_mx_scale
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization.lifecycle.forward import quantize

    args, name, order = scheme.weights, codes_name(scheme), grid.get("weight_g_idx")
    held = torch.int8 if args.type == "int" else torch.float8_e4m3fn
    codes = quantize(
        in_groups(weight, order),
        *_spelled(grid),
        library_args(args),
        dtype=None if args.num_bits == 4 and args.type == "float" else held,
        global_scale=_whole(grid),
    )
    codes = in_place(codes, order).contiguous()
    tensors: Tensors = {name: codes, **grid}
    scale = grid["weight_scale"]
    if scheme.has_power_scales:
        tensors["weight_scale"] = compress_mx_scale(scale, torch.uint8)
    else:
        wanted = torch.float8_e4m3fn if args.strategy == "tensor_group" else dtype
        tensors["weight_scale"] = scale.to(wanted)
    if args.type == "float":
        if args.num_bits == 4:
            tensors[name] = pack_fp4_to_uint8(codes)
    elif scheme.format == "pack-quantized":
        tensors[name] = pack_to_int32(codes, args.num_bits)
        tensors["weight_shape"] = torch.tensor(weight.shape, device=weight.device)
    if not args.symmetric:
        tensors["weight_zero_point"] = pack_zeros(scheme, grid["weight_zero_point"].to(torch.int8))
    return {key: value.contiguous() for key, value in tensors.items()}


def in_groups(weight: Tensor, order: Tensor | None) -> Tensor:
    """Return a weight with the columns of a group side by side; `order` is the group of each."""
    return weight if order is None else weight[:, order.argsort(stable=True)]


def in_place(weight: Tensor, order: Tensor | None) -> Tensor:
    """Undo `in_groups`."""
    return weight if order is None else weight[:, order.argsort(stable=True).argsort()]
