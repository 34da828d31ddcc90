"""A layer of a compressed-tensors checkpoint: it holds what the files hold, by their names.

Inputs are rounded as transformers and the library do.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from math import gcd, lcm
from typing import Any

import torch
from torch import Tensor, nn

from quantadapt.compiling import one_kernel
from quantadapt.protocols import rows_of_units
from quantadapt_compressed_tensors.packing import Layout, weight_of
from quantadapt_compressed_tensors.schemes import Args, Scheme

HIGHEST = torch.finfo(torch.float8_e4m3fn).max
SCHEME = "quantadapt_scheme"
"""Attribute of a layer, ours or the library's: how it is rounded."""
Tensors = dict[str, Tensor]

_HELD = ("weight_scale", "weight_zero_point", "weight_global_scale", "weight_g_idx")
"""What a weight is made of beside its codes."""


class CompressedLinear(nn.Module):
    """A linear layer of codes and scales.

    Args:
        scheme: how it is rounded.
        in_features, out_features: its sizes.
        tensors: what a file holds of it, by its name there, without bias.
        bias: [out_features] or None.
        parts: how many layers the rows are of: several where it is a stack of experts. What goes
            into a stack is not rounded.
    """

    def __init__(
        self,
        scheme: Scheme,
        in_features: int,
        out_features: int,
        tensors: Mapping[str, Tensor],
        bias: Tensor | None,
        parts: int = 1,
    ) -> None:
        super().__init__()
        setattr(self, SCHEME, scheme)
        self.of_parts = scheme  # how each part is rounded in files
        self.in_features, self.out_features, self.parts = in_features, out_features, parts
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product with the dequantized weight, of rounded inputs where the scheme says
        so."""
        return forward(self, x)


def scheme_of(module: nn.Module) -> Scheme:
    """Return how a layer is rounded."""
    scheme: Scheme = getattr(module, SCHEME)
    return scheme


def tensors_of(module: nn.Module) -> Tensors:
    """Return what a layer holds beside its bias, by name."""
    held = {**module._parameters, **module._buffers}
    return {n: t.data for n, t in held.items() if t is not None and n != "bias"}


def codes_name(scheme: Scheme) -> str:
    """Return what the tensor of codes is called."""
    return "weight_packed" if scheme.format.endswith("pack-quantized") else "weight"


def dequantize(module: nn.Module) -> Tensor:
    """Return the weight of a layer in float32."""
    scheme, tensors = scheme_of(module), tensors_of(module)
    return _weight(scheme, tensors, *sizes_of(module))


def dequantize_rows(module: nn.Module, first: int, last: int) -> Tensor:
    """Return the rows from `first` to before `last` of what `dequantize` returns."""
    scheme, tensors = scheme_of(module), tensors_of(module)
    rows, columns = sizes_of(module)
    height, words = scheme.weights.block(rows, columns)[0], 32 // gcd(32, scheme.weights.num_bits)

    def read(start: int, end: int) -> Tensor:
        own = {name: _rows(name, tensor, start, end) for name, tensor in tensors.items()}
        return _weight(scheme, own, min(end, rows) - start, columns)

    def _rows(name: str, tensor: Tensor, start: int, end: int) -> Tensor:
        """Return what of a tensor is about those rows; one of all rows is about any."""
        if name == "weight_zero_point" and tensor.dtype == torch.int32:  # in words along the rows
            bits = scheme.weights.num_bits
            return tensor[start * bits // 32 : -(-end * bits // 32)]
        if name in (codes_name(scheme), "weight_global_scale"):
            return tensor if len(tensor) == 1 else tensor[start:end]
        if name not in _HELD or name == "weight_g_idx" or len(tensor) == 1:
            return tensor
        return tensor[start // height : -(-end // height)]

    unit = lcm(1 if height == rows else height, words)
    return rows_of_units(first, last, unit, read)


def sizes_of(module: Any) -> tuple[int, int]:
    """Return how many rows and columns the weight of a layer has."""
    return module.out_features, module.in_features


def _weight(scheme: Scheme, tensors: Tensors, rows: int, columns: int) -> Tensor:
    names = (codes_name(scheme), *(name for name in _HELD if name in tensors))
    args = scheme.weights
    height, width = args.block(rows, columns)
    powers = scheme.has_power_scales
    layout = Layout(names, args.num_bits, rows, columns, height, width, powers)
    return one_kernel(weight_of, *(tensors[name] for name in names), static=(layout,))


def forward(module: nn.Module, x: Tensor) -> Tensor:
    """Run a layer, ours or the library's, with its bias."""
    bias: Any = module.bias
    given = None if bias is None else bias.to(x.dtype)
    weight = dequantize(module).to(x.dtype)
    return nn.functional.linear(rounded_inputs(module, x), weight, given)


