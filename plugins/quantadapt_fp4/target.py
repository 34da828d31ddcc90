"""The core's view of layers that hold FP4 weights. Imports no torch, as plans ask it, too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantadapt.protocols import LayerwiseTarget, twin

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quantadapt.protocols import CodebookGrid, WordCodes


class FP4Target(LayerwiseTarget):
    """`FP4Linear`."""

    reads_rows = True

    def matches(self, module: nn.Module) -> bool:
        from .layers import FP4Linear

        return isinstance(module, FP4Linear)

    def dequantize(self, module: nn.Module) -> Tensor:
        layer: Any = module
        found: Tensor = layer.dequantize()
        return found

    def dequantize_rows(self, module: nn.Module, first: int, last: int) -> Tensor:
        from .layers import FP4Linear

        tensors: Any = module._buffers
        # One of a row each, or one of all.
        own = {n: t if len(t) == 1 else t[first:last] for n, t in tensors.items()}
        return FP4Linear(own, None).dequantize()

    def grid(self, module: nn.Module) -> CodebookGrid:
        from quantadapt.protocols import CodebookGrid

        from .layers import levels

        layer: Any = module
        steps: Tensor = layer.steps
        return CodebookGrid(
            scale=steps, group_size=layer.block, dtype=steps.dtype, levels=levels(steps.device)
        )

    def word_codes(self, module: nn.Module) -> WordCodes | None:
        from .layers import word_codes

        return word_codes(module)

    def repack(self, module: nn.Module, weight: Tensor) -> nn.Module:
        import torch

        from .arithmetic import pack

        codes = self.grid(module).codes(weight).to(torch.uint8)
        return twin(module, weight_packed=pack(codes))
