"""What layers a model has, before it is made: their names and sizes, from the headers of its files
or, where these are not here, from config.json alone. Pure.

Known for decoders of the usual kind. What a plan says by it, a run says of the model itself, by the
same functions, before any weight is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..inputs.model_config import towers_in
from ..inputs.weights import file_in, read_header
from ..memory.shape import Shape, is_decoder
from .on_disk import quantization_in

_NUMBERED = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_ONE_BY_ONE = re.compile(r"^(.*\.experts)\.\d+\.([^.]+)\.")
_STACKED = re.compile(r"\.experts\.|\.(input|output)_linear\.weight$")
_PACKED, _SCALES = "_blocks", "_scales"
"""What a stack in MXFP4 is called: codes, [experts, out_features, groups, bytes], and scales."""
_ROUTER = re.compile(r"(.*)\.(?:[^.]*_)?(?:gate|router)(?:\.layer)?$")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|embed_in|wte)\.weight$")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_SECOND = ("down_proj", "w2", "output_linear")
"""What layers of an expert are called whose outputs go out; the others are one stack."""
_GATES = ("gate_proj", "w1")
_QUANTIZED_STACK = re.compile(r"^(.*\.experts\.[^.]+)_stack\.")
"""What a stack is called in a file that holds it quantized: see `model.experts.SUFFIX`."""
_STACKS_ALONE = ("axk1", "ernie4_5_moe", "exaone_moe", "jamba", "lfm2_moe", "qwen2_moe",
                 "qwen3_5_moe_text", "qwen3_5_text", "qwen4_exp_text")  # fmt: skip
"""Conversions that stack experts, or rename what is no layer."""
_MIXTRAL = ((".block_sparse_moe.", ".mlp."),)
_RENAMED: dict[str, tuple[tuple[str, str], ...]] = {
    "mixtral": _MIXTRAL,
    "minimax_m2": _MIXTRAL,
    "phimoe": (*_MIXTRAL, (".gate.weight", ".router.weight")),
    "granitemoe": (
        (".block_sparse_moe.input_linear.weight", ".block_sparse_moe.experts.gate_up_proj"),
        (".block_sparse_moe.output_linear.weight", ".block_sparse_moe.experts.down_proj"),
        (".router.layer.", ".router."),
    ),
    **dict.fromkeys(_STACKS_ALONE, ()),
}
"""By whose conversion transformers reads files, what they call otherwise than its model; models
with one that is not here are unknown."""
_NUMBERED_PARTS = ("lfm2_moe", "minimax_m2", "mixtral", "phimoe")
"""Conversions of experts whose layers are called w1, w2 and w3."""
_CONVERSION = re.compile(r'"(\w+)": (?:\[|"(\w+)")|mapping\["(\w+)"\] \+?= ')
_TRANSPOSED = ("gpt_oss", "llama4_text")
"""Models whose stacks are [experts, in_features, out_features]."""
_LLAMA_LIKE = ("gemma", "gemma2", "llama", "mistral", "olmo2", "qwen2", "qwen3", "smollm3")
"""Dense models whose layers are called and made as Llama's; others fuse some."""
UNKNOWN = (0, 0)
"""The sizes of a stack that is quantized already."""
_NEW_HEADS = ("lm_head", "score", "classifier")
"""Heads that a model may have without its files: tied ones, and new ones."""


