"""MXFP4 and NVFP4: numbers of four bits (e2m1) that share a scale by block, weights only.

The arithmetic is in `arithmetic`, on plain tensors: torchao's prototypes of both formats take no
float16, leave e4m3's smallest scales out and know no experts that are one tall layer. Weights are
dequantized for each product, on any device; on CUDA, up to four tokens are multiplied with codes.

Checkpoints are those of compressed-tensors (`nvfp4-pack-quantized`, `mxfp4-pack-quantized`, of
weights alone), which transformers and vLLM load. Those of gpt-oss, which is released with experts
in MXFP4 and all else dense, stay as they are released.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from quantadapt.capabilities import Merge
from quantadapt.errors import ModelError
from quantadapt.hookspecs import hookimpl
from quantadapt.protocols import LayerwiseQuantizer
from quantadapt.records import Backend, Serving

from .target import FP4Target

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

MX_BLOCK, NV_BLOCK = 32, 16


class _FP4(LayerwiseQuantizer):
    block: ClassVar[int]
    format: ClassVar[str]
    scale_dtype: ClassVar[str]
    strategy: ClassVar[str]

    @abstractmethod
    def _quantized(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the tensors of a layer, by their names in it."""

    @cached_property
    def target(self) -> FP4Target:
        return FP4Target(self)

    def misfit(self, in_features: int, out_features: int) -> str | None:
        if in_features % self.block == 0:
            return None
        return f"blocks of {self.block} do not divide {in_features} inputs"

    def bits_per_weight(
        self, in_features: int, out_features: int, *, device: str, dtype: str
    ) -> float:
        return 4 + 8 / self.block

    def notes(self, device: str) -> tuple[str, ...]:
        return ("FP4 weights are dequantized to be multiplied: no FP4 units of a card are used",)

    def quantize_linear(self, linear: nn.Linear) -> nn.Module:
        from .layers import FP4Linear

        if misfit := self.misfit(linear.in_features, linear.out_features):
            raise ModelError(misfit, fix="leave such layers dense: skip_misfits: true")
        return FP4Linear(self._quantized(linear.weight.detach()), linear.bias)

    def load_linear(self, linear: nn.Linear, state: dict[str, Tensor]) -> nn.Module:
        from .layers import FP4Linear, tensors_of

        tensors = tensors_of(state, linear.out_features, linear.in_features, self.block)
        bias = state["bias"].to(linear.weight.dtype) if "bias" in state else None
        return FP4Linear(tensors, bias)

    def save(self, model: nn.Module, path: Path) -> None:
        """Write experts one by one, as compressed-tensors has them, where a model's files do."""
        from quantadapt.loading.writing import experts_apart, name_bfloat16

        from .layers import split_rows

        with experts_apart(model, split_rows):
            super().save(model, path)
        name_bfloat16(path)

    def join_rows(self, layers: list[nn.Module]) -> nn.Module:
        from .layers import join_rows

        return join_rows(layers)

    def quantization_config(self) -> dict[str, Any]:
        weights = {
            "num_bits": 4,
            "type": "float",
            "symmetric": True,
            "strategy": self.strategy,
            "group_size": self.block,
            "scale_dtype": self.scale_dtype,
            "zp_dtype": self.scale_dtype,
            "dynamic": False,
        }
        group = {"targets": ["Linear"], "weights": weights, "format": self.format}
        return {
            "quant_method": "compressed-tensors",
            "format": self.format,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": [],
        }

    def left_dense(self, names: list[str], head: str | None) -> dict[str, Any]:
        return {"ignore": names}

    @classmethod
    def from_checkpoint(cls, quantization_config: Mapping[str, Any]) -> _FP4 | None:
        return cls() if _is_weights_only(quantization_config, cls.format) else None

    @classmethod
    def from_model(cls, model: nn.Module) -> _FP4 | None:
        from .layers import FP4Linear

        layers = (module for module in model.modules() if isinstance(module, FP4Linear))
        return cls() if any(layer.block == cls.block for layer in layers) else None


class MXFP4(_FP4):
    """No options: 32 numbers share a power of two, that of their largest over 4 or the next larger
    one, whichever leaves the smaller error."""

    block = MX_BLOCK
    format = "mxfp4-pack-quantized"
    scale_dtype = "torch.uint8"
    strategy = "group"

    def _quantized(self, weight: Tensor) -> dict[str, Tensor]:
        from .arithmetic import mx_quantize

        return mx_quantize(weight)

    def save(self, model: nn.Module, path: Path) -> None:
        from quantadapt.layerwise import save_layerwise
        from quantadapt.loading.writing import files_holding, name_bfloat16

        from .released import Released, holds_released, released_state

        if not holds_released(model):
            super().save(model, path)
            return
        with files_holding(model, lambda: released_state(model)):
            save_layerwise(Released(), model, path)
        name_bfloat16(path)

    @classmethod
    def from_checkpoint(cls, quantization_config: Mapping[str, Any]) -> _FP4 | None:
        if quantization_config.get("quant_method") == "mxfp4":
            return cls()
        return super().from_checkpoint(quantization_config)


class NVFP4(_FP4):
    """No options: 16 numbers share an e4m3 scale, by which their largest becomes 6 or 4, whichever
    leaves the smaller error; the whole weight has a float32 scale."""

    block = NV_BLOCK
    format = "nvfp4-pack-quantized"
    scale_dtype = "torch.float8_e4m3fn"
    strategy = "tensor_group"

    def _quantized(self, weight: Tensor) -> dict[str, Tensor]:
        from .arithmetic import nv_quantize

        return nv_quantize(weight)


def _is_weights_only(config: Mapping[str, Any], format_: str) -> bool:
    """Say whether a checkpoint of compressed-tensors has all its layers in this format, and no
    activations to be quantized."""
    groups = config.get("config_groups")
    if config.get("quant_method") != "compressed-tensors" or config.get("format") != format_:
        return False
    if not isinstance(groups, Mapping) or config.get("kv_cache_scheme"):
        return False
    return all(
        isinstance(group, Mapping)
        and not group.get("input_activations")
        and not group.get("output_activations")
        and group.get("format") in (None, format_)
        for group in groups.values()
    )


def _backend(name: str, summary: str, quantizer: type[_FP4], vllm: str) -> Backend:
    return Backend(
        name=name,
        summary=summary,
        quantizer=quantizer,
        merge=Merge.REQUANTIZE,
        serves=(Serving("vllm", vllm),),
    )


@hookimpl
def quantadapt_backends() -> list[Backend]:
    released = "MXFP4, 4.25 bits, no calibration; gpt-oss as it was released"
    return [
        _backend("mxfp4", released, MXFP4, "vllm>=0.15"),
        _backend("nvfp4", "NVFP4, 4.5 bits, no calibration data", NVFP4, "vllm>=0.9"),
    ]
