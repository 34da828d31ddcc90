"""No quantization: the dense reference that every other backend is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from quantadapt.capabilities import Merge
from quantadapt.hookspecs import hookimpl
from quantadapt.protocols import LayerwiseQuantizer, LayerwiseTarget, Quantizer
from quantadapt.records import Backend, Serving

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor, nn


class Dense(LayerwiseQuantizer):
    """No options."""

    @cached_property
    def target(self) -> DenseTarget:
        return DenseTarget(self)

    def bits_per_weight(
        self, in_features: int, out_features: int, *, device: str, dtype: str
    ) -> float:
        return 32 if dtype == "float32" else 16

    @property
    def quantizes_experts(self) -> bool:
        return False

    def quantize_linear(self, linear: nn.Linear) -> nn.Module:
        linear.requires_grad_(False)
        return linear

    def load(self, path: str, *, device: str, dtype: torch.dtype) -> nn.Module:
        return Quantizer.load(self, path, device=device, dtype=dtype)

    def save(self, model: nn.Module, path: Path) -> None:
        model.save_pretrained(path)  # type: ignore[operator]

    def quantization_config(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_checkpoint(cls, quantization_config: Mapping[str, Any]) -> Dense | None:
        return None if quantization_config else cls()


class DenseTarget(LayerwiseTarget):
    """The model's own linear layers, as they are: `nn.Linear`, or transformers' `Conv1D`."""

    def matches(self, module: nn.Module) -> bool:
        from torch import nn

        from quantadapt.loading import is_linear

        return is_linear(module) and type(module.weight) is nn.Parameter

    def shape(self, module: nn.Module) -> tuple[int, int]:
        rows, columns = self.dequantize(module).shape
        return columns, rows

    def dequantize(self, module: nn.Module) -> Tensor:
        from quantadapt.loading import is_conv1d

        weight: Tensor = module.weight.detach()  # type: ignore[operator, assignment]
        return weight.t() if is_conv1d(module) else weight

    def requantize(self, module: nn.Module, weight: Tensor) -> nn.Module:
        from quantadapt.loading import as_conv1d, is_conv1d, linear_of

        linear = linear_of(weight, module.bias)  # type: ignore[arg-type]
        made = as_conv1d(linear) if is_conv1d(module) else linear
        return made.train(module.training)


@hookimpl
def quantadapt_backends() -> list[Backend]:
    return [
        Backend(
            name="none",
            summary="no quantization, the dense reference",
            quantizer=Dense,
            devices=("cpu", "cuda", "mps", "xpu", "hpu"),
            merge=Merge.REQUANTIZE,
            serves=(Serving("vllm", "vllm>=0.7", adapters=True),),
        )
    ]