@dataclass(frozen=True)
class Layers:
    """The layers of a decoder's blocks, by their full names.

    Attributes:
        linears, stacks: what is quantized, with (in_features, out_features); of a stack of experts
            those of the tall layer, `UNKNOWN` where they are packed.
        routers: of experts.
        modules, parameters: the names of all, and others that stand for one; empty where only the
            sizes are known.
        others: modules that are no layers: they hold others, or vectors alone.
        embeddings: those of tokens. Of a checkpoint that is quantized already neither are told.
        parts: how files call layers of experts -> the stack that they are parts of.
    """

    linears: Mapping[str, tuple[int, int]]
    stacks: Mapping[str, tuple[int, int]]
    routers: tuple[str, ...] = ()
    modules: frozenset[str] = frozenset()
    parameters: frozenset[str] = frozenset()
    others: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    parts: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The names of all modules and stacks; empty where only sizes are known."""
        return [*self.modules, *self.stacks] if self.modules else []

    def without(self, skip: Iterable[str]) -> dict[str, tuple[int, int]]:
        """Return the sizes of what no name in `skip` leaves out, layers first."""
        return {
            name: size
            for name, size in (*self.linears.items(), *self.stacks.items())
            if not any(f".{s}." in f".{name}." for s in skip)
        }


def layers_of(config: Mapping[str, Any], folder: Path | None) -> Layers | None:
    """Return the layers of a model; None where it is of a kind that is not known here.

    Args:
        config: the contents of its config.json.
        folder: where its weights lie, whose headers have been checked; None where they are not
            here.
    """
    towers, kind = towers_in(config), str(config.get("model_type"))
    if not (towers or is_decoder(config)):
        return None
    files = sorted(folder.glob("*.safetensors")) if folder and not towers else []
    conversion = _conversions().get(kind)
    if files and conversion and conversion not in _RENAMED:
        return None
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        for name, tensor in read_header(file_in(file.parent, file.name)).items():
            shapes[_renamed(name, conversion)] = tuple(tensor["shape"])
    if shapes:
        return _in_files(shapes, config, conversion)
    shape = Shape.of(config)
    if shape is None or not (shape.experts or kind in _LLAMA_LIKE):
        return None
    return _by_sizes(shape)


@cache
def _conversions() -> dict[str, str]:
    """Return model_type -> whose conversion transformers reads its files by: its own or another's.
    From the source, as importing that takes seconds."""
    spec = find_spec("transformers")
    places = spec.submodule_search_locations if spec else None
    files = [Path(place, "conversion_mapping.py") for place in places or ()]
    texts = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
    found = _CONVERSION.findall("".join(texts))
    return {kind or own: other or kind or own for kind, other, own in found}


def _renamed(name: str, conversion: str | None) -> str:
    for before, after in _RENAMED.get(conversion or "", ()):
        name = name.replace(before, after)
    return name


def _in_files(
    shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], conversion: str | None
) -> Layers:
    transposed = config.get("model_type") in _TRANSPOSED
    linears: dict[str, tuple[int, int]] = {}
    stacks: dict[str, tuple[int, int]] = {}
    parts = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
    if conversion in _NUMBERED_PARTS:
        parts |= {"w1": "gate_up_proj", "w2": "down_proj", "w3": "gate_up_proj"}
    for name in filter(_NUMBERED.search, sorted(shapes, key=_place)):
        shape, module = shapes[name], name.rpartition(".")[0]
        if found := _ONE_BY_ONE.match(name):
            owner, part = found[1], found[2]
            parts[part] = _stack_of(part, owner, shapes)
            before = stacks.setdefault(stack := f"{owner}.{parts[part]}", UNKNOWN)
            if len(shape) == 2 and name.endswith(".weight"):
                stacks[stack] = shape[1], before[1] + shape[0]
        elif found := _QUANTIZED_STACK.match(name):
            stacks.setdefault(found[1], UNKNOWN)
        elif _STACKED.search(name) and len(shape) > 2:
            if not name.endswith(_SCALES):
                stacks[name.removesuffix(_PACKED)] = _tall(shape, transposed)
        elif len(shape) == 2 and name.endswith(".weight"):
            linears[module] = shape[1], shape[0]
    owners = {stack.removesuffix(".weight").rpartition(".")[0] for stack in stacks}
    owners |= {owner.removesuffix(".experts") for owner in owners}
    choosing = [
        n for n in linears if (found := _ROUTER.match(n)) is not None and found[1] in owners
    ]
    dense = not quantization_in(config)
    tables = tuple(n.removesuffix(".weight") for n in shapes if _EMBEDDING.search(n))
    return Layers(
        {name: size for name, size in linears.items() if name not in choosing},
        stacks,
        routers=tuple(name for name in choosing if name.endswith((".gate", ".router"))),
        modules=frozenset(_modules(shapes, stacks)),
        parameters=frozenset((*shapes, *_both_ways(stacks))),
        others=tuple(_others(shapes, stacks)) if dense else (),
        embeddings=tables if dense else (),
        parts=parts if stacks else {},
    )


def _others(shapes: Mapping[str, tuple[int, ...]], stacks: Iterable[str]) -> Iterator[str]:
    """Yield the modules that are no layers, in the order of the model. What owns a stack stands
    for it, and what files have inside of it is not in the model."""
    owners = {stack.rpartition(".")[0] for stack in stacks}
    vectors: dict[str, bool] = {}
    for name in sorted(shapes, key=_place):
        first, *rest = name.split(".")[:-1] or [""]
        module = first
        for part in rest:
            vectors[module], module = True, f"{module}.{part}"
        if module:
            vectors[module] = vectors.get(module, True) and len(shapes[name]) < 2
    inside = tuple(f"{owner}." for owner in owners)
    for module, has_none in vectors.items():
        if has_none and module not in owners and not module.startswith(inside):
            yield module


def _tall(shape: tuple[int, ...], transposed: bool) -> tuple[int, int]:
    """Return (in_features, out_features) of a stack's tall layer; packed, two codes are a byte."""
    experts, rows, *rest = shape
    if len(rest) > 1:
        return 2 * math.prod(rest), experts * rows
    return (rows, experts * rest[0]) if transposed else (rest[0], experts * rows)


def _stack_of(part: str, owner: str, shapes: Mapping[str, Any]) -> str:
    """Return what the stack is called that a layer of an expert is a part of."""
    if part in _SECOND:
        return "down_proj"
    gated = any(name.startswith(f"{owner}.0.{gate}.") for name in shapes for gate in _GATES)
    return "gate_up_proj" if gated else part


def _modules(shapes: Iterable[str], stacks: Iterable[str]) -> Iterator[str]:
    """Yield the names of all modules that hold parameters, and of what may be there besides."""
    for name in _both_ways((*shapes, *stacks)):
        parts = name.split(".")
        yield from (".".join(parts[:n]) for n in range(1, len(parts)))
    yield from _NEW_HEADS


def _both_ways(names: Iterable[str]) -> Iterator[str]:
    """Yield full names as models with and without a head have them."""
    for name in names:
        yield name
        yield name.removeprefix("model.") if name.startswith("model.") else f"model.{name}"


def _place(name: str) -> tuple[Any, ...]:
    """Return where a tensor is in the model's own order, about."""
    found, kind = _NUMBERED.search(name), name.split(".")[-2] if "." in name else name
    attention = _ATTENTION.index(kind) if kind in _ATTENTION else len(_ATTENTION)
    return int(found[1]) if found else -1, attention, name


def _by_sizes(shape: Shape) -> Layers:
    linears: dict[str, tuple[int, int]] = {}
    stacks: dict[str, tuple[int, int]] = {}
    for n in range(shape.layers):
        plain = n < shape.plain_layers
        for name, size in (shape.of_plain_layers if plain else shape).linears.items():
            place = f"model.layers.{n}"
            if shape.stacked(name) > 1 and not plain:
                stacks[f"{place}.mlp.{name}"] = size
            else:
                room = (
                    "mlp" if name.endswith(("gate_proj", "up_proj", "down_proj")) else "self_attn"
                )
                linears[f"{place}.{room}.{name}"] = size
    return Layers(linears, stacks)
