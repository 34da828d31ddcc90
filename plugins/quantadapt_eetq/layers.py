"""The layer that holds EETQ's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantadapt_eetq import vendor
from quantadapt_eetq.tiles import dequantize


class EetqLinear(nn.Module):
    """Holds what transformers' EetqLinear holds, and computes on any device."""

    def __init__(self, weight: Tensor, weight_scales: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scales = nn.Parameter(weight_scales, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        gemm = vendor.gemm_for(x.device, x.dtype)
        if gemm is None or (x.requires_grad and torch.is_grad_enabled()):
            weight = dequantize(self.weight, self.weight_scales)
            return nn.functional.linear(x, weight.to(x.dtype), bias)
        rows = x.detach().reshape(-1, self.in_features).contiguous()
        output = gemm(rows, self.weight, self.weight_scales).view(*x.shape[:-1], -1)
        return output if bias is None else output + bias
