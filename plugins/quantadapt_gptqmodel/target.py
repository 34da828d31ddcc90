"""How adapters meet gptqmodel's layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantadapt.protocols import LayerwiseTarget

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quantadapt_gptqmodel.base import GPTQModel

DECODING = 128
"""Tokens up to which gptqmodel's Triton kernels beat dequantizing and a matrix product on CUDA."""


class PackedTarget(LayerwiseTarget):
    """gptqmodel's layers of one method, as long as they hold what a checkpoint holds."""

    def __init__(self, quantizer: GPTQModel) -> None:
        super().__init__(quantizer)
        self.packer = quantizer

    def matches(self, module: nn.Module) -> bool:
        from quantadapt_gptqmodel.layers import method_of

        return method_of(module) == self.packer.method

    def dequantize(self, module: nn.Module) -> Tensor:
        from quantadapt_gptqmodel.layers import dequantized

        return dequantized(module)

    def decodes(self, module: nn.Module, x: Tensor) -> bool:
        """Say whether gptqmodel's Triton kernel is there and the faster one for `x`."""
        from quantadapt_gptqmodel.layers import vendor_product

        few = x.numel() <= DECODING * x.shape[-1]
        return few and x.is_cuda and vendor_product(module, x.dtype) is not None

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        """Run gptqmodel's Triton kernel where it runs, else the module's forward."""
        from quantadapt_gptqmodel.layers import vendor_product

        product = vendor_product(module, x.dtype) if x.is_cuda else None
        output: Tensor = module(x) if product is None else product(module, x)
        return output

    def requantize(self, module: nn.Module, weight: Tensor) -> nn.Module:
        """Round to nearest, without data. A group keeps the grid it has where that is closer."""
        from torch import nn

        from quantadapt_gptqmodel.layers import g_idx_of, groups_of, nearest, unpacked

        vendor: Any = module
        bits, old = vendor.bits, (vendor.scales.t().float(), unpacked(vendor)[1].float())
        g_idx = g_idx_of(vendor)
        if g_idx is None:
            g_idx = groups_of(vendor.in_features, vendor.in_features // len(vendor.scales))
        g_idx = g_idx.to(weight.device).long()
        found = nearest(weight.float(), g_idx, bits, self.packer.sym, old)
        linear: Any = nn.Linear(vendor.in_features, vendor.out_features, False, device="meta")
        linear.bias = None if vendor.bias is None else nn.Parameter(vendor.bias.detach())
        return self.packer._packed(linear, bits, *found, g_idx).train(module.training)
