"""Fine-grained FP8, as DeepSeek-V3, Qwen3 and others are served: e4m3 codes with a scale for each
block of 128 x 128, transformers' `quant_method: fp8` (FineGrainedFP8Config).

Existing checkpoints are adopted and stay in FP8 in memory, on a CPU, too; here, a weight is rounded
to nearest. What goes into a layer is rounded as the kernels do that serve such models, for each
token and block of columns, in training, too: what is trained is what is served. Gradients pass
straight through. (transformers itself does so on CUDA alone, and dequantizes elsewhere.)
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PositiveInt, ValidationError

from quantadapt.capabilities import Merge
from quantadapt.errors import ModelError
from quantadapt.hookspecs import hookimpl
from quantadapt.protocols import ByteCodes, Grid, LayerwiseQuantizer, LayerwiseTarget
from quantadapt.records import Backend, Serving

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

METHOD = "fp8"
WHERE = "quantization_config"
DENSE_AGAIN = (
    "load it dense with transformers (FineGrainedFP8Config(dequantize=True)), save that, and start"
    " from there"
)


class FineGrainedFP8(LayerwiseQuantizer):
    """Options of transformers' `FineGrainedFP8Config`."""

    weight_block_size: tuple[PositiveInt, PositiveInt] | None = Field(
        (128, 128), description="rows and columns that share a scale; null: the whole weight"
    )
    scale_fmt: Literal["float", "ue8m0"] = Field(
        "float", description="of the scales: float32, or ue8m0: powers of two in a byte"
    )
    activation_scheme: Literal["dynamic", "static"] = Field(
        "dynamic",
        description="scales of inputs: of each token; static: as a checkpoint has them",
    )

    @cached_property
    def target(self) -> FP8Target:
        return FP8Target(self)

    def misfit(self, in_features: int, out_features: int) -> str | None:
        if self.activation_scheme == "static":
            return "static scales of inputs are read and not made: use activation_scheme: dynamic"
        return None

    def bits_per_weight(
        self, in_features: int, out_features: int, *, device: str, dtype: str
    ) -> float:
        height, width = self.weight_block_size or (out_features, in_features)
        scales = -(-out_features // height) * -(-in_features // width)
        return 8 + scales * (8 if self.scale_fmt == "ue8m0" else 32) / (out_features * in_features)

    def notes(self, device: str) -> tuple[str, ...]:
        return (
            "what goes into quantized layers is rounded to FP8, in training, too; what goes into"
            " stacks of experts is not",
        )

    def quantize_linear(self, linear: nn.Linear) -> nn.Module:
        from quantadapt_finegrained_fp8.rounding import quantized

        if misfit := self.misfit(linear.in_features, linear.out_features):
            raise ModelError(misfit, fix="set activation_scheme: dynamic")
        return quantized(linear, self.weight_block_size, self.scale_fmt == "ue8m0")

    # Checkpoints -------------------------------------------------------------------------------

    def load_linear(self, linear: nn.Linear, state: dict[str, Tensor]) -> nn.Module:
        from quantadapt_finegrained_fp8.files import loaded

        static, powers = self.activation_scheme == "static", self.scale_fmt == "ue8m0"
        return loaded(self.weight_block_size, static, powers, linear, state)

    def join_rows(self, layers: list[nn.Module]) -> nn.Module:
        from quantadapt_finegrained_fp8.rounding import joined

        return joined(layers)

    def save(self, model: nn.Module, path: Path) -> None:
        from quantadapt.loading.writing import experts_apart
        from quantadapt_finegrained_fp8.rounding import split

        with experts_apart(model, split):
            super().save(model, path)

    def quantization_config(self) -> dict[str, Any]:
        block = self.weight_block_size
        return {
            "quant_method": METHOD,
            "weight_block_size": None if block is None else list(block),
            "activation_scheme": self.activation_scheme,
            "scale_fmt": self.scale_fmt,
        }

    def left_dense(self, names: list[str], head: str | None) -> dict[str, Any]:
        return {"modules_to_not_convert": names}

    @classmethod
    def from_checkpoint(cls, quantization_config: Mapping[str, Any]) -> FineGrainedFP8 | None:
        config = quantization_config
        if config.get("quant_method") != METHOD:
            return None
        if config.get("expert_dtype", "fp8") != "fp8":
            what = f"its experts are in {config['expert_dtype']}, which is not read"
            raise ModelError(what, fix=DENSE_AGAIN, where=WHERE)
        if config.get("modules_to_convert"):
            what = "it has embeddings in FP8 (modules_to_convert), which are not read"
            raise ModelError(what, fix=DENSE_AGAIN, where=WHERE)
        if str(config.get("fmt") or "e4m3") != "e4m3":
            raise ModelError(f"its fmt is {config['fmt']}, no e4m3", fix=DENSE_AGAIN, where=WHERE)
        known = {name: config[name] for name in cls.model_fields if name in config}
        try:
            return cls(**known)
        except ValidationError as error:
            first = error.errors()[0]
            what = f"its {first['loc'][0]} is {first['input']!r}: {first['msg']}"
            raise ModelError(what, fix="restore its config.json", where=WHERE) from None

    @classmethod
    def from_model(cls, model: nn.Module) -> FineGrainedFP8 | None:
        import torch

        for name, module in model.named_modules():
            if type(module).__name__ == "FP8Experts":
                what = f"{name} holds its experts as transformers' FP8 kernels want them"
                raise ModelError(what, fix="load the model from its folder", where="module")
        found: Any = next(filter(_is_fp8, model.modules()), None)
        if found is None:
            return None
        powers = found.weight_scale_inv.dtype == torch.float8_e8m0fnu
        block = found.of_parts if hasattr(found, "of_parts") else found.block_size
        return cls(
            weight_block_size=block,
            scale_fmt="ue8m0" if powers else "float",
            activation_scheme="dynamic" if found.activation_scale is None else "static",
        )


def _is_fp8(module: nn.Module) -> bool:
    """Say whether a module is a layer of ours, or transformers' FP8Linear."""
    return type(module).__name__ in ("BlockFP8Linear", "FP8Linear") and hasattr(
        module, "weight_scale_inv"
    )


class FP8Target(LayerwiseTarget):
    """`BlockFP8Linear`, or transformers' `FP8Linear`."""

    quantizes_activations = True
    activation_error = 0.03
    reads_rows = True

    def matches(self, module: nn.Module) -> bool:
        return _is_fp8(module)

    def dequantize(self, module: nn.Module) -> Tensor:
        from quantadapt_finegrained_fp8.layers import dequantize

        return dequantize(module)

    def dequantize_rows(self, module: nn.Module, first: int, last: int) -> Tensor:
        from quantadapt_finegrained_fp8.layers import dequantize_rows

        return dequantize_rows(module, first, last)

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        from quantadapt_finegrained_fp8.layers import forward

        return forward(module, x)

    def byte_codes(self, module: nn.Module) -> ByteCodes:
        from quantadapt_finegrained_fp8.layers import byte_codes

        return byte_codes(module)

    def inputs_of_codes(self, module: nn.Module, x: Tensor) -> Tensor:
        from quantadapt_finegrained_fp8.layers import rounded_inputs

        return rounded_inputs(module, x)

    def requantize(self, module: nn.Module, weight: Tensor) -> nn.Module:
        """Round to nearest. A block keeps the scale that it has where that is closer."""
        from quantadapt_finegrained_fp8.rounding import requantized

        return requantized(module, weight).train(module.training)

    def grid(self, module: nn.Module) -> Grid:
        from quantadapt_finegrained_fp8.rounding import values_of

        return values_of(module)

    def repack(self, module: nn.Module, weight: Tensor) -> nn.Module:
        from quantadapt_finegrained_fp8.rounding import requantized, values_of

        nearest = values_of(module).nearest(weight.detach().float())
        return requantized(module, nearest, same_scales=True).train(module.training)


@hookimpl
def quantadapt_backends() -> list[Backend]:
    return [
        Backend(
            name="finegrained-fp8",
            summary="FP8 (e4m3) in blocks of 128 x 128, as DeepSeek and Qwen ship it",
            quantizer=FineGrainedFP8,
            merge=Merge.REQUANTIZE,
            serves=(Serving("vllm", "vllm>=0.8", adapters=True),),
        )
    ]
