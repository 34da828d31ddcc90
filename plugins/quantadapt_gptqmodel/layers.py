"""gptqmodel's layers: what they hold of codes, and the weights and products that are made of it.

Codes and weights are [out_features, in_features] here; scales and zeros are [out_features, groups].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

from quantadapt.compiling import one_kernel
from quantadapt.dense_words import dense_of_words, whole_words
from quantadapt.protocols import WordCodes, rows_of_units
from quantadapt_gptqmodel.codes import AWQ_ORDER, unpack, weight_of


def method_of(module: nn.Module) -> str | None:
    """Return "gptq" or "awq" for a layer of gptqmodel. AWQ's classes have GPTQ's among their bases
    in some versions, so they are asked for first."""
    names = [base.__name__ for base in type(module).__mro__]
    if "AWQuantLinear" in names:
        return "awq"
    return "gptq" if "GPTQQuantLinear" in names else None


def unpacked(module: Any) -> tuple[Tensor, Tensor]:
    """Return codes and zeros of a layer."""
    method, bits, _ = _packing(module)
    return _codes(module.qweight, method, bits), zeros_of(module)


def zeros_of(module: Any) -> Tensor:
    """Return the zeros of a layer, [out_features, groups]."""
    return _zeros(module.qzeros, *_packing(module))


def _packing(module: Any) -> tuple[str | None, int, int]:
    """Return method, bits, and what zeros were lowered by before they were packed."""
    method = method_of(module)
    less_one = method != "awq" and not module.REQUIRES_FORMAT_V2 and module.qzero_format() == 1
    return method, module.bits, int(less_one)


def _codes(packed: Tensor, method: str | None, bits: int) -> Tensor:
    if method == "awq":
        return unpack(packed, bits, AWQ_ORDER).t()
    return unpack(packed.t().contiguous(), bits)


def _zeros(packed: Tensor, method: str | None, bits: int, lowered: int) -> Tensor:
    if method == "awq":
        return unpack(packed, bits, AWQ_ORDER).t()
    return unpack(packed, bits).t() + lowered


def g_idx_of(module: Any) -> Tensor | None:
    """Return the group of each column; None where equal groups follow each other."""
    ragged = module.in_features % len(module.scales)
    found: Tensor | None = module.g_idx if module.desc_act or ragged else None
    return found


def word_codes(module: Any) -> WordCodes | None:
    """Return what a layer holds; None where its groups are scattered."""
    if g_idx_of(module) is not None:
        return None
    method, bits, lowered = _packing(module)
    return WordCodes(
        held=module.qweight,
        bits=bits,
        scale=module.scales,
        group_size=module.in_features // len(module.scales),
        zeros=module.qzeros,
        zero=lowered,
        along_outputs=method == "awq",
        interleaved=method == "awq",
    )


def dequantized(module: Any) -> Tensor:
    """Return the weight of a layer."""
    return _weight(module, module.qweight, module.qzeros, module.scales)


def dequantized_rows(module: Any, first: int, last: int) -> Tensor:
    """Return the rows from `first` to before `last` of the weight, which are columns of the tensors
    and in words of int32 together."""
    bits = module.bits

    def read(start: int, end: int) -> Tensor:
        words, own = slice(start * bits // 32, end * bits // 32), slice(start, end)
        packed = module.qweight[:, words if method_of(module) == "awq" else own]
        return _weight(module, packed, module.qzeros[:, words], module.scales[:, own])

    return rows_of_units(first, last, 32 // gcd(32, bits), read)


def _weight(module: Any, *tensors: Tensor) -> Tensor:
    """Return the weight, or rows of it, of codes, zeros and scales as they are packed."""
    packing = _packing(module)
    if (g_idx := g_idx_of(module)) is None:
        size = module.in_features // len(module.scales)
        fits = whole_words(module.bits, size, packing[0] == "awq")
        written = _dequantize_in_order if fits else None
        return one_kernel(_dequantize, *tensors, static=packing, written=written)
    packed, zeros, scales = tensors
    codes, zeros = _codes(packed, *packing[:2]), _zeros(zeros, *packing)
    return weight_of(codes, scales.t(), zeros, g_idx).contiguous()


def _dequantize(
    packed: Tensor, zeros: Tensor, scales: Tensor, method: str | None, bits: int, lowered: int
) -> Tensor:
    codes, zeros = _codes(packed, method, bits), _zeros(zeros, method, bits, lowered)
    return weight_of(codes, scales.t(), zeros, None).contiguous()


def _dequantize_in_order(
    packed: Tensor,
    zeros: Tensor,
    scales: Tensor,
    method: str | None,
    bits: int,
    lowered: int,
    dtype: torch.dtype | None,
) -> Tensor:
    added = 0 if method == "awq" else lowered
    return dense_of_words(packed, zeros, scales, bits, added, method == "awq", dtype)


def vendor_product(module: Any, dtype: torch.dtype) -> Callable[[Any, Tensor], Tensor] | None:
    """Return gptqmodel's Triton kernel for a layer on CUDA, which computes in `dtype` and leaves
    the layer as it is; None where there is none. Its other kernels repack buffers, or are compiled
    with nvcc."""
    method, bits, lowered = _packing(module)
    if find_spec("triton") is None or lowered or dtype == torch.float32:
        return None
    if method == "awq":  # it computes in float16, for which other dtypes' numbers may be too large
        size = module.in_features / len(module.scales)
        fits = dtype == torch.float16 and size in (32, 64, 128, module.in_features)
        return _awq_product if fits else None
    return _gptq_product if bits in (2, 4, 8) else None


def _gptq_product(module: Any, x: Tensor) -> Tensor:
    """Dequantize in one kernel, and multiply."""
    from gptqmodel.nn_modules.triton_utils.dequant import dequant

    tensors = module.qweight, module.scales, module.qzeros, module.g_idx
    weight = dequant(x.dtype, *tensors, module.bits, 32, 2**module.bits - 1)
    return _with_bias(x @ weight, module)


def _awq_product(module: Any, x: Tensor) -> Tensor:
    """Compute in float16, by a kernel for few tokens."""
    from gptqmodel.nn_modules.qlinear.gemm_awq_triton import AwqGemmTritonFn

    with torch.cuda.device(x.device):
        tensors = module.qweight, module.qzeros, module.scales
        size = module.in_features // len(module.scales)
        product = AwqGemmTritonFn.apply(x, *tensors, module.bits, size, None, module.out_features)
        return _with_bias(product, module)


def _with_bias(y: Tensor, module: Any) -> Tensor:
    return y if module.bias is None else y + module.bias.to(y.dtype)


@cache
def plain(vendor: Any) -> Any:
    """Return gptqmodel's class `vendor` with a forward in plain torch and in the dtype of its
    input. Theirs compiles kernels and moves buffers, or (AWQ) computes in float16 at most."""

    def forward(self: Any, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, dequantized(self).to(x.dtype), bias)

    own = {name: value for name, value in vars(vendor).items() if name.isupper()}
    own["SUPPORTS_BACKEND_SELECTION"] = False  # or gptqmodel finds it when it looks for kernels
    return type(vendor.__name__, (vendor,), {**own, "forward": forward})
