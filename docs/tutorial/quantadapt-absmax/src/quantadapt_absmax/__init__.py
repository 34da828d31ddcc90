"""The backend absmax: int8 weights that share a scale, by output channel or in groups.

This module is imported whenever somebody lists the backends. So it imports torch, and whatever else
the layers need, in functions only.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pydantic import Field
from quantadapt import Backend, LayerwiseQuantizer, Merge, hookimpl
from quantadapt.protocols import LayerwiseTarget

if TYPE_CHECKING:
    from torch import Tensor, nn


class AbsmaxQuantizer(LayerwiseQuantizer):
    """Its fields are the options that users set."""

    group_size: int | None = Field(
        None, ge=8, description="weights that share a scale; null: a whole output channel"
    )

    @cached_property
    def target(self) -> AbsmaxTarget:
        """How quantadapt sees the layers."""
        return AbsmaxTarget(self)

    def misfit(self, in_features: int, out_features: int) -> str | None:
        """Say why a layer of this size cannot be quantized, or return None."""
        if self.group_size and in_features % self.group_size:
            return f"{self.group_size} does not divide its {in_features} inputs"
        return None

    def bits_per_weight(
        self,
        in_features: int,
        out_features: int,
        *,
        device: str,
        dtype: str,
    ) -> float:
        """Return what a weight takes, its share of a scale included."""
        return 8 + 32 / (self.group_size or in_features)

    def quantize_linear(self, linear: nn.Linear) -> nn.Module:
        """Return the quantized layer for `linear`."""
        from .layer import AbsmaxLinear

        return AbsmaxLinear.from_linear(linear, self.group_size)

    def load_linear(self, linear: nn.Linear, state: dict[str, Tensor]) -> nn.Module:
        """Return the quantized layer from the tensors that were saved for it."""
        from .layer import AbsmaxLinear

        return AbsmaxLinear(state["codes"], state["scale"], state.get("bias"))

    def quantization_config(self) -> dict[str, Any]:
        """Return what a checkpoint's config.json says about its quantization."""
        return {"quant_method": "absmax", "group_size": self.group_size}

    @classmethod
    def from_checkpoint(cls, quantization_config: Mapping[str, Any]) -> AbsmaxQuantizer | None:
        """Return the quantizer that wrote this config, or None if it is another backend's."""
        if quantization_config.get("quant_method") != "absmax":
            return None
        return cls(group_size=quantization_config["group_size"])

    @classmethod
    def from_model(cls, model: nn.Module) -> AbsmaxQuantizer | None:
        """Return the quantizer of a live model that is quantized already, or None."""
        from .layer import AbsmaxLinear

        layers = [module for module in model.modules() if isinstance(module, AbsmaxLinear)]
        sizes = (layer.group_size for layer in layers)
        return cls(group_size=next(filter(None, sizes), None)) if layers else None


class AbsmaxTarget(LayerwiseTarget):
    """How quantadapt sees one layer."""

    def matches(self, module: nn.Module) -> bool:
        """Say whether a module is a layer of this backend."""
        from .layer import AbsmaxLinear

        return isinstance(module, AbsmaxLinear)

    def dequantize(self, module: Any) -> Tensor:
        """Return the weight in floating point, [out_features, in_features]."""
        weight: Tensor = module.dequantize()
        return weight


@hookimpl
def quantadapt_backends() -> list[Backend]:
    """Tell quantadapt what there is."""
    return [
        Backend(
            name="absmax",
            summary="int8 with one scale per output channel or group, in plain PyTorch",
            quantizer=AbsmaxQuantizer,
            merge=Merge.REQUANTIZE,
        )
    ]
