"""What a model has beside the layers of its decoder: towers that see or hear, and a head; and what
of it is quantized. By its files, or about, by config.json."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..inputs.model_config import towers_in
from ..inputs.weights import file_in, read_header
from ..memory.passes import HEAD
from ..memory.shape import Shape
from ..memory.towers import tower_linears, tower_weights
from .planned import Plan
from .share import FLOATS, IN_BLOCK, owner_of, tower_of, weights_in

_LOOKED_UP = re.compile(r"embed")
"""In the name of a matrix of which rows are looked up; it is no linear layer."""
_ATTENTION = "in_proj_weight"
"""Of torch's own attention, which reads the weight beside it and never calls that layer."""
_NO_CODES = (*FLOATS, "I64", "BOOL")
Sizes = Mapping[tuple[int, int], float]
"""(in_features, out_features) -> how many layers are of that size."""


@dataclass(frozen=True)
class Beside:
    """What a plan knows of it.

    Attributes:
        dense: weights of towers that stay dense.
        quantized: the quantized layers of towers.
        head: whether the head is quantized.
        towers: those of which layers are quantized, and so adapted.
    """

    dense: int = 0
    quantized: Sizes = field(default_factory=dict)
    head: bool = False
    towers: tuple[str, ...] = ()


def beside_of(made: Plan) -> Beside:
    """Return what the model of a plan has beside its decoder's layers."""
    config = made.config or {}
    folder = Path(made.model).expanduser() if made.model else None
    tensors = _tensors(folder) if folder else {}
    if made.adopt:
        return _packed(config, tensors)
    head = _quantizes_head(made)
    if not towers_in(config):
        return Beside(head=head)
    weights = Counter[str]()
    for name, tensor in tensors.items():
        weights[tower_of(name)] += weights_in(tensor)
    weights.pop("language", None)
    total = sum(weights.values()) or tower_weights(config)
    sizes = _chosen(made, tensors) if weights else tower_linears(config, made.spec.towers)
    quantized = Counter({s: n for s, n in sizes.items() if _takes(made, s)})
    chosen = tuple(tower for tower in made.spec.towers if tower != "language")
    return Beside(max(0, total - _numbers(quantized)), quantized, head, chosen)


def _tensors(folder: Path) -> dict[str, Mapping[str, Any]]:
    """Return the headers of all tensors of a checkpoint, which have been checked."""
    found: dict[str, Mapping[str, Any]] = {}
    for file in folder.glob("*.safetensors"):
        found |= read_header(file_in(folder, file.name))
    return found


def _quantizes_head(made: Plan) -> bool:
    """Say whether the head is quantized: where the spec names what stays dense, and not the head.
    One that is the embedding never is, and a new one is trained."""
    skip, text = made.spec.skip_modules, Shape.of(made.config or {})
    if skip is None or text is None or text.tied or made.task.head:
        return False
    return HEAD not in skip and _takes(made, (text.hidden, text.vocab))


def _takes(made: Plan, size: tuple[int, int]) -> bool:
    return not (made.spec.skip_misfits and made.quantizer.misfit(*size))


def _linears(
    tensors: Mapping[str, Mapping[str, Any]], towers: Collection[str]
) -> dict[str, tuple[int, int]]:
    """Return the sizes of the dense linear layers of `towers`, by name."""
    found = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        shape = tensor["shape"]
        plain = kind == "weight" and len(shape) == 2 and tensor["dtype"] in FLOATS
        if f"{module.rpartition('.')[0]}.{_ATTENTION}" in tensors:
            continue
        if plain and tower_of(name) in towers and not _LOOKED_UP.search(module):
            found[module] = (shape[1], shape[0])
    return found


def _chosen(made: Plan, tensors: Mapping[str, Mapping[str, Any]]) -> Sizes:
    """Return the layers that the spec has quantized in towers beside the language model."""
    skip = made.spec.skip_modules or ()
    towers = {*made.spec.towers} - {"language"}
    layers = _linears(tensors, towers)
    left = [n for n in layers if not any(f".{s}." in f".{n}." for s in skip)]
    return Counter(layers[name] for name in left)


def _packed(config: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Any]]) -> Beside:
    """Return it of a checkpoint that is quantized already. Packed layers of a tower's blocks have
    the sizes that config.json tells; of others nothing tells them, so they count by their bytes."""
    codes = {owner_of(n) for n, t in tensors.items() if t["dtype"] not in _NO_CODES}
    head = any(name.rpartition(".")[2] == HEAD for name in codes)
    there = towers_in(config)
    if not there or not tensors:
        return Beside(tower_weights(config), head=head)
    towers = {n: t for n, t in tensors.items() if tower_of(n) != "language"}
    plain = {n: t for n, t in towers.items() if owner_of(n) not in codes}
    packed = Counter[str]()
    for name, tensor in towers.items():
        if (owner := owner_of(name)) in codes:
            begin, end = tensor["data_offsets"]
            packed[owner] += end - begin
    in_blocks = {name: size for name, size in packed.items() if IN_BLOCK.search(f"{name}.")}
    by_bytes = sum(packed.values()) / (sum(in_blocks.values()) or 1)
    seeing: list[str] = []
    quantized: dict[tuple[int, int], float] = {}
    for tower in there:
        own = sum(tower_of(f"{name}.") == tower for name in in_blocks)
        dense = sum(bool(IN_BLOCK.search(name)) for name in _linears(plain, [tower]))
        if own:
            seeing.append(tower)
        for size, count in tower_linears(config, [tower]).items() if own else ():
            quantized[size] = quantized.get(size, 0) + count * by_bytes * own / (own + dense)
    return Beside(sum(map(weights_in, plain.values())), quantized, head, tuple(seeing))


def _numbers(sizes: Sizes) -> int:
    return int(sum(count * inputs * outputs for (inputs, outputs), count in sizes.items()))
