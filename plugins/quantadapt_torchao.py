"""torchao weight-only quantization: int8, int4, other integers, float8 (https://github.com/pytorch/ao).

Checkpoints are transformers' own (TorchAoConfig, safetensors).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from pydantic import Field, ValidationError

from quantadapt.capabilities import Merge, Rule
from quantadapt.compiling import one_kernel
from quantadapt.hookspecs import hookimpl
from quantadapt.protocols import (
    ByteCodes,
    CodebookGrid,
    Grid,
    LayerwiseQuantizer,
    LayerwiseTarget,
    Quantizer,
    UniformGrid,
    float8_levels,
    twin,
)
from quantadapt.records import Backend

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor, nn

TILES, TILE_ROWS = "Int4TilePackedTo4dTensor", 8
DECODING = 128
"""Tokens up to which torchao's product with tiles beats dequantizing on CUDA."""


class _TorchAO(LayerwiseQuantizer):
    config_names: ClassVar[tuple[str, ...]]
    tensor_names: ClassVar[tuple[str, ...]]

    @cached_property
    def target(self) -> TorchAOTarget:
        return TorchAOTarget(self)

    @abstractmethod
    def _config(self, tensor_cores: bool) -> Any:
        """Return torchao's config for layers that are on CUDA in bfloat16, or for others."""

    def quantize_linear(self, linear: nn.Linear) -> nn.Module:
        import torch
        from torchao.quantization import quantize_

        tensor_cores = linear.weight.is_cuda and linear.weight.dtype == torch.bfloat16
        tensor_cores &= self.misfit(linear.in_features, linear.out_features) is None
        config = self._config(tensor_cores)
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
    def _from_config(cls, config: Mapping[str, Any]) -> _TorchAO | None:
        """Read the options back from the data of a serialized torchao config."""
        return cls()

    @classmethod
    def from_checkpoint(cls, quantization_config: Mapping[str, Any]) -> _TorchAO | None:
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
    def from_model(cls, model: nn.Module) -> _TorchAO | None:
        for module in model.modules():
            weight = module._parameters.get("weight")
            if type(weight).__name__ in cls.tensor_names and not _rounds_activations(weight):
                try:
                    return cls._from_tensor(weight)
                except ValidationError:  # options that there are not here
                    return None
        return None

    @classmethod
    def _from_tensor(cls, weight: Any) -> _TorchAO | None:
        return cls()


def _rounds_activations(weight: Any) -> bool:
    """Say whether torchao quantizes the inputs as well, for such a weight."""
    names = ("act_quant_kwargs", "activation_quantization")
    return any(getattr(weight, name, None) is not None for name in names)


def _group_misfit(group_size: int, in_features: int) -> str | None:
    if in_features % group_size == 0:
        return None
    return f"groups of {group_size} do not divide {in_features} inputs"


class Int8(_TorchAO):
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


class Float8(_TorchAO):
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


class Intx(_TorchAO):
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


class Int4(_TorchAO):
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


