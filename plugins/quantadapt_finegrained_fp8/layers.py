"""A layer of a fine-grained FP8 checkpoint: codes in e4m3 and a scale for each block of them.

Weights are [out_features, in_features], scales [blocks of rows, blocks of columns]; the last block
of a row or column may be cut off.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

from quantadapt.compiling import one_kernel
from quantadapt.errors import ModelError
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
    return _within(_said(module), module.weight.shape)


def _within(block: Any, shape: Any) -> Block:
    height, width = (min(int(n), side) for n, side in zip(block or shape, shape, strict=True))
    return height, width


def _said(module: Any) -> Block | None:
    found: Block | None = module.block if hasattr(module, "block") else module.block_size
    return found


def _as_blocks(scales: Tensor) -> Tensor:
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
    spread = _spread(_as_blocks(scales.float()), codes.shape, (height, width))
    return codes.float() * spread


def _spread(scales: Tensor, shape: Any, block: Block) -> Tensor:
    """Return the scales, [blocks, blocks], as they broadcast over a weight."""
    rows, columns = shape
    if len(scales) > 1:
        scales = scales.repeat_interleave(block[0], 0)[:rows]
    if scales.shape[1] > 1:
        scales = scales.repeat_interleave(block[1], 1)[:, :columns]
    return scales


def byte_codes(module: Any) -> ByteCodes:
    """Return the codes, and the scales as they are held: of blocks."""
    scale, (height, width) = _as_blocks(module.weight_scale_inv.data), block_of(module)
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
    return (_codes(x.float() / scale.float()).float() * scale.float()).to(x.dtype)


def _by_known_in_one_kernel(x: Tensor, scale: Tensor, _: torch.dtype | None) -> Tensor:
    from quantadapt.triton_rounding import rounded_by

    return rounded_by(x, scale, torch.float8_e4m3fn, x.dtype)


def _by_group(x: Tensor, width: int, powers: bool) -> Tensor:
    columns = x.shape[-1]
    groups = nn.functional.pad(x.float(), (0, -columns % width))
    groups = groups.view(*x.shape[:-1], -1, width)
    scale = _scale_of(groups.abs().amax(-1, keepdim=True), powers)
    rounded: Tensor = (_codes(groups / scale).float() * scale).flatten(-2)
    return rounded[..., :columns].to(x.dtype)


def _by_one_kernel(x: Tensor, width: int, powers: bool, _: torch.dtype | None) -> Tensor:
    from quantadapt.triton_rounding import WIDEST, rounded

    if width > WIDEST:
        return _by_group(x, width, powers)
    return rounded(x, width, HIGHEST, 1.0, floats=True, powers=powers, whole=True)


def _codes(scaled: Tensor) -> Tensor:
    return scaled.clamp(-HIGHEST, HIGHEST).to(torch.float8_e4m3fn)


def _scale_of(largest: Tensor, powers: bool) -> Tensor:
    """Return the scale, float32, with which the largest number of a block is the largest code."""
    scale = largest / HIGHEST
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return torch.exp2(scale.log2().ceil()) if powers else scale


# Weights -----------------------------------------------------------------------------------------


def quantized(linear: nn.Linear, block: Block | None, powers: bool) -> BlockFP8Linear:
    """Return a dense layer rounded to nearest; without a block, by one scale."""
    weight = linear.weight.detach().float()
    known = _within(block, weight.shape)
    scales = _scale_of(_by_block(weight.abs(), known).amax((1, 3)), powers)
    bias = None if linear.bias is None else linear.bias.detach()
    codes = _codes(weight / _spread(scales, weight.shape, known))
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
    scales = _as_blocks(held.float())
    if not same_scales:
        largest = _by_block(weight.abs(), block).amax((1, 3))
        fresh = _scale_of(largest, held.dtype == torch.float8_e8m0fnu).to(held.dtype).float()
        errors = [_error(weight, one, block) for one in (scales, fresh)]
        scales = torch.where(errors[1] < errors[0], fresh, scales)
    codes = _codes(weight / _spread(scales, weight.shape, block))
    scales = scales.to(held.dtype).view(held.shape)
    bias, inputs = _data(module.bias), _data(module.activation_scale)
    return BlockFP8Linear(codes, scales, _said(module), bias, inputs)


def _data(tensor: Any) -> Tensor | None:
    return None if tensor is None else tensor.data


def _error(weight: Tensor, scales: Tensor, block: Block) -> Tensor:
    """Return the squared error of each block."""
    spread = _spread(scales, weight.shape, block)
    off = _codes(weight / spread).float() * spread - weight
    return _by_block(off.square(), block).sum((1, 3))


def values_of(module: Any) -> CodebookGrid:
    """Return the values that the weights of a layer can take with the scales that it has."""
    height, width = block_of(module)
    scale = _as_blocks(module.weight_scale_inv.data.float())
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
        _as_blocks(one.weight_scale_inv.data).repeat_interleave(block[0] // low, 0)[: rows // low]
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
    vendor.of_parts = _said(layers[0])
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


# Files -------------------------------------------------------------------------------------------

_ALIASES = {"scale": "weight_scale_inv", "qscale_weight": "weight_scale_inv"}
"""What some checkpoints call the scales."""


def loaded(
    block: Block | None, static: bool, powers: bool, linear: nn.Linear, state: Mapping[str, Tensor]
) -> BlockFP8Linear:
    """Return the layer for what a file holds of it.

    Args:
        block: rows and columns that share a scale; None: one for the whole weight.
        static: whether it holds a scale of its inputs.
        powers: whether scales are powers of two, in a byte.
        linear: on the meta device.
        state: the tensors, without prefix.

    Raises:
        ModelError: one is missing, not known, or of another shape or dtype.
    """
    held = {_ALIASES.get(name, name): tensor for name, tensor in state.items()}
    shape = linear.out_features, linear.in_features
    known = block or shape
    blocks = tuple(-(-size // side) for size, side in zip(shape, known, strict=True))
    wanted: dict[str, tuple[int, ...]] = {"weight": shape, "weight_scale_inv": blocks}
    if static:
        wanted["activation_scale"] = (1,)
    if missing := wanted.keys() - held.keys():
        raise _wrong(f"it has no {' and no '.join(sorted(missing))}")
    if unknown := held.keys() - wanted.keys() - {"bias"}:
        raise _wrong(f"it has {', '.join(sorted(unknown))}, which its format has no place for")
    for name, sizes in wanted.items():
        if [n for n in held[name].shape if n > 1] != [n for n in sizes if n > 1]:
            raise _wrong(f"its {name} is {list(held[name].shape)}, where {list(sizes)} is wanted")
    if held["weight"].dtype != torch.float8_e4m3fn:
        raise _wrong(f"its weight is {held['weight'].dtype}, no float8_e4m3fn")
    scales = held["weight_scale_inv"].reshape(blocks if block else ())
    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    if (scales.dtype == torch.float8_e8m0fnu) != powers:
        raise _wrong(f"its weight_scale_inv is {scales.dtype}, which its scale_fmt is not")
    bias = held.get("bias")
    return BlockFP8Linear(
        held["weight"],
        scales,
        block,
        None if bias is None else bias.to(linear.weight.dtype),
        held["activation_scale"].view(()) if static else None,
    )


def _wrong(what: str) -> ModelError:
    fix = "check that config.json and the weights belong together, or download them again"
    return ModelError(what, fix=fix)
