"""quanto's layers and the weights that they hold: unpacked and dequantized in torch alone."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from quantadapt.compiling import one_kernel
from quantadapt.protocols import UniformGrid

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, eq=False, kw_only=True)
class ShiftedGrid(UniformGrid):
    """Values scale * code - shift, with the shift in place of a zero point."""

    def _codes(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        assert zero is not None
        return super()._codes(weight, scale, zero / scale)

    def _values(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        assert zero is not None
        return scale * codes.to(self.dtype) - zero


def is_quanto(module: nn.Module) -> bool:
    vendor: Any = module
    names = [kind.__name__ for kind in type(module).__mro__]
    return "QLinear" in names and vendor.frozen and not vendor.activation_qtype


@cache
def layer_class() -> Any:
    from optimum.quanto import QLinear
    from torch.nn.functional import linear

    class PlainQLinear(QLinear):  # type: ignore[misc]
        """Multiplies with the dequantized weight. quanto would compile code to unpack some, and for
        int8 in bfloat16 call a kernel of PyTorch's that reads past rows on a CPU, unless their
        length is a multiple of 16."""

        def forward(self, x: Tensor) -> Tensor:
            return linear(x, dequantize(self.weight).to(x.dtype), self.bias)

    return PlainQLinear


def dequantize(weight: Any) -> Tensor:
    if not is_packed(weight):
        return one_kernel(scaled, weight._data, weight._scale, otherwise=weight.dequantize)
    return one_kernel(
        _dequantize_packed,
        *(weight._data._data, weight._scale, weight._shift),
        static=(weight.qtype.bits, weight._data.shape[0], tuple(weight.shape)),
    )


def scaled(codes: Tensor, scale: Tensor) -> Tensor:
    return scale * codes.to(scale.dtype)


def _dequantize_packed(
    packed: Tensor, scale: Tensor, shift: Tensor, bits: int, rows: int, shape: tuple[int, ...]
) -> Tensor:
    return (scale * unpack(packed, bits)[:rows] - shift).reshape(shape)


def packed_rows(weight: Any, first: int, last: int) -> Tensor:
    """Return some rows: of groups that are rows of their own, of which a byte holds one of each
    part."""
    import torch

    held, bits = weight._data._data, weight.qtype.bits
    rows, columns = weight.shape
    each = weight._data.shape[0] // rows  # groups in a row
    parts, size = [], len(held)
    for n, shift in enumerate(range(0, 8, bits)):
        start, end = max(first * each, n * size), min(last * each, (n + 1) * size)
        if start < end:
            part = held[start - n * size : end - n * size]
            parts.append((part >> shift) & (2**bits - 1))
    own = slice(first * each, last * each)
    static = (last - first, columns)
    return one_kernel(
        _shifted, torch.cat(parts), weight._scale[own], weight._shift[own], static=static
    )


def _shifted(codes: Tensor, scale: Tensor, shift: Tensor, *shape: int) -> Tensor:
    return (scale * codes - shift).reshape(shape)


def is_packed(weight: Any) -> bool:
    """Say whether several codes share a byte, in quanto's plain packing with float shifts."""
    packed = type(weight).__name__ == "WeightQBitsTensor"
    return packed and weight.axis == 0 and weight._shift.is_floating_point()


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Return the codes of a packed uint8 tensor; a byte holds one code of each part of the rows."""
    import torch

    shifts = range(0, 8, bits)
    return torch.cat([(packed >> shift) & (2**bits - 1) for shift in shifts])


def completed(module: Any, bias: Tensor | None, scale: Tensor) -> nn.Module:
    """Give a module that was made on the meta device, and has its weight, everything else."""
    import torch
    from torch import nn

    if bias is not None:
        module.bias = nn.Parameter(bias.to(scale.dtype), requires_grad=False)
    for name in ("input_scale", "output_scale"):  # of activations, which are not quantized
        setattr(module, name, torch.ones((), dtype=scale.dtype, device=scale.device))
    vendor: nn.Module = module
    return vendor


@cache
def make_copyable() -> None:
    """Teach quanto's tensors `copy.deepcopy`, for which they lack a clone of their own."""
    from optimum.quanto import QTensor
    from optimum.quanto.tensor.packed import PackedTensor

    QTensor.__deepcopy__ = PackedTensor.__deepcopy__ = _deepcopy


def _deepcopy(tensor: Any, memo: dict[int, Any]) -> Any:
    from torch import nn

    if id(tensor) in memo:
        return memo[id(tensor)]
    names, meta = tensor.__tensor_flatten__()
    parts = {name: copy.deepcopy(getattr(tensor, name).detach(), memo) for name in names}
    copied = type(tensor).__tensor_unflatten__(parts, meta, None, None)
    if isinstance(tensor, nn.Parameter):
        copied = nn.Parameter(copied, requires_grad=tensor.requires_grad)
    memo[id(tensor)] = copied
    return copied
