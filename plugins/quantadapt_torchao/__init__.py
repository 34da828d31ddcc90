"""torchao weight-only quantization: int8, int4, other integers, float8 (https://github.com/pytorch/ao).

Checkpoints are transformers' own (TorchAoConfig, safetensors).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from quantadapt.capabilities import Merge, Rule
from quantadapt.hookspecs import hookimpl
from quantadapt.protocols import Quantizer
from quantadapt.records import Backend

from .base import TorchAO, for_tensor_cores
from .tiles import TILE_ROWS, joined_tiles

if TYPE_CHECKING:
    from torch import nn


PART = 2**26
"""Weights that go into tiles at once: four layers of an 8B model's attention."""


def _group_misfit(group_size: int, in_features: int) -> str | None:
    if in_features % group_size == 0:
        return None
    return f"groups of {group_size} do not divide {in_features} inputs"


class Int8(TorchAO):
    """int8 weights, one scale per output channel."""

    config_names = ("Int8WeightOnlyConfig",)
    tensor_names = ("Int8Tensor",)

    def bits_per_weight(
        self, in_features: int, out_features: int, *, device: str, dtype: str
    ) -> float:
        return 8 + (32 + 8) / in_features  # a scale and a zero point

    def _config(self, tensor_cores: bool) -> Any:
        from torchao.quantization import Int8WeightOnlyConfig

        return Int8WeightOnlyConfig(version=2)


class Float8(TorchAO):
    """float8 (e4m3) weights, one scale per output channel."""

    config_names = ("Float8WeightOnlyConfig",)
    tensor_names = ("Float8Tensor",)

    def quantize_linear(self, linear: nn.Linear) -> nn.Module:
        import torch

        made = super().quantize_linear(linear)
        weight: Any = made.weight
        empty = weight.scale == 0  # a row of zeros has become 0 / 0
        weight.qdata.view(torch.uint8).masked_fill_(empty, 0)
        weight.scale.masked_fill_(empty, 1)
        return made

    def bits_per_weight(
        self, in_features: int, out_features: int, *, device: str, dtype: str
    ) -> float:
        return 8 + 32 / in_features

    def _config(self, tensor_cores: bool) -> Any:
        from torchao.quantization import Float8WeightOnlyConfig

        return Float8WeightOnlyConfig()


class Intx(TorchAO):
    """Integers of 2 to 8 bits, a scale and a zero point per group; held unpacked in int8."""

    config_names = ("IntxWeightOnlyConfig",)
    tensor_names = ("IntxUnpackedToInt8Tensor",)

    bits: Literal[2, 3, 4, 5, 6, 7, 8] = Field(4, description="bits per weight")
    group_size: int = Field(64, ge=8, description="weights along in_features that share a scale")

    def misfit(self, in_features: int, out_features: int) -> str | None:
        return _group_misfit(self.group_size, in_features)

    def bits_per_weight(
        self, in_features: int, out_features: int, *, device: str, dtype: str
    ) -> float:
        return _unpacked_bits(self.group_size, dtype)

    def _config(self, tensor_cores: bool) -> Any:
        return _intx(self.bits, self.group_size)

    @classmethod
    def _from_config(cls, config: Mapping[str, Any]) -> Intx:
        bits = int(str(config["weight_dtype"]["_data"]).removeprefix("torch.").removeprefix("int"))
        return cls(bits=bits, group_size=config["granularity"]["_data"]["group_size"])  # type: ignore[arg-type]

    @classmethod
    def _from_tensor(cls, weight: Any) -> Intx:
        bits = int(str(weight.target_dtype).removeprefix("torch.int"))
        return cls(bits=bits, group_size=weight.block_size[-1])  # type: ignore[arg-type]


