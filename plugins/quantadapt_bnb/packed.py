"""What a packed 4-bit weight of bitsandbytes holds, and the weight that it stands for."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

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


def look_for_lost_scales(state: Any) -> None:
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


def by_vendor(codes: Tensor, state: Any) -> Tensor:
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


def by_one_kernel(
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
