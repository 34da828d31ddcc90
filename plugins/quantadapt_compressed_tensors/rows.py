"""Layers that are quantized, and quantized again; rows of several layers as one, as a stack of
experts is, and each by itself again, as files hold them."""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

from quantadapt.errors import ModelError
from quantadapt_compressed_tensors.layers import (
    CompressedLinear,
    Tensors,
    scheme_of,
    tensors_of,
)
from quantadapt_compressed_tensors.rounding import (
    GRID,
    better_grid,
    fresh_grid,
    grid_of,
    in_groups,
    pack_zeros,
    packed,
    zeros_of,
)
from quantadapt_compressed_tensors.schemes import Scheme


def quantized(scheme: Scheme, linear: nn.Linear) -> CompressedLinear:
    """Return a dense layer rounded to nearest, without what is known of its inputs. A block of it
    takes the grid that it is known to lie on, where that is closer."""
    weight = linear.weight.detach()
    args, dtype, weight = scheme.weights, weight.dtype, weight.float()
    grid = fresh_grid(args, weight, dtype)
    if (known := getattr(linear, GRID, None)) is not None:
        grid = better_grid(args, weight, grid, known)
    tensors = packed(scheme, weight, grid, dtype)
    bias = None if linear.bias is None else linear.bias.detach()
    return CompressedLinear(scheme, linear.in_features, linear.out_features, tensors, bias)


def requantized(module: nn.Module, weight: Tensor) -> CompressedLinear:
    """Return a layer like `module` that holds another weight; a block of it keeps the grid that it
    has where that is closer."""
    weight = weight.detach().float()
    if (parts := getattr(module, "parts", 1)) > 1:
        pieces = zip(split(module, parts) or (), weight.chunk(parts), strict=True)
        return joined([requantized(part, piece) for part, piece in pieces])
    args, held = scheme_of(module).weights, tensors_of(module)
    order = held.get("weight_g_idx")
    sides = in_groups(weight, order)
    fresh = fresh_grid(args, sides, held["weight_scale"].dtype)
    return repacked(module, weight, better_grid(args, sides, fresh, grid_of(module)))


def repacked(module: nn.Module, weight: Tensor, grid: Tensors) -> CompressedLinear:
    """Return a layer like `module`, of one part, that holds `weight`, float32, rounded onto a
    grid."""
    scheme, held = scheme_of(module), tensors_of(module)
    kept = {n: t for n, t in held.items() if n.startswith("input_") or n == "weight_g_idx"}
    grid = grid | {n: t for n, t in kept.items() if n == "weight_g_idx"}
    tensors = packed(scheme, weight, grid, held["weight_scale"].dtype)
    rows, columns = weight.shape
    bias: Any = module.bias
    return CompressedLinear(
        scheme, columns, rows, tensors | kept, None if bias is None else bias.detach()
    )


# Rows of several layers --------------------------------------------------------------------------


def joined(layers: list[Any]) -> CompressedLinear:
    """Return one layer with the rows of all; each is of one size and without bias.

    Raises:
        ModelError: they are rounded in several ways, or have their columns in different groups.
    """
    scheme, held = _common_scheme(layers), [tensors_of(layer) for layer in layers]
    first, order = held[0], _common_order(held)
    columns, rows = layers[0].in_features, layers[0].out_features
    made = {name: torch.cat([one[name] for one in held]) for name in first if name not in _SPREAD}
    tall = _tall(scheme, rows)
    for name in first.keys() & {"weight_scale", "weight_global_scale"}:
        made[name] = torch.cat([_by_row(scheme, one[name], rows) for one in held])
    if "weight_zero_point" in first:
        zeros = [_by_row(scheme, zeros_of(scheme, one, rows), rows) for one in held]
        made["weight_zero_point"] = pack_zeros(scheme, torch.cat(zeros))
    if order is not None:
        made["weight_g_idx"] = order
    rows *= len(layers)
    if "weight_shape" in first:
        made["weight_shape"] = torch.tensor([rows, columns], device=layers[0].weight_packed.device)
    vendor = CompressedLinear(tall, columns, rows, made, None, len(layers))
    vendor.of_parts = scheme
    return vendor


