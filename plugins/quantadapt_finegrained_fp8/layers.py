"""A layer of a fine-grained FP8 checkpoint: codes in e4m3 and a scale for each block of them.

Weights are [out_features, in_features], scales [blocks of rows, blocks of columns]; the last block
of a row or column may be cut off.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantadapt.compiling import one_kernel
from quantadapt.protocols import ByteCodes, CodebookGrid, float8_levels, rows_of_units

HIGHEST = torch.finfo(torch.float8_e4m3fn).max
Block = tuple[int, int]
"""Rows and columns that share a scale."""


class BlockFP8Linear(nn.Module):
    """A linear layer in FP8; its tensors are called as in files.

    Args:
        weight: float8_e4m3fn.
        scales: float32 or float8_e8m0fnu, [blocks of rows, blocks of columns]; without a block [].
        block: rows and columns that share a scale; None: all.
        bias: [out_features] or None.
        activation_scale: of all inputs, where they are rounded by one that is known; else None.
        parts: how many layers the rows are of: several where it is a stack of experts.
    """

    def __init__(
        self,
        weight: Tensor,
        scales: Tensor,
        block: Block | None,
        bias: Tensor | None,
        activation_scale: Tensor | None = None,
        parts: int = 1,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.block = self.of_parts = block
        self.parts = parts
        for name, tensor in {
            "weight": weight,
            "weight_scale_inv": scales,
            "activation_scale": activation_scale,
            "bias": bias,
        }.items():
            made = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
            self.register_parameter(name, made)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product with the dequantized weight, of rounded inputs."""
        return forward(self, x)


def block_of(module: Any) -> Block:
    """Return the rows and columns that share a scale in a layer, ours or transformers'; no more
    than it has."""
    return block_within(declared_block(module), module.weight.shape)


def block_within(block: Any, shape: Any) -> Block:
    """Return a block, or all of a weight where there is none, no larger than `shape`."""
    height, width = (min(int(n), side) for n, side in zip(block or shape, shape, strict=True))
    return height, width


def declared_block(module: Any) -> Block | None:
    """Return the block of a layer, ours or transformers', which may be larger than its weight;
    None: all of it shares a scale."""
    found: Block | None = module.block if hasattr(module, "block") else module.block_size
    return found


def as_blocks(scales: Tensor) -> Tensor:
    """Return scales as [blocks of rows, blocks of columns]; a single one is that of one block."""
    return scales if scales.ndim == 2 else scales.view(1, 1)


def dequantize(module: Any) -> Tensor:
    """Return the weight of a layer in float32."""
    scales = module.weight_scale_inv.data
    return one_kernel(weight_of, module.weight.data, scales, static=block_of(module))


def dequantize_rows(module: Any, first: int, last: int) -> Tensor:
    """Return the rows from `first` to before `last` of what `dequantize` returns."""
    (height, width), scales = block_of(module), module.weight_scale_inv.data

    def read(start: int, end: int) -> Tensor:
        own = scales[start // height : end // height] if scales.ndim == 2 else scales
        return one_kernel(weight_of, module.weight.data[start:end], own, static=(height, width))

    return rows_of_units(first, last, height if scales.ndim == 2 else 1, read)


def weight_of(codes: Tensor, scales: Tensor, height: int, width: int) -> Tensor:
    """Return a weight of blocks of that many rows and columns, in float32."""
    spread = spread_scales(as_blocks(scales.float()), codes.shape, (height, width))
    return codes.float() * spread


def spread_scales(scales: Tensor, shape: Any, block: Block) -> Tensor:
    """Return the scales, [blocks, blocks], as they broadcast over a weight."""
    rows, columns = shape
    if len(scales) > 1:
        scales = scales.repeat_interleave(block[0], 0)[:rows]
    if scales.shape[1] > 1:
        scales = scales.repeat_interleave(block[1], 1)[:, :columns]
    return scales


def byte_codes(module: Any) -> ByteCodes:
    """Return the codes, and the scales as they are held: of blocks."""
    scale, (height, width) = as_blocks(module.weight_scale_inv.data), block_of(module)
    levels = float8_levels(torch.float8_e4m3fn, scale.device)
    grid = CodebookGrid(scale=scale, group_size=width, dtype=torch.float32, levels=levels)
    return ByteCodes(held=module.weight.data, grid=grid, height=height)


# Inputs ------------------------------------------------------------------------------------------


def forward(module: Any, x: Tensor) -> Tensor:
    """Run a layer, ours or transformers', with its bias: its inputs are rounded as the kernels do
    that serve it."""
    bias = None if module.bias is None else module.bias.to(x.dtype)
    weight = dequantize(module).to(x.dtype)
    return nn.functional.linear(rounded_inputs(module, x), weight, bias)


@torch.no_grad()
def rounded_inputs(module: Any, x: Tensor) -> Tensor:
    """Return what goes into a layer, rounded to e4m3: by the scale that the checkpoint has, or one
    for each token and block of columns. Scales are powers of two where those of the weight are."""
    if getattr(module, "parts", 1) > 1:
        return x
    if (scale := module.activation_scale) is not None:
        return one_kernel(_by_known, x, scale.data, written=_by_known_in_one_kernel)
    powers = module.weight_scale_inv.dtype == torch.float8_e8m0fnu
    return one_kernel(_by_group, x, static=(block_of(module)[1], powers), written=_by_one_kernel)


def _by_known(x: Tensor, scale: Tensor) -> Tensor:
    return (rounded_codes(x.float() / scale.float()).float() * scale.float()).to(x.dtype)


def _by_known_in_one_kernel(x: Tensor, scale: Tensor, _: torch.dtype | None) -> Tensor:
    from quantadapt.triton_rounding import rounded_by

    return rounded_by(x, scale, torch.float8_e4m3fn, x.dtype)


def _by_group(x: Tensor, width: int, powers: bool) -> Tensor:
    columns = x.shape[-1]
    groups = nn.functional.pad(x.float(), (0, -columns % width))
    groups = groups.view(*x.shape[:-1], -1, width)
    scale = scale_of(groups.abs().amax(-1, keepdim=True), powers)
    rounded: Tensor = (rounded_codes(groups / scale).float() * scale).flatten(-2)
    return rounded[..., :columns].to(x.dtype)


def _by_one_kernel(x: Tensor, width: int, powers: bool, _: torch.dtype | None) -> Tensor:
    from quantadapt.triton_rounding import WIDEST, rounded

    if width > WIDEST:
        return _by_group(x, width, powers)
    return rounded(x, width, HIGHEST, 1.0, floats=True, powers=powers, whole=True)


def rounded_codes(scaled: Tensor) -> Tensor:
    """Return the nearest codes, float8_e4m3fn, of numbers that are divided by their scale."""
    return scaled.clamp(-HIGHEST, HIGHEST).to(torch.float8_e4m3fn)


def scale_of(largest: Tensor, powers: bool) -> Tensor:
    """Return the scale, float32, with which the largest number of a block is the largest code."""
    scale = largest / HIGHEST
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return torch.exp2(scale.log2().ceil()) if powers else scale
