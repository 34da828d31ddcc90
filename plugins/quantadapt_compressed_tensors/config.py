"""What the config of a compressed-tensors checkpoint says of its layers, and what of that is not
read here. Nothing heavy is imported: plans read it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from quantadapt.errors import ModelError
from quantadapt_compressed_tensors.schemes import SCHEMES, Args, Scheme

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
    weights, given = _args(group["weights"], where), group.get("input_activations")
    inputs = None if given is None else _args(given, where)
    layout = _layout(group.get("format") or common, weights, inputs)
    kind, bits = FORMATS.get(layout, ("", ()))
    if not kind:
        raise _refused(f"the format {layout} is not read; {', '.join(FORMATS)} are")
    if weights.type != kind or weights.num_bits not in bits:
        said = f"{weights.num_bits} bits of type {weights.type}"
        raise _refused(f"{where} has {said}, which the format {layout} does not hold")
    if weights.type == "float" and not weights.symmetric:
        raise _refused(f"{where} has floats with zero points")
    inputs = None if inputs is None else _complete(inputs, layout)
    return Scheme(weights=_complete(weights, layout), inputs=inputs, format=layout)


def _args(given: Any, where: str) -> Args:
    """Return how a config says that numbers are rounded; `where` it does, for errors."""
    try:
        return Args.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"]))
        said = f" has {at} {first['input']!r}" if at else ""
        raise _refused(f"{where}{said}: {first['msg']}") from None


def _layout(said: Any, weights: Args, inputs: Args | None) -> str:
    """Return the format that a config means: where it says none, the one that compressed-tensors
    chooses."""
    if said == "naive-quantized":
        return f"{weights.type}-quantized"
    if said not in (None, "mixed-precision"):
        return str(said)
    if weights.type == "float" and weights.num_bits == 4:
        return "mxfp4-pack-quantized" if weights.group_size == 32 else "nvfp4-pack-quantized"
    if weights.type == "float":
        mx = weights.group_size == 32 and str(weights.scale_dtype).endswith("uint8")
        return "mxfp8-quantized" if mx else "float-quantized"
    return "pack-quantized" if inputs is None else "int-quantized"


def _complete(args: Args, layout: str) -> Args:
    """Return what older configs mean, which leave out what scales of FP4 and MX are in."""
    if args.type != "float" or not args.is_grouped or args.scale_dtype is not None:
        return args
    return args.model_copy(update={"scale_dtype": _SCALES.get(layout)})


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
