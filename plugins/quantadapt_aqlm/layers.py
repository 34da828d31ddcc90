"""aqlm's layer, and what has to be known to run it right (aqlm 1.1.7)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from aqlm import QuantizedLinear
from aqlm.utils import unpack_int_data
from torch import Tensor, nn

from quantadapt.compiling import one_kernel
from quantadapt.errors import ModelError
from quantadapt.protocols import rows_of_units

if TYPE_CHECKING:
    from quantadapt_aqlm import AQLM

FEW = 6
"""Tokens up to which aqlm multiplies with the codes, and does not dequantize."""


class Layer(QuantizedLinear):  # type: ignore[misc]
    """The layer that we make: the library's, with `run` as its forward.

    Attributes:
        made_with: the quantizer.
    """

    made_with: AQLM

    @classmethod
    def filled(
        cls, linear: nn.Linear, state: Mapping[str, Tensor], sizes: dict[str, int], made_with: AQLM
    ) -> Layer:
        """Return the layer for `linear` with the tensors of `state`, floats in its dtype.

        Raises:
            ModelError: a tensor is missing, or has a shape that the sizes do not explain.
        """
        shape = (linear.in_features, linear.out_features)
        with torch.device("meta"):
            layer = cls(*shape, **sizes, bias=linear.bias is not None, dtype=linear.weight.dtype)
        for name, empty in list(layer.named_parameters()):
            found = state.get(name)
            if found is None or found.shape != empty.shape:
                what = "is missing" if found is None else f"has shape {list(found.shape)}"
                what = f"{name} of a layer {what}, expected {list(empty.shape)}"
                raise ModelError(what, fix="download the checkpoint again, or make it again")
            setattr(layer, name, nn.Parameter(found.to(empty.dtype), requires_grad=False))
        layer.made_with = made_with
        return layer

    def forward(self, input: Tensor) -> Tensor:
        return run(self, input)


def dequantize(layer: Any) -> Tensor:
    """Return the weight, [out_features, in_features]."""
    tensors = (settled(layer).codes.data, layer.codebooks.data, layer.scales.data)
    return one_kernel(_dequantize, *tensors, static=(layer.nbits_per_codebook,))


def dequantize_rows(layer: Any, first: int, last: int) -> Tensor:
    """Return the rows from `first` to before `last` of what `dequantize` returns."""
    codes, books, scales = settled(layer).codes.data, layer.codebooks.data, layer.scales.data
    size = layer.out_group_size

    def read(start: int, end: int) -> Tensor:
        own = slice(start // size, end // size)
        static = (layer.nbits_per_codebook,)
        return one_kernel(_dequantize, codes[own], books, scales[own], static=static)

    return rows_of_units(first, last, size, read)


def _dequantize(codes: Tensor, codebooks: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Add up the codes' vectors. The library's own way makes all intermediate results."""
    indices = unpack_int_data(codes, bits)  # [out groups, in groups, codebooks]
    groups = sum(book[indices[..., i]] for i, book in enumerate(codebooks))
    weight: Tensor = (groups * scales).swapaxes(1, 2)  # [out groups, group, in groups, group]
    return weight.reshape(indices.shape[0] * codebooks.shape[2], -1)


def run(layer: Any, x: Tensor) -> Tensor:
    """Run the library's kernel, where it has one that is right, and leave the layer as it was."""
    if x.is_cuda and (product := vendor_product(layer, x)) is not None:
        return product(x, layer.codes, layer.codebooks, layer.scales, layer.bias)
    if x.is_cuda or not _runs_on_cpu(layer):
        return nn.functional.linear(x, dequantize(layer), layer.bias)
    with _one_thread():
        output: Tensor = QuantizedLinear.forward(settled(layer), x)
    settled(layer)
    return output


def settled(layer: Any) -> Any:
    """Return the layer as it is in a checkpoint: the first forward on a CPU transposes the codes of
    8-bit codebooks for good."""
    if layer.gemv_op is not None:
        in_groups = layer.in_features // layer.in_group_size
        out_groups = layer.out_features // layer.out_group_size
        on_cpu = layer.codes.device.type == "cpu" and layer.codebook_size == 256
        if layer.codes.shape[0] == in_groups and (in_groups != out_groups or on_cpu):
            layer.codes.data = layer.codes.data.transpose(0, 1).contiguous()
        layer.gemv_op = layer.gemm_op = layer.use_gemv_rule = None
    return layer


def _runs_on_cpu(layer: Any) -> bool:
    """Say whether aqlm can run the layer on a CPU. Its kernel for 8-bit codebooks wants float32 and
    groups in one row."""
    fits = layer.out_group_size == 1 and layer.codebooks.dtype == torch.float32
    return bool(fits or layer.codebook_size != 256)


def vendor_product(layer: Any, x: Tensor) -> Callable[..., Tensor] | None:
    """Return aqlm's kernel for CUDA, which takes x, codes, codebooks, scales and bias; None where
    there is none for such codes, or it cannot be compiled."""
    books, entries, rows, columns = layer.codebooks.shape
    long_codes = (books, entries) == (1, 2**16) and columns in (8, 16)
    short_codes = books in (1, 2) and entries == 2**8 and columns == 8
    dtype: torch.dtype = layer.codebooks.dtype
    fits = rows == 1 and (long_codes or short_codes) and dtype.itemsize == 2 and x.dtype == dtype
    if not (fits and _compiled()):
        return None
    from aqlm.inference_kernels import get_forward_pass_kernel

    many = x.numel() > FEW * x.shape[-1]
    kernel: Callable[..., Tensor] = get_forward_pass_kernel(layer.codebooks, many)
    return kernel


@cache
def _compiled() -> bool:
    """Say whether aqlm's kernels can be had: nvcc compiles them, once for a machine."""
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is None:
        return False
    try:
        import_module("aqlm.inference_kernels.cuda_kernel")
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(f"aqlm's kernels cannot be compiled, so it is slow: {reason}", stacklevel=2)
        return False
    return True


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep numba to one thread: several of them add to the same outputs, and lose some. As soon as
    numba is asked anything, it sets how many threads torch uses."""
    import numba

    torch_threads = torch.get_num_threads()
    threads = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        yield
    finally:
        numba.set_num_threads(threads)
        torch.set_num_threads(torch_threads)


@contextmanager
def as_stored(layers: Iterable[Any]) -> Iterator[None]:
    """Hold codebooks and scales in half precision for a moment, where that changes no number."""
    changed: list[tuple[Tensor, Tensor]] = []
    for layer in layers:
        for tensor in (settled(layer).codebooks, layer.scales):
            half = tensor.data.to(torch.float16)
            if tensor.dtype == torch.float32 and torch.equal(half.float(), tensor.data):
                changed.append((tensor, tensor.data))
                tensor.data = half
    try:
        yield
    finally:
        for tensor, full in changed:
            tensor.data = full
