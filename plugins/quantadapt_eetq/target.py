"""How adapters meet EETQ's layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantadapt.compiling import one_kernel
from quantadapt.protocols import ByteCodes, LayerwiseTarget, UniformGrid, rows_of_units, twin
from quantadapt_eetq import vendor
from quantadapt_eetq.tiles import TILE, dequantize, pack

if TYPE_CHECKING:
    from torch import Tensor, nn

DECODING = 64
"""Rows of activations up to which the vendor's kernel beats dequantizing and a matrix product."""


def is_eetq(module: nn.Module) -> bool:
    return type(module).__name__ == "EetqLinear" and hasattr(module, "weight_scales")


class EETQTarget(LayerwiseTarget):
    """`EetqLinear`, ours or transformers'."""

    reads_rows = True

    def matches(self, module: nn.Module) -> bool:
        return is_eetq(module)

    def shape(self, module: nn.Module) -> tuple[int, int]:
        in_features, out_features = module.weight.shape  # type: ignore[union-attr, misc]
        return in_features, out_features

    def dequantize(self, module: nn.Module) -> Tensor:
        layer: Any = module
        return one_kernel(dequantize, layer.weight.data, layer.weight_scales.data)

    def dequantize_rows(self, module: nn.Module, first: int, last: int) -> Tensor:
        layer: Any = module
        columns, scales = self.shape(module)[0], layer.weight_scales.data
        pairs = layer.weight.data.reshape(-1, 2 * columns)  # two rows alternate

        def read(start: int, end: int) -> Tensor:
            packed = pairs[start // 2 : end // 2].reshape(columns, -1)
            return one_kernel(dequantize, packed, scales[start:end])

        return rows_of_units(first, last, 2, read)

    def grid(self, module: nn.Module) -> UniformGrid:
        layer: Any = module
        return _grid(layer.weight_scales.data.float(), self.shape(module)[0])

    def byte_codes(self, module: nn.Module) -> ByteCodes:
        import torch

        layer: Any = module
        columns, rows = self.shape(module)
        held = layer.weight.data.view(torch.uint8).view(rows, columns)
        grid = _grid(layer.weight_scales.data, columns)
        return ByteCodes(held=held, grid=grid, zero=128, run=TILE)

    def inputs_of_codes(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return `x` in the order of `pack`: of 16 neighbours, both halves alternate."""
        return x.unflatten(-1, (-1, 2, 8)).transpose(-1, -2).flatten(-3)  # type: ignore[no-untyped-call, no-any-return]

    def repack(self, module: nn.Module, weight: Tensor) -> nn.Module:
        import torch

        codes = self.grid(module).codes(weight).to(torch.int8)
        return twin(module, weight=torch.nn.Parameter(pack(codes), requires_grad=False))

    def decodes(self, module: nn.Module, x: Tensor) -> bool:
        """Say whether the vendor's kernel is there and the faster one for `x`."""
        rows = x.numel() // x.shape[-1]
        return rows <= DECODING and vendor.gemm_for(x.device, x.dtype) is not None


def _grid(scales: Tensor, columns: int) -> UniformGrid:
    """Return what weights of rows with these scales can be."""
    import torch

    return UniformGrid(
        scale=scales[:, None], group_size=columns, dtype=torch.float32, lowest=-128, highest=127
    )
