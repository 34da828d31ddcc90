"""What a packed 4-bit weight of bitsandbytes holds, and the weight that it stands for."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

from quantadapt.compiling import one_kernel

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def as_packed(module: nn.Module) -> Any:
    """Return the weight in the layout of checkpoints, whatever a vendor's forward made of it. The
    vendor's own way back, which a `state_dict` takes, too, forgets scales that are not quantized.
    """
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    packed: Any = module.weight
    if getattr(packed.quant_state, "packing_format_for_cpu", False):
        packed.data, _ = _convert_weight_packed_for_cpu_inverse(packed.data, packed.quant_state)
    state = packed.quant_state
    if not state.nested and state.absmax.ndim == 2:  # [blocks of a row, rows]
        state.absmax = state.absmax.T.reshape(-1).float()
    return packed


def scales_of(state: Any) -> Tensor:
    """Return the scales of 4-bit blocks in float32, of quantized ones the numbers that they are."""
    from bitsandbytes.functional import dequantize_blockwise

    if not state.nested:
        scales: Tensor = state.absmax
        return scales
    plain: Tensor = dequantize_blockwise(state.absmax, state.state2) + state.offset
    return plain.float()


def dense(packed: Any) -> Tensor:
    """Return the weight [out_features, in_features], in the dtype that was quantized."""
    data, state = packed.data, packed.quant_state
    _look_for_lost_scales(state)

    def vendors() -> Tensor:
        return _by_vendor(data, state)

    if not state.nested or data.shape[0] == 1:  # 1: an old layout, transposed
        return vendors()
    scales, of_scales = state.absmax, state.state2
    return one_kernel(
        _by_one_kernel,
        *(data, scales, of_scales.code, of_scales.absmax, state.offset, state.code),
        static=(state.blocksize, of_scales.blocksize, tuple(state.shape), state.dtype),
        otherwise=vendors,
    )


def dense_rows(packed: Any, first: int, last: int) -> Tensor | None:
    """Return the rows from `first` to before `last`, likewise; None where blocks of weights do not
    begin and end with them."""
    import torch
    from bitsandbytes.functional import QuantState

    state, columns = packed.quant_state, packed.quant_state.shape[1]
    start, end, size = first * columns, last * columns, state.blocksize
    if start % size or end % size or packed.data.shape[0] == 1:
        return None
    _look_for_lost_scales(state)
    own = QuantState(
        absmax=scales_of(state)[start // size : end // size],
        shape=(last - first, columns),
        code=state.code,
        blocksize=size,
        quant_type=state.quant_type,
        dtype=state.dtype,
    )
    codes = packed.data.view(torch.uint8).view(-1, 1)[start // 2 : end // 2]
    return _by_vendor(codes, own)


def with_codes(packed: Any, codes: Tensor) -> Any:
    """Return a packed weight with the same scales and other codes, from 0 to 15 [out_features,
    in_features]."""
    import torch

    made, codes = copy.copy(packed), codes.to(torch.uint8).view(-1)
    if codes.numel() % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    bytes_ = packed.data.view(torch.uint8)
    both = codes.new_zeros(bytes_.numel())
    both[: codes.numel() // 2] = codes[::2] << 4 | codes[1::2]
    made.data = both.view(bytes_.shape).view(packed.data.dtype)
    return made


def _look_for_lost_scales(state: Any) -> None:
    """Raise ValueError where there are too few of them: kernels would read past their end."""
    counts = [(state.absmax, math.prod(state.shape), state.blocksize), (state.code, 16, 1)]
    if state.nested:
        of_scales = state.state2
        counts += [(of_scales.absmax, state.absmax.numel(), of_scales.blocksize)]
        counts += [(of_scales.code, 256, 1)]
    for tensor, numbers, block in counts:
        if tensor.numel() * block < numbers:
            raise ValueError(
                f"{tensor.numel()} scales or values where {-(-numbers // block)} are due"
            )


def _by_vendor(codes: Tensor, state: Any) -> Tensor:
    """Return the weight as bitsandbytes has it. Its kernel for CPUs with AVX-512 starts a block
    anew at each row (seen in 0.50), so there each block is a row, or all is one."""
    from bitsandbytes.functional import dequantize_4bit

    shape = state.shape
    if codes.is_cuda or codes.shape[0] == 1 or not shape[-1] % state.blocksize:
        weight: Tensor = dequantize_4bit(codes, state)
        return weight
    whole, size, block = copy.copy(state), math.prod(shape), state.blocksize
    whole.shape = (1, size) if size % block else (size // block, block)
    weight = dequantize_4bit(codes, whole)
    return weight.view(shape)


def _by_one_kernel(
    packed: Tensor,
    scales: Tensor,
    code_of_scales: Tensor,
    scales_of_scales: Tensor,
    offset: Tensor,
    code: Tensor,
    block: int,
    block_of_scales: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """As bitsandbytes does with double quantization; the first of two weights is in the high bits
    of a byte."""
    import torch

    where = torch.arange(scales.numel(), device=scales.device) // block_of_scales
    absmax = code_of_scales[scales.int()] * scales_of_scales[where] + offset
    shifts = torch.arange(4, -1, -4, dtype=torch.uint8, device=packed.device)
    codes = (packed.view(torch.uint8).view(-1, 1) >> shifts) & 15
    return (code[codes.int()].view(-1, block) * absmax[:, None]).to(dtype).view(shape)
