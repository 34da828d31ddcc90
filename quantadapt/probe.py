"""Read a weight out of a vendor layer that has no way to dequantize it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def dequantize_by_probe(
    module: nn.Module, in_features: int, *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the weight [out_features, in_features] by feeding the identity matrix.

    Exact up to rounding in `dtype` for weight-only kernels; not sound where activations are
    quantized.
    """
    identity = torch.eye(in_features, dtype=dtype, device=device)
    output: Tensor = module(identity)
    if (bias := getattr(module, "bias", None)) is not None:
        output = output - bias.to(dtype)
    return output.t().contiguous()
