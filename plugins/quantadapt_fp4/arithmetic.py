"""Numbers of four bits, e2m1, that share a scale by block.

As the OCP's specification of microscaling formats has them (MXFP4: 32 numbers, a power of two as
e8m0), and NVIDIA (NVFP4: 16 numbers, an e4m3 scale, and one float32 scale for the whole weight).
Weights are [out_features, in_features], scales [out_features, blocks]; all is computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LARGEST = 6.0
"""The largest e2m1 number; its power of two is 4."""
MX_BLOCK, NV_BLOCK = 32, 16
E4M3_LARGEST, E4M3_LEAST = 448.0, 2.0**-9
USUAL = 2.0**9
"""What the scales of nearly every NVFP4 weight are multiplied with before they become e4m3."""
E8M0_NAN = 255
AT_ONCE = 2**24
"""Weights that are quantized together: what is worked with takes some 20 bytes for each."""

# Halfway between two neighbours a number goes to the one whose last bit is 0: a threshold below an
# odd code is left for larger numbers alone.
_HALFWAY = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
_HALFWAY[1::2] = _HALFWAY[1::2].nextafter(torch.zeros(3))


def codes_of(numbers: Tensor) -> Tensor:
    """Return the codes (uint8, 0 to 15; 8 is the sign) of the e2m1 numbers that are nearest. What
    is larger than 6, infinity too, becomes 6."""
    sizes = torch.bucketize(numbers.abs(), _HALFWAY.to(numbers.device), out_int32=True)
    return sizes.to(torch.uint8) | torch.signbit(numbers).to(torch.uint8) << 3


def values_of(codes: Tensor) -> Tensor:
    """Return the e2m1 numbers, float32, that `codes` stand for."""
    size = (codes & 7).float()
    value = torch.where(size < 5, size / 2, torch.where(size < 7, size - 2, LARGEST))
    return torch.where(codes > 7, -value, value)


def pack(codes: Tensor) -> Tensor:
    """Return two codes to a byte, the first in its lower half."""
    return codes[..., ::2] | codes[..., 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    """Return the codes that `pack` put into `packed`."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def mx_steps(scales: Tensor) -> Tensor:
    """Return what 1 stands for in each block of MXFP4: 2 to the power of `scales` (uint8) - 127,
    NaN for 255; made of the bits of a float32, so that it is exact everywhere."""
    exponents = scales.int()
    bits = torch.where(exponents == 0, 1 << 22, exponents << 23)  # 2**-127 is subnormal
    return torch.where(exponents == E8M0_NAN, 0x7FC00000, bits).view(torch.float32)


def nv_steps(scales: Tensor, global_scale: Tensor) -> Tensor:
    """Return the same of NVFP4. `global_scale` is one number, or one for each row. e4m3 is read bit
    by bit: compilers for older cards do not know it."""
    bits = scales.view(torch.uint8).int()
    normal = (((bits & 127) << 20) + (120 << 23)).view(torch.float32)  # biases are 7 and 127
    size = torch.where(bits & 127 < 8, (bits & 7) * E4M3_LEAST, normal)
    size = torch.where(bits & 127 == 127, torch.nan, size)
    return torch.where(bits > 127, -size, size) / global_scale.float().view(-1, 1)


def mx_dequantize(packed: Tensor, scales: Tensor) -> Tensor:
    """Return the weight, float32, of an MXFP4 one."""
    return _scaled(packed, mx_steps(scales))


def nv_dequantize(packed: Tensor, scales: Tensor, global_scale: Tensor) -> Tensor:
    """Return the weight, float32, of an NVFP4 one."""
    return _scaled(packed, nv_steps(scales, global_scale))


def _scaled(packed: Tensor, steps: Tensor) -> Tensor:
    values = values_of(unpack(packed))
    return (_in_blocks(values, steps.shape[-1]) * steps[..., None]).flatten(-2)


def _in_blocks(weight: Tensor, count: int) -> Tensor:
    """Return [out_features, in_features] as [out_features, blocks, size]."""
    return weight.reshape(weight.shape[0], count, -1)


def on_steps(weight: Tensor, steps: Tensor) -> Tensor:
    """Return the codes of `weight` on given steps. Where a step is 0 or NaN they are those of 0."""
    blocks = _in_blocks(weight.float(), steps.shape[-1])
    divisor = torch.where(steps > 0, steps, torch.inf)
    return codes_of(blocks / divisor[..., None]).flatten(-2)


