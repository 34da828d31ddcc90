"""The quantized layer: int8 codes and their scales."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AbsmaxLinear(nn.Module):
    """A linear layer whose weight is `codes * scale`.

    Args:
        codes: int8, [out_features, groups, group_size].
        scale: float32, [out_features, groups, 1].
        bias: [out_features], or None.
    """

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = codes.flatten(1).shape
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, group_size: int | None) -> AbsmaxLinear:
        """Round each group of weights to 127 steps up to its largest magnitude."""
        shape = (linear.out_features, -1, group_size or linear.in_features)
        weight = linear.weight.detach().float().reshape(shape)
        scale = weight.abs().amax(dim=2, keepdim=True).clamp(min=1e-8) / 127
        codes = (weight / scale).round().to(torch.int8)
        return cls(codes, scale, linear.bias)

    @property
    def group_size(self) -> int | None:
        """How many weights share a scale; None where all of a row do."""
        _, groups, size = self.codes.shape
        return size if groups > 1 else None

    def dequantize(self) -> Tensor:
        """Return the weight, [out_features, in_features]."""
        return (self.codes * self.scale).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return nn.functional.linear(x, self.dequantize().to(x.dtype), self.bias)
