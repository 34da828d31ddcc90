"""INC's FP8 layers in its QDQ mode, without its passes through the whole weight and each input.

The weight of such a layer is called [in_features, out_features] and lies in memory as rows of
outputs. Its inputs are rounded by the scale that calibration found.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantadapt.compiling import one_kernel
from quantadapt.protocols import ByteCodes, CodebookGrid, float8_levels


def dequantize(layer: Any) -> Tensor:
    """Return the weight, [out_features, in_features], as the vendor computes it."""
    return one_kernel(weight_of, _codes(layer), _scales(layer), static=(layer.hp_dtype,))


def weight_of(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what codes [rows, columns] stand for, by scales [1 or rows, 1], in `dtype`."""
    return (codes.float() * scales).to(dtype)


def byte_codes(layer: Any) -> ByteCodes | None:
    """Return the codes; None where they lie otherwise."""
    codes, scales = _codes(layer), _scales(layer)
    if codes.element_size() > 1 or not codes.is_contiguous():
        return None
    rows, columns = codes.shape
    levels = float8_levels(codes.dtype, codes.device)
    grid = CodebookGrid(scale=scales, group_size=columns, dtype=torch.float32, levels=levels)
    return ByteCodes(held=codes, grid=grid, height=rows // len(scales))


def _codes(layer: Any) -> Tensor:
    codes: Tensor = layer.weight.data.t()
    return codes


def _scales(layer: Any) -> Tensor:
    """Return the scales, float32 [1 or out_features, 1]: INC keeps a single one as a number."""
    scale = layer.dequant_weights.scale
    if isinstance(scale, Tensor):
        return scale.data.float().view(-1, 1)
    return torch.full((1, 1), scale, dtype=torch.float32, device=layer.weight.device)


def forward(layer: Any, x: Tensor) -> Tensor:
    """Return what the vendor's forward gives, to the bit on a CPU."""
    y = rounded_inputs(layer, x) @ dequantize(layer).t()
    return y if layer.bias is None else y + layer.bias


@torch.no_grad()
def rounded_inputs(layer: Any, x: Tensor) -> Tensor:
    """Return what goes into a layer, rounded to FP8, in its compute dtype."""
    scale = layer.quant_input.scale
    if isinstance(scale, Tensor):
        rounded: Tensor = layer.quant_input(x)
        return rounded
    given = (float(scale), layer.lp_dtype, layer.hp_dtype)
    return one_kernel(_by_scale, x, static=given, written=_by_one_kernel)


def _by_scale(x: Tensor, scale: float, kind: torch.dtype, dtype: torch.dtype) -> Tensor:
    highest = torch.finfo(kind).max
    codes = (x.float() / scale).clamp(-highest, highest).to(kind)
    return (codes.float() * scale).to(dtype)


def _by_one_kernel(
    x: Tensor, scale: float, kind: torch.dtype, dtype: torch.dtype, _: torch.dtype | None
) -> Tensor:
    from quantadapt.triton_rounding import rounded_by

    return rounded_by(x, scale, kind, dtype)