def mx_quantize(weight: Tensor) -> dict[str, Tensor]:
    """Return a weight of whole blocks in MXFP4: `weight_packed` and `weight_scale`."""
    return _by_rows(weight, MX_BLOCK, _mx_candidates, mx_steps)


def nv_quantize(weight: Tensor) -> dict[str, Tensor]:
    """Return a weight of whole blocks in NVFP4: `weight_packed`, `weight_scale` and
    `weight_global_scale`."""
    lowest, highest = (number.float() for number in weight.aminmax())
    global_scale = nv_global_scale(torch.maximum(-lowest, highest))

    def candidates(largest: Tensor) -> list[Tensor]:
        # Nothing lies between 4 and 6: numbers near the largest come out nearer where that is 4.
        exact = [largest / number * global_scale for number in (LARGEST, 4.0)]
        return [scale.clamp(E4M3_LEAST, E4M3_LARGEST).to(torch.float8_e4m3fn) for scale in exact]

    made = _by_rows(weight, NV_BLOCK, candidates, lambda s: nv_steps(s, global_scale))
    return {**made, "weight_global_scale": global_scale}


def nv_global_scale(largest: Tensor) -> Tensor:
    """Return what the scales of a weight are multiplied with, [1], for its largest absolute value:
    a power of two, and the same one unless e4m3 has no room then.

    So a weight is exact in bfloat16, layers that a server fuses have one scale in common, and rows
    do not depend on one another.
    """
    room = E4M3_LARGEST * LARGEST / largest
    power = torch.frexp(room).exponent - 1
    own = torch.ldexp(torch.ones_like(room), power.clamp(-120, 120))
    fits = (room >= USUAL) & (room < USUAL**2) | ~room.isfinite()  # of zeros alone: infinity
    return torch.where(fits, USUAL, own).reshape(1)


def _mx_candidates(largest: Tensor) -> list[Tensor]:
    """Return the power of two of a block's largest weight over that of 6, as the OCP has it, in
    e8m0; and the next larger one, which leaves nothing out of reach."""
    exponent = torch.frexp(largest).exponent - 1 - 2
    exponent = torch.where(largest == 0, -127, torch.where(largest.isinf(), 127, exponent))
    scales = [(exponent + more).clamp(-127, 127) + 127 for more in (0, 1)]
    return [torch.where(largest.isnan(), E8M0_NAN, scale).to(torch.uint8) for scale in scales]


def _by_rows(
    weight: Tensor,
    size: int,
    candidates: Callable[[Tensor], list[Tensor]],
    steps_of: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """Quantize some rows after the other, for a stack of experts is large; of two candidates for a
    scale take that with the smaller error."""
    parts = []
    for rows in torch.split(weight, max(1, AT_ONCE // weight.shape[1])):
        blocks = _in_blocks(rows.float(), rows.shape[1] // size)
        tried = candidates(blocks.abs().amax(-1))
        (codes, scales), other = [(on_steps(rows, steps_of(each)), each) for each in tried]
        errors = _errors(blocks, codes, scales, steps_of)
        better = _errors(blocks, *other, steps_of) < errors
        codes = torch.where(better.repeat_interleave(size, -1), other[0], codes)
        parts.append((pack(codes), _where(better, other[1], scales)))
    packed, scale = (joined(tensors) for tensors in zip(*parts, strict=True))
    return {"weight_packed": packed, "weight_scale": scale}


def _errors(
    blocks: Tensor, codes: Tensor, scales: Tensor, steps_of: Callable[[Tensor], Tensor]
) -> Tensor:
    values = values_of(codes).view(blocks.shape) * steps_of(scales)[..., None]
    return (values - blocks).square_().sum(-1)


# Some versions of torch cannot join or choose among e4m3 numbers; bytes they can.


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Return `torch.cat` of rows."""
    kind = tensors[0].dtype
    return torch.cat([tensor.contiguous().view(torch.uint8) for tensor in tensors]).view(kind)


def _where(chosen: Tensor, first: Tensor, second: Tensor) -> Tensor:
    bits = torch.where(chosen, first.view(torch.uint8), second.view(torch.uint8))
    return bits.view(second.dtype)
