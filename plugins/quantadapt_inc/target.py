"""How adapters meet the layers of Intel Neural Compressor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantadapt.protocols import LayerwiseTarget
from quantadapt_inc.vendor import inner, integers, is_fp8, is_integer, scaled_class, sizes

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quantadapt_inc import INC


class INCTarget(LayerwiseTarget):
    """INC's `PatchedLinear`, `INCWeightOnlyLinear`, or AWQ's `MulLinear` around the latter."""

    quantizer: INC

    def __init__(self, quantizer: INC) -> None:
        super().__init__(quantizer)
        self.quantizes_activations = quantizer.method == "fp8"

    def matches(self, module: nn.Module) -> bool:
        return is_fp8(module) or (is_integer(module) and not hasattr(module, "behind_scale"))

    def shape(self, module: nn.Module) -> tuple[int, int]:
        return sizes(inner(module))

    def dequantize(self, module: nn.Module) -> Tensor:
        vendor: Any = module
        weight: Tensor
        if not is_fp8(vendor):
            weight = integers(inner(vendor))
            return weight if vendor is inner(vendor) else weight * vendor.input_scale
        if vendor.use_qdq:
            weight = vendor.dequant_weights(vendor.weight)
        else:
            weight = vendor.weight.to(vendor.hp_dtype) * vendor.scale_weight
        return weight.t().contiguous()

    def requantize(self, module: nn.Module, weight: Tensor) -> nn.Module:
        """Keeps the scales of the inputs; for want of data, GPTQ's layers are rounded."""
        old: Any = module
        if inner(module) is module:
            new = super().requantize(module, weight)
            for name in {"quant_input", "scale_input"} & (vars(old) | old._modules).keys():
                setattr(new, name, getattr(old, name))
            return new
        layer: Any = super().requantize(module, weight / old.input_scale)
        scaled: nn.Module = scaled_class()(layer, old.input_scale)
        self.quantizer._mark(scaled, layer.bias)
        return scaled