@torch.no_grad()
def rounded_inputs(module: nn.Module, x: Tensor) -> Tensor:
    """Return what goes into a layer, rounded as its scheme says, in the dtype of `x`. A token is
    the last dimension."""
    inputs = scheme_of(module).inputs
    if inputs is None or getattr(module, "parts", 1) > 1 or not x.numel():
        return x
    tokens = x.reshape(1, -1, x.shape[-1])
    plain = inputs.num_bits == 8 and inputs.symmetric and inputs.scale_dtype is None
    found = _rounded(inputs, module, tokens) if plain else _by_library(inputs, module, tokens)
    return found.to(x.dtype).view(x.shape)


def _rounded(args: Args, module: Any, tokens: Tensor) -> Tensor:
    """Do what the library does, bit by bit, for 8 bits without zero points: its own code waits for
    the GPU in each layer."""
    floats = args.type == "float"
    width = args.group_size if args.is_grouped else tokens.shape[-1]
    if args.dynamic and args.strategy != "tensor":
        return one_kernel(_by_own, tokens, static=(width, floats), written=_by_one_kernel)
    scale = module.input_scale if not args.dynamic else _scale(tokens.abs().amax().view(-1), floats)
    if args.is_grouped:
        tokens = tokens.unflatten(-1, (-1, width))  # type: ignore[no-untyped-call]
    return _by_scale(tokens, scale, floats)


def _by_own(tokens: Tensor, width: int, floats: bool) -> Tensor:
    """Round each `width` neighbours by a scale of their own."""
    groups = tokens.unflatten(-1, (-1, width))  # type: ignore[no-untyped-call]
    scale = _scale(groups.abs().amax(-1, keepdim=True), floats)
    return _by_scale(groups, scale, floats).view(tokens.shape)


def _by_one_kernel(tokens: Tensor, width: int, floats: bool, _: torch.dtype | None) -> Tensor:
    from quantadapt.triton_rounding import WIDEST, rounded

    if width > WIDEST:
        return _by_own(tokens, width, floats)
    eps = torch.finfo(tokens.dtype).eps
    return rounded(tokens, width, _highest(floats), eps, floats=floats)


def _highest(floats: bool) -> float:
    return HIGHEST if floats else 127.5


def _scale(largest: Tensor, floats: bool) -> Tensor:
    scale = largest / _highest(floats)
    return scale.masked_fill(scale == 0, torch.finfo(scale.dtype).eps)


def _by_scale(numbers: Tensor, scale: Tensor, floats: bool) -> Tensor:
    scaled = numbers / scale
    if floats:
        codes = scaled.clamp(-HIGHEST, HIGHEST).to(torch.float8_e4m3fn)
    else:
        codes = scaled.clamp(-128, 127).round()
    rounded: Tensor = codes.to(scale.dtype) * scale
    return rounded


def _by_library(args: Args, module: Any, tokens: Tensor) -> Tensor:
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    known, whole = library_args(args), getattr(module, "input_global_scale", None)
    if args.dynamic:
        scale, zero = compute_dynamic_scales_and_zp(tokens, known, module, global_scale=whole)
    else:
        scale, zero = module.input_scale, getattr(module, "input_zero_point", None)
    rounded: Tensor = fake_quantize(tokens, scale, zero, known, global_scale=whole)
    return rounded


@cache
def library_args(args: Args) -> Any:
    """Return the library's object that says the same."""
    from compressed_tensors.quantization import QuantizationArgs

    values = args.said()
    values.pop("actorder", None)  # it says how scales were found; newer libraries refuse "group"
    return QuantizationArgs(**values)
