"""How layers of compressed-tensors are rounded, in its words; the schemes that have a name. Nothing
heavy is imported: plans read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

PACKED = ("pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized")
"""Formats that hold several codes in a word."""


class Args(BaseModel):
    """How numbers are rounded: those of a weight, or of what goes into a layer. Field names are
    the config's; what else it says (observers and the like) says how it was made."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    num_bits: int = Field(8, ge=1, le=8)
    type: Literal["int", "float"] = "int"
    symmetric: bool = True
    strategy: Literal["tensor", "channel", "group", "tensor_group", "block", "token"] = "tensor"
    group_size: int | None = None
    block_structure: tuple[int, int] | None = None
    dynamic: bool | Literal["local"] = False
    actorder: Literal["group", "weight", "static", "dynamic"] | bool | None = None
    scale_dtype: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_strategy(cls, data: Any) -> Any:
        """Say the strategy where the config leaves it to the group size."""
        if not isinstance(data, Mapping) or data.get("strategy"):
            return data
        size = data.get("group_size")
        return {**data, "strategy": "tensor" if size is None else _of_size(size)}

    @model_validator(mode="after")
    def _has_sizes(self) -> Self:
        if self.is_grouped and not (self.group_size and self.group_size > 0):
            raise ValueError(f"strategy {self.strategy} has no group_size")
        if self.strategy == "block" and not (
            self.block_structure and min(self.block_structure) > 0
        ):
            raise ValueError("strategy block has no block_structure")
        return self

    @property
    def is_grouped(self) -> bool:
        """Whether neighbours along the inputs share a scale."""
        return self.strategy in ("group", "tensor_group")

    @property
    def has_own_scale(self) -> bool:
        """Whether a scale of the inputs is in the checkpoint, found by calibration."""
        return self.dynamic is not True

    def block(self, rows: int, columns: int) -> tuple[int, int]:
        """Return how many rows and columns of a weight of this size share a scale."""
        if self.strategy == "block":
            assert self.block_structure is not None
            return self.block_structure
        if self.is_grouped:
            assert self.group_size is not None
            return 1, self.group_size
        return (1 if self.strategy == "channel" else rows), columns

    def scales(self, rows: int, columns: int) -> tuple[int, ...]:
        """Return the shape of the scales of a weight of this size."""
        if self.strategy == "tensor":
            return (1,)
        height, width = self.block(rows, columns)
        return -(-rows // height), -(-columns // width)

    def said(self) -> dict[str, Any]:
        """Return it as the config says it."""
        values = self.model_dump()
        block, order = values.pop("block_structure"), values.pop("actorder")
        if (dtype := values.pop("scale_dtype")) is not None:
            values["scale_dtype"] = dtype
        if block is not None:
            values["block_structure"] = list(block)
        return {**values, **({"actorder": order} if order else {})}


class Scheme(BaseModel):
    """How the layers of one group are rounded.

    Attributes:
        weights: of what they hold.
        inputs: of what goes into them; None where that is not rounded.
        format: how the weights lie in files.
    """

    model_config = ConfigDict(frozen=True)

    weights: Args
    inputs: Args | None = None
    format: str

    @property
    def has_input_scale(self) -> bool:
        """Whether files hold a scale of what goes into a layer."""
        return self.inputs is not None and self.inputs.has_own_scale

    @property
    def has_small_scales(self) -> bool:
        """Whether scales take a byte each, as of FP4 and MX: the library unpacks those in
        bfloat16, whatever dtype the model has."""
        return self.format.startswith(("nvfp4", "mxfp"))

    @property
    def has_power_scales(self) -> bool:
        """Whether scales are powers of two: exponents in a byte, biased by 127, as of MX."""
        return self.format.startswith("mx")

    def misfit(self, in_features: int, out_features: int) -> str | None:
        """Say why a layer of this size cannot be rounded so."""
        for args, what in ((self.weights, "groups"), (self.inputs, "groups of inputs")):
            if args and args.is_grouped and in_features % (args.group_size or 1):
                size = args.group_size
                return f"{what} of {size} do not divide its {in_features} inputs"
        return None

    def bits(self, rows: int, columns: int, scale: int) -> float:
        """Return bits per weight in memory, where a scale takes `scale` bits if the format does not
        say otherwise."""
        weights, whole = self.weights, 0
        if self.has_small_scales:
            scale = 8
        code, zero = float(weights.num_bits if self.format in PACKED else 8), 0
        if not weights.symmetric:
            zero = weights.num_bits if self.format == "pack-quantized" else 8
        if self.format == "pack-quantized":
            code = -(-columns * weights.num_bits // 32) * 32 / columns
            whole += 2 * 64  # weight_shape
        if weights.strategy == "tensor_group":
            whole += 32
        if self.inputs is not None and self.has_input_scale:
            whole += 32 if self.inputs.strategy == "tensor_group" else scale
        scales = prod(weights.scales(rows, columns))
        return code + (scales * (scale + zero) + whole) / (rows * columns)

    def said(self, targets: list[str]) -> dict[str, Any]:
        """Return the group of a config."""
        inputs = None if self.inputs is None else self.inputs.said()
        return {
            "targets": targets,
            "weights": self.weights.said(),
            "input_activations": inputs,
            "output_activations": None,
            "format": self.format,
        }


def _of_size(size: Any) -> str:
    return "channel" if size == -1 else "group"


def _int(bits: int, group: int | None = 128, *, symmetric: bool = True) -> Args:
    strategy: Any = "group" if group else "channel"
    return Args(num_bits=bits, strategy=strategy, group_size=group, symmetric=symmetric)


def _float(bits: int, strategy: str, size: int | None = None, **more: Any) -> Args:
    given = {"num_bits": bits, "type": "float", "strategy": strategy, "group_size": size}
    return Args.model_validate({**given, **more})


def _fp4(inputs: bool | str | None = None) -> Args:
    more = {"scale_dtype": "torch.float8_e4m3fn", "dynamic": inputs or False}
    return _float(4, "tensor_group", 16, **more)


def _mx(bits: int, *, dynamic: bool = False) -> Args:
    return _float(bits, "group", 32, scale_dtype="torch.uint8", dynamic=dynamic)


_TOKENS = Args(strategy="token", dynamic=True)
_FP8_TOKENS = _float(8, "token", dynamic=True)

SCHEMES: dict[str, Scheme] = {
    "W4A16": Scheme(weights=_int(4), format="pack-quantized"),
    "W4A16_ASYM": Scheme(weights=_int(4, symmetric=False), format="pack-quantized"),
    "W8A16": Scheme(weights=_int(8), format="pack-quantized"),
    "W4A8": Scheme(weights=_int(4), inputs=_TOKENS, format="int-quantized"),
    "W4AFP8": Scheme(weights=_int(4), inputs=_FP8_TOKENS, format="int-quantized"),
    "W8A8": Scheme(weights=_int(8, None), inputs=_TOKENS, format="int-quantized"),
    "FP8": Scheme(
        weights=_float(8, "tensor"), inputs=_float(8, "tensor"), format="float-quantized"
    ),
    "FP8_DYNAMIC": Scheme(
        weights=_float(8, "channel"), inputs=_FP8_TOKENS, format="float-quantized"
    ),
    "FP8_BLOCK": Scheme(
        weights=_float(8, "block", block_structure=(128, 128)),
        inputs=_float(8, "group", 128, dynamic=True),
        format="float-quantized",
    ),
    "NVFP4A16": Scheme(weights=_fp4(), format="nvfp4-pack-quantized"),
    "NVFP4": Scheme(weights=_fp4(), inputs=_fp4("local"), format="nvfp4-pack-quantized"),
    "MXFP4A16": Scheme(weights=_mx(4), format="mxfp4-pack-quantized"),
    "MXFP4": Scheme(weights=_mx(4), inputs=_mx(4, dynamic=True), format="mxfp4-pack-quantized"),
    "MXFP8A16": Scheme(weights=_mx(8), format="mxfp8-quantized"),
    "MXFP8": Scheme(weights=_mx(8), inputs=_mx(8, dynamic=True), format="mxfp8-quantized"),
}
"""The schemes by the names that compressed-tensors has for them (`preset_name_to_scheme`)."""

Name = Literal[
    "W4A16", "W4A16_ASYM", "W8A16", "W4A8", "W4AFP8", "W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK",
    "NVFP4A16", "NVFP4", "MXFP4A16", "MXFP4", "MXFP8A16", "MXFP8",
]  # fmt: skip
SIZES = ("W4A16", "W4A16_ASYM", "W8A16", "W4A8", "W4AFP8")
"""Schemes whose groups may have another size."""


def sized(name: str, group_size: int | None) -> Scheme:
    """Return the scheme of that name, with groups of another size if one is given; -1 are whole
    rows."""
    scheme = SCHEMES[name]
    if group_size is None:
        return scheme
    size = None if group_size == -1 else group_size
    strategy = "group" if size else "channel"
    weights = scheme.weights.model_copy(update={"strategy": strategy, "group_size": size})
    return scheme.model_copy(update={"weights": weights})


def named(scheme: Scheme) -> tuple[Any, int | None] | None:
    """Return the name of a scheme, and its group size where that is not the usual one."""
    size = scheme.weights.group_size
    sizes = [None] if size is None else [None, size]
    for name in SCHEMES:
        for given in [*sizes, -1] if name in SIZES else [None]:
            if sized(name, given) == scheme:
                return name, given
    return None
