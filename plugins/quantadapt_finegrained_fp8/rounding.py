"""How weights get into layers in FP8: rounded to nearest, with the scales that a layer has or with
others; and the rows of several layers as one, as a stack of experts has them."""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

from quantadapt.protocols import CodebookGrid, float8_levels
from quantadapt_finegrained_fp8.layers import (
    Block,
    BlockFP8Linear,
    as_blocks,
    block_of,
    block_within,
    declared_block,
    rounded_codes,
    scale_of,
    spread_scales,
)


def quantized(linear: nn.Linear, block: Block | None, powers: bool) -> BlockFP8Linear:
    """Return a dense layer rounded to nearest; without a block, by one scale."""
    weight = linear.weight.detach().float()
    known = block_within(block, weight.shape)
    scales = scale_of(_by_block(weight.abs(), known).amax((1, 3)), powers)
    bias = None if linear.bias is None else linear.bias.detach()
    codes = rounded_codes(weight / spread_scales(scales, weight.shape, known))
    held = scales.to(torch.float8_e8m0fnu if powers else torch.float32)
    return BlockFP8Linear(codes, held if block else held.view(()), block, bias)


def _by_block(weight: Tensor, block: Block) -> Tensor:
    """Return a weight as [blocks, height, blocks, width], filled up with zeros."""
    height, width = block
    rows, columns = weight.shape
    filled = nn.functional.pad(weight, (0, -columns % width, 0, -rows % height))
    return filled.view(filled.shape[0] // height, height, -1, width)


def requantized(module: Any, weight: Tensor, *, same_scales: bool = False) -> BlockFP8Linear:
    """Return a layer like `module` that holds another weight; a block of it keeps the scale that it
    has where that is closer, or anyway."""
    weight = weight.detach().float()
    if (parts := getattr(module, "parts", 1)) > 1:
        pieces = zip(split(module, parts) or (), weight.chunk(parts), strict=True)
        return joined([requantized(one, piece, same_scales=same_scales) for one, piece in pieces])
    block, held = block_of(module), module.weight_scale_inv.data
    scales = as_blocks(held.float())
    if not same_scales:
        largest = _by_block(weight.abs(), block).amax((1, 3))
        fresh = scale_of(largest, held.dtype == torch.float8_e8m0fnu).to(held.dtype).float()
        errors = [_error(weight, one, block) for one in (scales, fresh)]
        scales = torch.where(errors[1] < errors[0], fresh, scales)
    codes = rounded_codes(weight / spread_scales(scales, weight.shape, block))
    scales = scales.to(held.dtype).view(held.shape)
    bias, inputs = _data(module.bias), _data(module.activation_scale)
    return BlockFP8Linear(codes, scales, declared_block(module), bias, inputs)


def _data(tensor: Any) -> Tensor | None:
    return None if tensor is None else tensor.data


def _error(weight: Tensor, scales: Tensor, block: Block) -> Tensor:
    """Return the squared error of each block."""
    spread = spread_scales(scales, weight.shape, block)
    off = rounded_codes(weight / spread).float() * spread - weight
    return _by_block(off.square(), block).sum((1, 3))


def values_of(module: Any) -> CodebookGrid:
    """Return the values that the weights of a layer can take with the scales that it has."""
    height, width = block_of(module)
    scale = as_blocks(module.weight_scale_inv.data.float())
    scale = scale.repeat_interleave(height, 0)[: module.out_features]
    groups = None
    if module.in_features % width:  # the last one is shorter
        groups = torch.arange(module.in_features, device=scale.device) // width
    levels = float8_levels(torch.float8_e4m3fn, scale.device)
    return CodebookGrid(
        scale=scale, group_size=width, dtype=torch.float32, groups=groups, levels=levels
    )


# Rows of several layers --------------------------------------------------------------------------


def joined(layers: list[Any]) -> BlockFP8Linear:
    """Return one layer with the rows of all; each is of one size and without bias. Its blocks are
    such that none is of two layers."""
    block, rows = block_of(layers[0]), layers[0].out_features
    low = gcd(rows, block[0])
    scales = [
        as_blocks(one.weight_scale_inv.data).repeat_interleave(block[0] // low, 0)[: rows // low]
        for one in layers
    ]
    inputs = [
        one.activation_scale.data.view(1) for one in layers if one.activation_scale is not None
    ]
    vendor = BlockFP8Linear(
        torch.cat([one.weight.data for one in layers]),
        torch.cat(scales),
        (low, block[1]),
        None,
        torch.cat(inputs) if inputs else None,
        len(layers),
    )
    vendor.of_parts = declared_block(layers[0])
    return vendor


def split(module: nn.Module, parts: int) -> list[BlockFP8Linear] | None:
    """Return the layers that the rows of a stack are of, `parts` of one size; None where numbers
    that share a scale are of two of them."""
    vendor: Any = module
    rows, held = vendor.out_features // parts, vendor.weight_scale_inv.data
    if vendor.parts not in (1, parts) or vendor.out_features % parts:
        return None
    if held.ndim < 2:  # the same scale for each of them
        scales = [held] * parts
    elif rows % vendor.block[0]:
        return None
    else:
        height = (vendor.of_parts or (rows,))[0]
        scales = [one[:: height // gcd(rows, height)] for one in held.chunk(parts)]
        if vendor.of_parts is None:
            scales = [one.view(()) for one in scales]
    inputs = _data(vendor.activation_scale)
    known = [None] * parts if inputs is None else [one.clone() for one in inputs.view(parts)]
    pieces = zip(vendor.weight.data.chunk(parts), scales, known, strict=True)
    return [
        BlockFP8Linear(codes.clone(), scale.clone(), vendor.of_parts, None, one)
        for codes, scale, one in pieces
    ]