class Int4(TorchAO):
    """int4 weights per group: packed for the tensor cores on CUDA, unpacked elsewhere."""

    bits: ClassVar[int] = 4
    config_names = ("Int4WeightOnlyConfig", "IntxWeightOnlyConfig")
    tensor_names = ("Int4TilePackedTo4dTensor", "Int4Tensor", "IntxUnpackedToInt8Tensor")

    group_size: Literal[32, 64, 128, 256] = Field(64, description="weights that share a scale")
    layout: Literal["auto", "tile_packed", "unpacked"] = Field(
        "auto", description="auto: tile_packed on cuda in bfloat16, unpacked elsewhere"
    )

    def misfit(self, in_features: int, out_features: int) -> str | None:
        return _group_misfit(self.group_size, in_features)

    def quantize_linear(self, linear: nn.Linear) -> nn.Module:
        """What is made on the way to tiles is 16 times as large as they are, so a stack of experts
        goes there in parts."""
        from torch import nn

        from quantadapt.loading import linear_of

        rows = max(PART // linear.in_features // TILE_ROWS, 1) * TILE_ROWS
        tiles = self.layout != "unpacked" and for_tensor_cores(linear.weight)
        if not tiles or linear.out_features <= rows:
            return super().quantize_linear(linear)
        of_rows, quantized = linear.weight.data.split(rows), super().quantize_linear  # type: ignore[no-untyped-call]
        parts = [quantized(linear_of(weight)).weight for weight in of_rows]
        linear.weight = nn.Parameter(joined_tiles(parts), requires_grad=False)
        return linear

    def bits_per_weight(
        self, in_features: int, out_features: int, *, device: str, dtype: str
    ) -> float:
        tiles = device.startswith("cuda") and dtype == "bfloat16"
        if self.layout == "unpacked" or (self.layout == "auto" and not tiles):
            return _unpacked_bits(self.group_size, dtype)
        padded = -(-in_features // 1024) * 1024  # the layout's tiles
        return (4 + 2 * 16 / self.group_size) * padded / in_features

    def _config(self, tensor_cores: bool) -> Any:
        if self.layout == "unpacked" or (self.layout == "auto" and not tensor_cores):
            return _intx(4, self.group_size)
        from torchao.quantization import Int4WeightOnlyConfig

        return Int4WeightOnlyConfig(
            group_size=self.group_size, int4_packing_format="tile_packed_to_4d"
        )

    @classmethod
    def _from_config(cls, config: Mapping[str, Any]) -> Int4 | None:
        if "group_size" in config:
            return cls(group_size=config["group_size"], layout="tile_packed")
        return cls._from_intx(Intx._from_config(config))

    @classmethod
    def _from_tensor(cls, weight: Any) -> Int4 | None:
        if hasattr(weight, "target_dtype"):
            return cls._from_intx(Intx._from_tensor(weight))
        return cls(group_size=weight.block_size[-1], layout="tile_packed")

    @classmethod
    def _from_intx(cls, intx: Intx) -> Int4 | None:
        if intx.bits != 4 or intx.group_size not in (32, 64, 128, 256):
            return None
        return cls(group_size=intx.group_size, layout="unpacked")


def _unpacked_bits(group_size: int, dtype: str) -> float:
    """Codes, scales in the compute dtype, and zero points in int8."""
    return 8 + ((32 if dtype == "float32" else 16) + 8) / group_size


def _intx(bits: int, group_size: int) -> Any:
    import torch
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup

    return IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=PerGroup(group_size),
        mapping_type=MappingType.ASYMMETRIC,
    )


def _backend(
    name: str, summary: str, quantizer: type[Quantizer], rules: tuple[Rule, ...] = ()
) -> Backend:
    return Backend(
        name=name,
        summary=summary,
        quantizer=quantizer,
        requires=("torchao>=0.17",),
        imports=("torchao.quantization",),
        extra="quantadapt[torchao]",
        merge=Merge.REQUANTIZE,
        rules=rules,
    )


@hookimpl
def quantadapt_backends() -> list[Backend]:
    no_tiles = Rule(
        "torchao-tiles-need-cuda",
        {"device": ("cpu", "mps", "xpu"), "backend.layout": ("tile_packed",)},
        "the tile_packed int4 layout exists for CUDA only",
        "use layout: unpacked (or auto), or run on a CUDA device",
    )
    tiles_dtype = Rule(
        "torchao-tiles-need-bfloat16",
        {"backend.layout": ("tile_packed",), "dtype": ("float32", "float16")},
        "torchao's int4 tensor-core kernel computes in bfloat16 only",
        "use dtype: bfloat16, or layout: unpacked",
    )
    return [
        _backend("torchao-int8", "torchao int8 weight-only", Int8),
        _backend("torchao-int4", "torchao int4 weight-only", Int4, (no_tiles, tiles_dtype)),
        _backend("torchao-intx", "torchao integers of 2-8 bits, weight-only", Intx),
        _backend("torchao-fp8", "torchao float8 (e4m3) weight-only", Float8),
    ]
