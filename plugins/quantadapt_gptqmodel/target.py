"""How adapters meet gptqmodel's layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantadapt.protocols import LayerwiseTarget, UniformGrid, WordCodes

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quantadapt_gptqmodel.base import GPTQModel

DECODING = 128
"""Tokens up to which gptqmodel's Triton kernels beat dequantizing and a matrix product on CUDA."""


class PackedTarget(LayerwiseTarget):
    """gptqmodel's layers of one method, as long as they hold what a checkpoint holds."""

    quantizer: GPTQModel
    reads_rows = True

    def matches(self, module: nn.Module) -> bool:
        from quantadapt_gptqmodel.layers import method_of

        return method_of(module) == self.quantizer.method

    def dequantize(self, module: nn.Module) -> Tensor:
        from quantadapt_gptqmodel.layers import dequantized

        return dequantized(module)

    def dequantize_rows(self, module: nn.Module, first: int, last: int) -> Tensor:
        from quantadapt_gptqmodel.layers import dequantized_rows

        return dequantized_rows(module, first, last)

    def decodes(self, module: nn.Module, x: Tensor) -> bool:
        """Say whether gptqmodel's Triton kernel is there and the faster one for `x`."""
        from quantadapt_gptqmodel.layers import vendor_product

        few = x.numel() <= DECODING * x.shape[-1]
        return few and x.is_cuda and vendor_product(module, x.dtype) is not None

    def word_codes(self, module: nn.Module) -> WordCodes | None:
        from quantadapt_gptqmodel.layers import word_codes

        return word_codes(module)

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        """Run gptqmodel's Triton kernel where it runs, else the module's forward."""
        from quantadapt_gptqmodel.layers import vendor_product

        product = vendor_product(module, x.dtype) if x.is_cuda else None
        output: Tensor = module(x) if product is None else product(module, x)
        return output

    def requantize(self, module: nn.Module, weight: Tensor) -> nn.Module:
        """Round to nearest, without data. A group keeps the grid it has where that is closer."""
        return self._made(module, *self._nearest(module, weight))

    def _nearest(self, vendor: Any, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return codes, scales, zeros and the group of each column of a weight, rounded."""
        from quantadapt_gptqmodel.codes import nearest
        from quantadapt_gptqmodel.layers import zeros_of

        old = vendor.scales.t().float(), zeros_of(vendor).float()
        g_idx = _groups(vendor).to(weight.device)
        return *nearest(weight.float(), g_idx, vendor.bits, self.quantizer.sym, old), g_idx

    def grid(self, module: nn.Module) -> UniformGrid:
        from quantadapt_gptqmodel.layers import g_idx_of, zeros_of

        vendor: Any = module
        scattered = g_idx_of(vendor) is not None
        return UniformGrid(
            scale=vendor.scales.t(),
            zero=zeros_of(vendor),
            group_size=vendor.in_features // len(vendor.scales),
            groups=_groups(vendor) if scattered else None,
            dtype=vendor.scales.dtype,
            lowest=0,
            highest=2**vendor.bits - 1,
        )

    def repack(self, module: nn.Module, weight: Tensor) -> nn.Module:
        vendor: Any = module
        grid = self.grid(module)
        assert grid.zero is not None
        made = self._made(vendor, grid.codes(weight), grid.scale, grid.zero, _groups(vendor))
        made.scales = vendor.scales  # which may be of another dtype than they are stored in
        return made

    def _made(self, vendor: Any, codes: Tensor, *grid: Tensor) -> nn.Module:
        """Return a new module: kernels of live ones may hold on to what they have unpacked."""
        from torch import nn

        linear: Any = nn.Linear(vendor.in_features, vendor.out_features, False, device="meta")
        linear.bias = None if vendor.bias is None else nn.Parameter(vendor.bias.detach())
        return self.quantizer._packed(linear, vendor.bits, codes, *grid).train(vendor.training)


def _groups(vendor: Any) -> Tensor:
    """Return the group of each column, int64."""
    from quantadapt_gptqmodel.codes import groups_of
    from quantadapt_gptqmodel.layers import g_idx_of

    if (found := g_idx_of(vendor)) is None:
        size = vendor.in_features // len(vendor.scales)
        return groups_of(vendor.in_features, size, vendor.scales.device)
    return found.long()
