"""How adapters meet layers of compressed-tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantadapt.protocols import LayerwiseTarget

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quantadapt.protocols import ByteCodes, Grid, WordCodes
    from quantadapt_compressed_tensors import CompressedTensors

INPUT_ERRORS = {("int", 8): 0.01, ("float", 8): 0.03}
COARSEST = 0.12
"""The relative error of a layer's output by rounding its inputs; of those of fewer bits."""


class CompressedTarget(LayerwiseTarget):
    """Layers of a compressed-tensors checkpoint: ours, or the library's while they are packed."""

    reads_rows = True

    def __init__(self, quantizer: CompressedTensors) -> None:
        super().__init__(quantizer)
        inputs = [scheme.inputs for scheme in quantizer.schemes if scheme.inputs is not None]
        self.quantizes_activations = bool(inputs)
        if inputs:
            kinds = [(args.type, args.num_bits) for args in inputs]
            self.activation_error = max(INPUT_ERRORS.get(kind, COARSEST) for kind in kinds)

    def matches(self, module: nn.Module) -> bool:
        from quantadapt_compressed_tensors.layers import SCHEME

        return SCHEME in vars(module)

    def dequantize(self, module: nn.Module) -> Tensor:
        from quantadapt_compressed_tensors.layers import dequantize

        return dequantize(module)

    def dequantize_rows(self, module: nn.Module, first: int, last: int) -> Tensor:
        from quantadapt_compressed_tensors.layers import dequantize_rows

        return dequantize_rows(module, first, last)

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        from quantadapt_compressed_tensors.layers import forward

        return forward(module, x)

    def word_codes(self, module: nn.Module) -> WordCodes | None:
        from quantadapt_compressed_tensors.held import word_codes

        return word_codes(module)

    def byte_codes(self, module: nn.Module) -> ByteCodes | None:
        from quantadapt_compressed_tensors.held import byte_codes

        return byte_codes(module)

    def inputs_of_codes(self, module: nn.Module, x: Tensor) -> Tensor:
        from quantadapt_compressed_tensors.layers import rounded_inputs

        return rounded_inputs(module, x)

    def requantize(self, module: nn.Module, weight: Tensor) -> nn.Module:
        """Round to nearest. A block keeps the grid that it has where that is closer."""
        from quantadapt_compressed_tensors.rows import requantized

        return requantized(module, weight).train(module.training)

    def grid(self, module: nn.Module) -> Grid:
        from quantadapt_compressed_tensors.grid import values_of

        return values_of(module)

    def repack(self, module: nn.Module, weight: Tensor) -> nn.Module:
        from quantadapt_compressed_tensors.grid import repack

        return repack(module, weight).train(module.training)
