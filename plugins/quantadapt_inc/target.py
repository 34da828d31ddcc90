"""How adapters meet the layers of Intel Neural Compressor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantadapt.protocols import LayerwiseTarget
from quantadapt_inc.layers import (
    MADE_BY,
    complete,
    in_qdq,
    inner,
    integers,
    is_fp8,
    is_integer,
    is_plain,
    scaled_class,
    sizes,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quantadapt.protocols import ByteCodes, WordCodes
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
        if in_qdq(vendor):
            from quantadapt_inc import fp8

            return fp8.dequantize(vendor)
        if is_fp8(vendor):
            weight: Tensor = vendor.weight.to(vendor.hp_dtype) * vendor.scale_weight
            return weight.t().contiguous()
        weight = integers(inner(vendor))
        return weight if vendor is inner(vendor) else weight * vendor.input_scale

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        from quantadapt_inc import fp8

        return fp8.forward(module, x) if in_qdq(module) else super().forward(module, x)

    def byte_codes(self, module: nn.Module) -> ByteCodes | None:
        from quantadapt_inc import fp8

        return fp8.byte_codes(module) if in_qdq(module) else None

    def word_codes(self, module: nn.Module) -> WordCodes | None:
        """Return the codes of integers where these fill words and have one zero point (of several,
        INC holds 0 as if it were the highest), and groups are of neighbours."""
        from quantadapt.protocols import WordCodes

        layer: Any = inner(module)
        if is_fp8(module) or layer.bits == 3 or layer.in_features % layer.n_pack:
            return None
        if not is_plain(layer):
            return None
        return WordCodes(
            held=layer.qweight,
            bits=layer.bits,
            scale=layer.scales,
            group_size=layer.group_size,
            zero=2 ** (layer.bits - 1),
        )

    def inputs_of_codes(self, module: nn.Module, x: Tensor) -> Tensor:
        vendor: Any = module
        if is_fp8(vendor):
            from quantadapt_inc import fp8

            return fp8.rounded_inputs(vendor, x)
        return x if vendor is inner(vendor) else x * vendor.input_scale.to(x.dtype)

    def requantize(self, module: nn.Module, weight: Tensor) -> nn.Module:
        """Keeps the scales of the inputs; for want of data, GPTQ's layers are rounded."""
        old: Any = module
        maker: INC = getattr(old, MADE_BY, self.quantizer)
        if maker != self.quantizer:  # a model of INC's own may have layers of several kinds
            return maker.target.requantize(module, weight)
        if inner(module) is module:
            new = super().requantize(module, weight)
            for name in {"quant_input", "scale_input"} & (vars(old) | old._modules).keys():
                setattr(new, name, getattr(old, name))
            return new
        layer: Any = super().requantize(module, weight / old.input_scale)
        scaled: nn.Module = scaled_class()(layer, old.input_scale)
        complete(scaled, layer.bias, self.quantizer)
        return scaled
