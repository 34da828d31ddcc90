"""What torchao's ways of quantizing have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ValidationError

from quantadapt.protocols import LayerwiseQuantizer, Quantizer

from .target import TorchAOTarget

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor, nn


class TorchAO(LayerwiseQuantizer):
    config_names: ClassVar[tuple[str, ...]]
    tensor_names: ClassVar[tuple[str, ...]]

    @cached_property
    def target(self) -> TorchAOTarget:
        return TorchAOTarget(self)

    @abstractmethod
    def _config(self, tensor_cores: bool) -> Any:
        """Return torchao's config for layers that are on CUDA in bfloat16, or for others."""

    def quantize_linear(self, linear: nn.Linear) -> nn.Module:
        from torchao.quantization import quantize_

        fits = self.misfit(linear.in_features, linear.out_features) is None
        config = self._config(fits and for_tensor_cores(linear.weight))
        if hasattr(config, "set_inductor_config"):  # of the whole process: float32 becomes TF32
            config.set_inductor_config = False
        quantize_(linear, config)
        return linear

    def load(self, path: str, *, device: str, dtype: torch.dtype) -> nn.Module:
        return Quantizer.load(self, path, device=device, dtype=dtype)

    def save(self, model: nn.Module, path: Path) -> None:
        from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

        from quantadapt.layerwise import save_layerwise

        made = self.from_model(model) or self  # an automatic choice is saved as what it became
        quantizer = TorchAoHfQuantizer(made._transformers_config(), pre_quantized=False)
        save_layerwise(made, model, path, hf_quantizer=quantizer)

    def _transformers_config(self) -> Any:
        from transformers import TorchAoConfig

        return TorchAoConfig(self._config(tensor_cores=False))

    def quantization_config(self) -> dict[str, Any]:
        config: dict[str, Any] = self._transformers_config().to_dict()
        return config

    @classmethod
    def _from_config(cls, config: Mapping[str, Any]) -> TorchAO | None:
        """Read the options back from the data of a serialized torchao config."""
        return cls()

    @classmethod
    def from_checkpoint(cls, quantization_config: Mapping[str, Any]) -> TorchAO | None:
        if quantization_config.get("quant_method") != "torchao":
            return None
        kind = quantization_config.get("quant_type", {}).get("default", {})
        if kind.get("_type") not in cls.config_names:
            return None
        try:
            return cls._from_config(kind.get("_data", {}))
        except (KeyError, ValidationError):  # options that there are not here
            return None

    @classmethod
    def from_model(cls, model: nn.Module) -> TorchAO | None:
        for module in model.modules():
            weight = module._parameters.get("weight")
            if type(weight).__name__ in cls.tensor_names and not _rounds_activations(weight):
                try:
                    return cls._from_tensor(weight)
                except ValidationError:  # options that there are not here
                    return None
        return None

    @classmethod
    def _from_tensor(cls, weight: Any) -> TorchAO | None:
        return cls()


def for_tensor_cores(weight: Tensor) -> bool:
    """Say whether torchao's int4 kernels for them take such a weight."""
    import torch

    return weight.is_cuda and weight.dtype == torch.bfloat16


def _rounds_activations(weight: Any) -> bool:
    """Say whether torchao quantizes the inputs as well, for such a weight."""
    names = ("act_quant_kwargs", "activation_quantization")
    return any(getattr(weight, name, None) is not None for name in names)
