"""LoRA on the weight of a quantized layer as a parameter: PEFT's `target_parameters`.

PEFT puts a parametrization in the place of the parameter while the layer runs. A quantized weight
is none: what LoRA adds is computed beside the layer, x Wᵀ + s (x Aᵀ) Bᵀ, with no dense W + s B A.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from torch import Tensor, nn

from .lazy_weight import LazyWeight


def beside_the_layer(forward: Any) -> Any:
    """Return `ParamWrapper.forward` as it is for dense parameters, and beside quantized layers."""

    @wraps(forward)
    def adapted(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.base_layer
        quantized = isinstance(base, nn.Linear) and isinstance(base.weight, LazyWeight)
        if not quantized or self.disable_adapters or self.merged or kwargs.get("adapter_names"):
            return forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]
        result: Tensor = base(x, *args, **kwargs)
        for adapter in self.active_adapters:
            if adapter in self.lora_A:
                a, b = self.lora_A[adapter], self.lora_B[adapter]
                added = b(a(x.to(a.weight.dtype))) * self.scaling[adapter]
                result = result + added.to(result.dtype)
        return result

    return adapted
