"""auto-round's PyTorch layer: how it packs codes, how weights come out of it, and its kernel."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from math import gcd
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantadapt.compiling import one_kernel
from quantadapt.dense_words import dense_of_words, whole_words
from quantadapt.protocols import rows_of_units
from quantadapt_autoround.tuning import give_logging_back

if TYPE_CHECKING:
    from quantadapt_autoround import AutoRound


def is_autoround(module: nn.Module) -> bool:
    """Say whether `module` is auto-round's layer."""
    return type(module).__module__.startswith("auto_round_extension.torch.qlinear_torch")


def zero_offset(vendor: Any) -> int:
    """Return what is taken off zero points before they are packed."""
    return int(type(vendor).__module__.endswith("_zp"))


def empty(quantizer: AutoRound, linear: nn.Linear) -> Any:
    """Return auto-round's layer of that size; the symmetric one counts zero points from 1."""
    from auto_round_extension.torch import (  # type: ignore[import-untyped]
        qlinear_torch,
        qlinear_torch_zp,
    )

    give_logging_back()
    kind: Any = (qlinear_torch_zp if quantizer.sym else qlinear_torch).QuantLinear
    sizes = linear.in_features, linear.out_features
    module = kind(quantizer.bits, quantizer.group_size or -1, *sizes, linear.bias is not None)
    module.iters = quantizer.iters
    return module


def packed(
    quantizer: AutoRound, linear: nn.Linear, scales: Tensor, zeros: Tensor | int
) -> nn.Module:
    """Return auto-round's layer for the weight of `linear`, which is on its grid or close to it.

    Args:
        quantizer: says how it was quantized.
        linear: weight [out_features, in_features].
        scales: [out_features, groups], in any shape; float16 when they are stored.
        zeros: the same, or one number for all groups.
    """
    weight = linear.weight.detach().float()
    scales = scales.reshape(len(weight), -1).to(weight.device)
    zeros = torch.as_tensor(zeros, dtype=torch.float32, device=weight.device)
    zeros = zeros.reshape(len(weight), -1) if zeros.numel() > 1 else zeros.expand_as(scales)
    groups = weight.view(*scales.shape, -1)
    codes = (groups / scales.float()[..., None]).round() + zeros[..., None]
    codes = codes.clamp(0, 2**quantizer.bits - 1).reshape(weight.shape)
    module = empty(quantizer, linear)
    module.qweight = pack_codes(codes, quantizer.bits)
    stored = (zeros.t() - zero_offset(module)).int()
    module.qzeros = _pack(stored, quantizer.bits)
    module.scales = scales.t().half().contiguous()
    module.bias = None if linear.bias is None else linear.bias.detach()
    vendor: nn.Module = module
    return vendor


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Return the `qweight` of a layer for codes [out_features, in_features]."""
    return _pack(codes.int(), bits).t().contiguous()


def _pack(codes: Tensor, bits: int) -> Tensor:
    from auto_round.utils.bit_packing import pack_bitstream

    words: Tensor = pack_bitstream(codes, bits, dim=1)
    return words


def zeros_of(vendor: Any) -> Tensor:
    """Return the zero points of a layer, [out_features, groups]."""
    return (_unpack(vendor.qzeros, vendor.bits, 1) + zero_offset(vendor)).t()


def dequantized(vendor: Any) -> Tensor:
    """Return the weight of a layer, [out_features, in_features], in float16."""
    return _weight(vendor, vendor.qweight, vendor.qzeros, vendor.scales)


def dequantized_rows(vendor: Any, first: int, last: int) -> Tensor:
    """Return the rows from `first` to before `last` of the weight, which are columns of the tensors
    and in words of int32 together."""
    bits = vendor.bits

    def read(start: int, end: int) -> Tensor:
        zeros = vendor.qzeros[:, start * bits // 32 : end * bits // 32]
        return _weight(vendor, vendor.qweight[:, start:end], zeros, vendor.scales[:, start:end])

    return rows_of_units(first, last, 32 // gcd(32, bits), read)


def _weight(vendor: Any, codes: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    tensors = codes, zeros, scales
    packing = (vendor.bits, zero_offset(vendor))
    if vendor.bits == 3:  # auto-round's own unpacking cannot be traced
        return _dequantize(*tensors, *packing)
    size = vendor.infeatures // len(scales)
    fits = whole_words(vendor.bits, size, False) and size * len(scales) == vendor.infeatures
    written = _dequantize_in_order if fits else None
    return one_kernel(_dequantize, *tensors, static=packing, written=written)


def _dequantize(packed: Tensor, zeros: Tensor, scales: Tensor, bits: int, offset: int) -> Tensor:
    codes, zeros = _unpack(packed, bits, 0), _unpack(zeros, bits, 1) + offset
    groups = codes.view(len(zeros), -1, codes.shape[1]) - zeros[:, None]
    return (scales[:, None] * groups).flatten(0, 1).t()


def _dequantize_in_order(
    packed: Tensor, zeros: Tensor, scales: Tensor, bits: int, offset: int, dtype: torch.dtype | None
) -> Tensor:
    return dense_of_words(packed, zeros, scales, bits, offset, False, dtype)


def _unpack(packed: Tensor, bits: int, dim: int) -> Tensor:
    """Return the codes that are packed along dimension 0 or 1 of an int32 matrix."""
    if bits == 3:  # some lie in two words
        from auto_round.utils.bit_packing import unpack_bitstream

        codes: Tensor = unpack_bitstream(packed, bits, dim=dim)
    else:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)
        shifts = shifts[:, None] if dim == 0 else shifts
        codes = (packed.unsqueeze(dim + 1) >> shifts) & (2**bits - 1)
        codes = codes.flatten(dim, dim + 1)
    return codes


# The kernel ------------------------------------------------------------------------------------


def has_kernel(vendor: Any, x: Tensor) -> bool:
    """Say whether auto-round's Triton kernel runs for `x`."""
    return x.is_cuda and vendor.bits != 3 and find_spec("triton") is not None


def product(vendor: Any, x: Tensor) -> Tensor:
    """Dequantize in auto-round's Triton kernel, and multiply, in the dtype of `x`."""
    kernels = "triton_utils_zp" if zero_offset(vendor) else "triton_utils"
    dequant248 = import_module(f"auto_round_extension.triton.{kernels}.dequant").dequant248
    groups = _groups(vendor.infeatures, vendor.group_size, x.device)
    tensors = vendor.qweight, vendor.scales, vendor.qzeros, groups
    weight: Tensor = dequant248(*tensors, vendor.bits, input_dtype=x.dtype)
    return x @ weight if vendor.bias is None else x @ weight + vendor.bias.to(x.dtype)


@cache
def _groups(in_features: int, group_size: int, device: torch.device) -> Tensor:
    """Return the group of each column."""
    return torch.arange(in_features, dtype=torch.int32, device=device) // group_size