class TorchAOTarget(LayerwiseTarget):
    """`nn.Linear` whose weight is one of torchao's tensor subclasses."""

    reads_rows = True

    def matches(self, module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        return type(weight).__module__.startswith("torchao.") and hasattr(module, "in_features")

    def dequantize(self, module: nn.Module) -> Tensor:
        weight: Any = module.weight
        if type(weight).__name__ == TILES:
            return _of_tiles(weight, weight.qdata, weight.scale_and_zero, weight.shape[0])
        return _of_parts(weight)

    def dequantize_rows(self, module: nn.Module, first: int, last: int) -> Tensor:
        import torch

        weight: Any = module.weight
        with torch.no_grad():
            if type(weight).__name__ != TILES:
                return _of_parts(weight[first:last])
            if first % TILE_ROWS or last % TILE_ROWS:
                return super().dequantize_rows(module, first, last)
            packed = weight.qdata[first // TILE_ROWS : last // TILE_ROWS]
            scales = weight.scale_and_zero[:, first:last].contiguous()
            return _of_tiles(weight, packed, scales, last - first)

    def grid(self, module: nn.Module) -> Grid | None:
        import torch

        weight: Any = module.weight
        kind, dtype = type(weight).__name__, weight.dtype
        if kind == TILES:
            size = weight.block_size[-1]
            parts = weight.scale_and_zero.transpose(0, 1).float()
            scale, zero = parts[:, : weight.shape[1] // size].unbind(-1)  # no padding
            return TileGrid(
                scale=scale, zero=zero, group_size=size, dtype=dtype, lowest=0, highest=15
            )
        if kind == "Float8Tensor" and tuple(weight.block_size) == (1, weight.shape[1]):
            return CodebookGrid(
                scale=weight.scale.view(-1, 1),
                group_size=weight.shape[1],
                dtype=dtype,
                levels=float8_levels(weight.qdata.dtype, weight.device),
            )
        if kind not in ("Int8Tensor", "IntxUnpackedToInt8Tensor") or weight.block_size[0] != 1:
            return None
        bits = int(str(getattr(weight, "target_dtype", torch.int8)).removeprefix("torch.int"))
        zero = weight.zero_point
        return UniformGrid(
            scale=weight.scale.view(weight.shape[0], -1),
            zero=None if zero is None else zero.view(weight.shape[0], -1),
            group_size=weight.block_size[1],
            dtype=dtype,
            lowest=-(2 ** (bits - 1)),
            highest=2 ** (bits - 1) - 1,
        )

    def repack(self, module: nn.Module, weight: Tensor) -> nn.Module:
        import torch

        grid, old = self.grid(module), cast("Any", module.weight)
        assert grid is not None
        codes = grid.codes(weight)
        if isinstance(grid, CodebookGrid):  # a code is the byte itself
            codes = codes.to(torch.uint8).view(old.qdata.dtype)
        elif isinstance(grid, TileGrid):
            codes = _repacked_tiles(old.qdata, codes)
        names, context = old.__tensor_flatten__()
        parts = {name: getattr(old, name) for name in names} | {"qdata": codes.to(old.qdata.dtype)}
        packed = type(old).__tensor_unflatten__(parts, context, old.shape, old.stride())
        vendor = twin(module)
        vendor.weight = torch.nn.Parameter(packed, requires_grad=False)
        repacked: nn.Module = vendor
        return repacked

    def decodes(self, module: nn.Module, x: Tensor) -> bool:
        """Say whether torchao's product with such a weight is the faster one for `x` on CUDA."""
        import torch

        few = x.numel() <= DECODING * x.shape[-1]
        # It computes in bfloat16 whatever it is given.
        tiles = type(module.weight).__name__ == TILES and x.dtype == torch.bfloat16
        return x.is_cuda and few and tiles

    def byte_codes(self, module: nn.Module) -> ByteCodes | None:
        weight: Any = module.weight
        if type(weight).__name__ == TILES or (grid := self.grid(module)) is None:
            return None
        return ByteCodes(held=weight.qdata, grid=grid)


@dataclass(frozen=True)
class _Layout:
    """What a tensor subclass is beside the tensors in it."""

    kind: Any
    names: tuple[str, ...]
    shape: tuple[int, ...]
    key: str
    context: Any = field(compare=False)


def _dequantize_parts(*parts: Any) -> Tensor:
    *tensors, layout = parts
    inner = dict(zip(layout.names, tensors, strict=True))
    whole = layout.kind.__tensor_unflatten__(inner, layout.context, layout.shape, None)
    dense: Tensor = whole.dequantize()
    return dense


@dataclass(frozen=True, eq=False, kw_only=True)
class TileGrid(UniformGrid):
    """Values (code - 8) * scale + zero."""

    def _codes(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        assert zero is not None
        return super()._codes(weight, scale, 8 - zero / scale)

    def _values(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        assert zero is not None
        return ((codes - 8) * scale + zero).to(self.dtype)


def _of_parts(weight: Any) -> Tensor:
    """Return what a tensor with a `dequantize` of its own stands for."""
    names, context = weight.__tensor_flatten__()
    layout = _Layout(type(weight), tuple(names), tuple(weight.shape), repr(context), context)
    tensors = tuple(getattr(weight, name) for name in names)
    return one_kernel(_dequantize_parts, *tensors, static=(layout,), otherwise=weight.dequantize)


def _of_tiles(weight: Any, packed: Tensor, scale_and_zero: Tensor, rows: int) -> Tensor:
    """Return what `rows` rows of a tensor in tiles stand for; it has no `dequantize`."""
    static = (rows, weight.shape[1], weight.block_size[-1])
    return one_kernel(_dequantize_tiles, packed, scale_and_zero, static=static)


def _dequantize_tiles(
    packed: Tensor, scale_and_zero: Tensor, rows: int, columns: int, group_size: int
) -> Tensor:
    import torch

    where, shift = _in_tiles(packed, rows, columns)
    codes = (packed[where] >> shift) & 15
    row, column = (torch.arange(count, device=packed.device) for count in (rows, columns))
    scale, zero = scale_and_zero[column[None] // group_size, row[:, None]].float().unbind(-1)
    return ((codes - 8) * scale + zero).to(scale_and_zero.dtype)


def _in_tiles(
    packed: Tensor, rows: int, columns: int
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return in which word of `packed` each code lies, and from which bit on.

    PyTorch's `_convert_weight_to_int4pack` lays weights out as a warp's 32 threads want them:
    [rows / 8, columns / (16 k), 32, k / 2] int32 words of eight codes.
    """
    import torch

    row = torch.arange(rows, device=packed.device)[:, None]
    column = torch.arange(columns, device=packed.device)[None]
    width = 32 * packed.shape[3]  # columns of a tile
    thread = (row % 8) * 4 + column % 8 // 2
    where = row // 8, column // width, thread, column % width // 32
    return where, column % 32 // 8 * 4 + column % 2 * 16


def _repacked_tiles(packed: Tensor, codes: Tensor) -> Tensor:
    """Return `packed` with other codes, [rows, columns], in it; its padding stays."""
    where, shift = _in_tiles(packed, *codes.shape)
    before = (packed[where] >> shift) & 15
    changed = (codes - before).long() << shift
    # Each code has its bits for itself, so sums of 64 bits carry nothing over.
    return packed.long().index_put(where, changed, accumulate=True).to(packed.dtype)


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
