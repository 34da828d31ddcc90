"""How the config of a compressed-tensors checkpoint says what is rounded, and to what; the schemes
that have a name. Nothing heavy is imported: plans read it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from quantadapt.errors import ModelError

WHERE = "quantization_config"
DENSE_AGAIN = (
    "load it dense with transformers (CompressedTensorsConfig(dequantize=True)), save that, and"
    " start from there"
)
"""The way out of what is not read."""

FORMATS = {
    "pack-quantized": ("int", tuple(range(1, 9))),
    "int-quantized": ("int", tuple(range(1, 9))),
    "float-quantized": ("float", (8,)),
    "mxfp8-quantized": ("float", (8,)),
    "nvfp4-pack-quantized": ("float", (4,)),
    "mxfp4-pack-quantized": ("float", (4,)),
}
"""The layouts that are read and written: type and bits of their weights."""
_SCALES = {
    "nvfp4-pack-quantized": "torch.float8_e4m3fn",
    "mxfp4-pack-quantized": "torch.uint8",
    "mxfp8-quantized": "torch.uint8",
}
"""What the scales of a layout are in."""


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


PACKED = ("pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized")
"""Formats that hold several codes in a word."""


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


def schemes_in(config: Mapping[str, Any]) -> list[Scheme]:
    """Return the schemes of the groups of a config.

    Raises:
        ModelError: it says something that is not read here, or nothing sensible.
    """
    _refuse_unread(config)
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise _refused("it has no config_groups", "restore its config.json")
    return [_scheme(name, group, config.get("format")) for name, group in groups.items()]


def _scheme(name: str, group: Any, common: Any) -> Scheme:
    where = f"its {name}"
    if isinstance(group, list) and name in SCHEMES:  # a scheme by its name
        return SCHEMES[name]
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        raise _refused(f"{where} says nothing of weights", DENSE_AGAIN)
    if group.get("output_activations"):
        raise _refused(f"{where} rounds what comes out of layers, which is not done here")
    if any(target == "Embedding" for target in group.get("targets") or ()):
        raise _refused(f"{where} is of embeddings, which stay dense here")
    try:
        weights = Args.model_validate(group["weights"])
        given = group.get("input_activations")
        inputs = None if given is None else Args.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"]))
        what = f"{where} has {at} {first['input']!r}: {first['msg']}" if at else first["msg"]
        raise _refused(what if at else f"{where}: {what}") from None
    layout = group.get("format") or common
    if layout == "naive-quantized":
        layout = f"{weights.type}-quantized"
    elif layout in (None, "mixed-precision"):
        layout = _layout_of(weights, inputs)
    kind, bits = FORMATS.get(str(layout), ("", ()))
    if not kind:
        raise _refused(f"the format {layout} is not read; {', '.join(FORMATS)} are")
    if weights.type != kind or weights.num_bits not in bits:
        said = f"{weights.num_bits} bits of type {weights.type}"
        raise _refused(f"{where} has {said}, which the format {layout} does not hold")
    weights = _complete(weights, str(layout))
    inputs = None if inputs is None else _complete(inputs, str(layout))
    if weights.type == "float" and not weights.symmetric:
        raise _refused(f"{where} has floats with zero points")
    return Scheme(weights=weights, inputs=inputs, format=str(layout))


def _complete(args: Args, layout: str) -> Args:
    """Return what older configs mean, which leave out what scales of FP4 and MX are in."""
    if args.type != "float" or not args.is_grouped or args.scale_dtype is not None:
        return args
    return args.model_copy(update={"scale_dtype": _SCALES.get(layout)})


def _layout_of(weights: Args, inputs: Args | None) -> str:
    """Return the format that compressed-tensors chooses where none is said."""
    if weights.type == "float" and weights.num_bits == 4:
        return "mxfp4-pack-quantized" if weights.group_size == 32 else "nvfp4-pack-quantized"
    if weights.type == "float":
        mx = weights.group_size == 32 and str(weights.scale_dtype).endswith("uint8")
        return "mxfp8-quantized" if mx else "float-quantized"
    return "pack-quantized" if inputs is None else "int-quantized"


def _refuse_unread(config: Mapping[str, Any]) -> None:
    """Raise ModelError for what whole checkpoints may be and are not read as."""
    if config.get("transform_config"):
        raise _refused("its weights are rotated (transform_config), which takes code of their own")
    sparsity = config.get("sparsity_config") or {}
    if isinstance(sparsity, Mapping) and sparsity.get("format") not in (None, "dense"):
        raise _refused(f"it is sparse (sparsity_config: {sparsity.get('format')})")
    status = str(config.get("quantization_status") or "compressed")
    if status != "compressed":
        what = f"its quantization_status is {status}: the files hold floats, not codes"
        raise _refused(what, "compress it with compressed_tensors' ModelCompressor, and save that")


def left_out(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a config says and adapters are trained without."""
    if config.get("kv_cache_scheme"):
        yield (
            "the checkpoint says how the KV cache is rounded (kv_cache_scheme): training does not"
            " round it, and what is merged and written here does not say it any more"
        )


def _refused(what: str, fix: str = DENSE_AGAIN) -> ModelError:
    return ModelError(what, fix=fix, where=WHERE)