def _common_scheme(layers: list[Any]) -> Scheme:
    """Return how all of the layers are rounded. Raises ModelError where that differs."""
    scheme = scheme_of(layers[0])
    if any(scheme_of(layer) != scheme for layer in layers):
        what = "its experts are quantized by several schemes"
        raise ModelError(what, fix="use a checkpoint that has one for all experts of a block")
    return scheme


def _common_order(held: list[Tensors]) -> Tensor | None:
    """Return the group of each column, [in_features], where those of a group are not side by side.
    Raises ModelError where that differs."""
    order = held[0].get("weight_g_idx")
    if order is not None and not all(torch.equal(one["weight_g_idx"], order) for one in held):
        what = "its experts have their columns in different groups (weight_g_idx)"
        raise ModelError(what, fix="use a checkpoint that was made with actorder: weight or null")
    return order


_SPREAD = (
    "weight_scale",
    "weight_global_scale",
    "weight_zero_point",
    "weight_g_idx",
    "weight_shape",
)
"""What is not simply laid one under the other when layers are joined."""


def _tall(scheme: Scheme, rows: int) -> Scheme:
    """Return how layers of `rows` rows are rounded when they are joined: what was of a whole layer
    is of each of its rows, and blocks are such that none is of two layers."""
    args = scheme.weights
    if args.strategy == "tensor":
        args = args.model_copy(update={"strategy": "channel"})
    elif args.block_structure is not None:
        height, width = args.block_structure
        args = args.model_copy(update={"block_structure": (gcd(rows, height), width)})
    return scheme.model_copy(update={"weights": args})


def _by_row(scheme: Scheme, scale: Tensor, rows: int) -> Tensor:
    """Return scales, or zero points, of one layer as the joined one has them."""
    if scale.ndim == 1:
        return scale.view(1, 1).expand(rows, 1)
    if scheme.weights.block_structure is None:
        return scale
    height = scheme.weights.block_structure[0]
    low = gcd(rows, height)
    return scale.repeat_interleave(height // low, 0)[: rows // low]


def split(module: nn.Module, parts: int) -> list[CompressedLinear] | None:
    """Return the layers that the rows of a stack are of, `parts` of one size; None where numbers
    that share a scale are of two of them."""
    vendor: Any = module
    if (known := getattr(vendor, "parts", 1)) not in (1, parts):
        return None
    scheme, held = scheme_of(vendor), tensors_of(vendor)
    own = vendor.of_parts if known > 1 else scheme
    rows, columns = vendor.out_features // parts, vendor.in_features
    height = scheme.weights.block(rows, columns)[0]
    if vendor.out_features % parts or (scheme.weights.strategy == "block" and rows % height):
        return None
    if "weight_zero_point" in held:
        held["weight_zero_point"] = zeros_of(scheme, held, vendor.out_features)
    found = []
    for n in range(parts):
        tensors = {name: _part(tensor, n, parts, name) for name, tensor in held.items()}
        for name in tensors.keys() & {"weight_scale", "weight_zero_point", "weight_global_scale"}:
            tensors[name] = _of_one(own, name, tensors[name], rows, columns)
        if "weight_zero_point" in tensors:
            tensors["weight_zero_point"] = pack_zeros(own, tensors["weight_zero_point"])
        if "weight_shape" in tensors:
            tensors["weight_shape"] = torch.tensor([rows, columns])
        found.append(CompressedLinear(own, columns, rows, tensors, None))
    return found


def _part(tensor: Tensor, n: int, parts: int, name: str) -> Tensor:
    if name in ("weight_g_idx", "weight_shape") or len(tensor) == 1:  # of all rows
        return tensor.clone()
    return tensor.chunk(parts)[n].contiguous()


def _of_one(own: Scheme, name: str, scale: Tensor, rows: int, columns: int) -> Tensor:
    """Undo `_by_row`."""
    if name == "weight_global_scale" or own.weights.strategy == "tensor":
        return scale.reshape(-1)[:1].clone()
    if own.weights.block_structure is None:
        return scale
    height = own.weights.block_structure[0]
    return scale[:: height // gcd(rows, height)].contiguous()
