"""The values that the weights of a layer can take with the scales that it has."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from quantadapt.loading import linear_layers
from quantadapt.protocols import CodebookGrid, Grid, UniformGrid, float8_levels
from quantadapt_compressed_tensors.layers import (
    CompressedLinear,
    Tensors,
    scheme_of,
    tensors_of,
)
from quantadapt_compressed_tensors.packing import unpack_fp4
from quantadapt_compressed_tensors.rounding import GRID, grid_of
from quantadapt_compressed_tensors.rows import joined, repacked, split
from quantadapt_compressed_tensors.schemes import Args, Scheme


def values_of(module: nn.Module) -> Grid:
    """Return the grid of a layer; its values are what `dequantize` gives, in float32."""
    args, parts, order = scheme_of(module).weights, grid_of(module), tensors_of(module)
    columns = int(module.in_features)  # type: ignore[arg-type]
    rows = int(module.out_features)  # type: ignore[arg-type]
    scale, zero = parts["weight_scale"], parts.get("weight_zero_point")
    if (whole := parts.get("weight_global_scale")) is not None:
        scale = scale / whole
    height, width = args.block(rows, columns)
    groups = order.get("weight_g_idx")
    common = {
        "scale": _for_each_row(scale, height, rows),
        "zero": None if zero is None else _for_each_row(zero, height, rows),
        "group_size": width,
        "dtype": torch.float32,
        "groups": None if groups is None else groups.long(),
    }
    if args.type == "int":
        half = 2 ** (args.num_bits - 1)
        return UniformGrid(**common, lowest=-half, highest=half - 1)  # type: ignore[arg-type]
    return CodebookGrid(**common, levels=_levels(args.num_bits, scale.device))  # type: ignore[arg-type]


def _for_each_row(scale: Tensor, height: int, rows: int) -> Tensor:
    """Return scales, or zero points, [rows, groups of a row]."""
    if scale.ndim == 1:
        return scale.view(1, 1).expand(rows, 1)
    return scale.repeat_interleave(height, 0)[:rows]


@cache
def _levels(bits: int, device: torch.device) -> Tensor:
    if bits == 8:
        return float8_levels(torch.float8_e4m3fn, device)
    with torch.inference_mode(False):
        codes = torch.arange(16, device=device).to(torch.uint8)
        return unpack_fp4(codes[None])[0, ::2].contiguous()


def lend_grids(scheme: Scheme, base: nn.Module, dense: nn.Module, *, rounded: bool = False) -> None:
    """Have the layers of a merged, dense model know the grids that those of its base have, where
    they are such as `scheme` has: layers without an adapter then keep their values. What an adapter
    adds to others is dithered: nearest to nearly all of it are the base's own values.

    Args:
        scheme: how they will be rounded.
        base: with facades, and an adapter.
        dense: gets an attribute for each layer.
        rounded: whether its weights are on the grids already, so that nothing is dithered.
    """
    from quantadapt.facade import linear_facades

    layers = dict(linear_layers(dense, ()))
    for name, facade in linear_facades(base):
        linear = layers.get(name.removesuffix(".base_layer"))
        known = facade.target.grid(facade.vendor)
        if linear is None or known is None:
            continue
        shape = linear.weight.shape
        found = _like(scheme.weights, known, shape) if isinstance(known, UniformGrid) else None
        if found is not None:
            setattr(linear, GRID, found)
        if not rounded and (found is not None or _has_levels(scheme.weights, known, shape)):
            with torch.no_grad():
                merged = linear.weight.detach().to(facade.device)
                # Begun with as it was merged into: what 16 bits round away there is no change.
                change = merged.float() - facade.dequantize().to(merged.dtype).float()
                linear.weight.copy_(facade.moved(change))


def _has_levels(args: Args, grid: Grid, shape: torch.Size) -> bool:
    """Say whether values are floats as those of `args`: scales made anew are then next to the same,
    and the base's own values nearest to nearly all merged ones."""
    if args.type != "float" or not isinstance(grid, CodebookGrid) or grid.groups is not None:
        return False
    both = (grid.levels, _levels(args.num_bits, grid.levels.device))
    theirs, own = (levels[levels.isfinite()].sort().values for levels in both)
    return grid.group_size == args.block(*shape)[1] and torch.equal(theirs, own)


def _like(args: Args, grid: UniformGrid, shape: torch.Size) -> Tensors | None:
    """Return a grid of integers as one of `args`; None where it is none."""
    half = 2 ** (args.num_bits - 1)
    rows, columns = shape
    whole = columns if args.strategy == "channel" else args.group_size
    if args.type != "int" or grid.groups is not None or grid.group_size != whole:
        return None
    if grid.highest - grid.lowest != 2 * half - 1 or grid.scale.shape != args.scales(rows, columns):
        return None
    zero = torch.zeros_like(grid.scale) if grid.zero is None else grid.zero.float()
    zero = zero - grid.lowest - half
    allowed = 0 if args.symmetric else half
    if not bool((zero == zero.round()).all()) or bool(zero.abs().max() > allowed):
        return None
    found = {"weight_scale": grid.scale.float()}
    if not args.symmetric:
        found["weight_zero_point"] = zero.to(torch.int8)
    return found


def repack(module: nn.Module, weight: Tensor) -> CompressedLinear:
    """Return a layer with the scales of `module` that holds the values nearest to `weight`."""
    weight = weight.detach().float()
    if (parts := getattr(module, "parts", 1)) > 1:
        pieces = zip(split(module, parts) or (), weight.chunk(parts), strict=True)
        return joined([repack(part, piece) for part, piece in pieces])
    return repacked(module, values_of(module).nearest(weight), grid_of(module))
