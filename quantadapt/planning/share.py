"""How much of a model is quantized, and what stays dense: told for every model, and loudly where it
is little, so that nobody counts on less memory than the model takes."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..inputs.weights import file_in, read_header

ENOUGH = 0.8
"""Below this share of the weights a user is warned."""
BEGINNING = "quantized are"
DENSE_EXPERTS = (
    "the checkpoint holds its experts dense, as what wrote it quantizes layers alone: they are"
    " quantized, too, if you begin with the unquantized model"
)
_EXPERTS = re.compile(r"\.experts\.")
_NO_STACK = re.compile(r"\.experts\.mlp\.(w1|v1|w2)$")
"""Weights of DBRX's experts, which stay dense: all of them are one matrix, and no stack."""
IN_BLOCK = re.compile(r"\.(layers|h|blocks)\.\d+\.")
_IS_WEIGHT = re.compile(r"(\.weight|\.bias|_proj|_proj_bias)$")
"""What a dense layer or stack has; one that is packed has more, such as scales."""
_WHAT_OF = re.compile(r"(\.weight(\..*)?|\.[^.]*|_(blocks|scales|bias))$")
FLOATS = ("F64", "F32", "F16", "BF16")
_ROUTER = re.compile(r"\.(gate|router)\.(weight|wg\.weight)$")
_TABLE = re.compile(r"(^|\.)(embed_tokens|wte|wpe|embed_in|word_embeddings|lm_head)\.weight$")
_TOWERS = {
    "projector": re.compile(
        r"(^|\.)(multi_modal_projector|connector|projector|embed_(vision|audio)"
        r"|visual\.(\w+_)?merger(_list)?)\."
    ),
    "vision": re.compile(r"(^|\.)(visual|vision_tower|vision_model|vision_encoder|image_tower)\."),
    "audio": re.compile(r"(^|\.)(audio_tower|audio_encoder|speech_encoder)\."),
}
"""What transformers calls the towers of its models (`PreTrainedModel.get_encoder`). The model
itself is asked once it is there, see `model.towers`."""
_MOST = 3
"""So many kinds of what stays dense are named."""


@dataclass(frozen=True)
class Share:
    """How many weights are quantized.

    Attributes:
        quantized: their number.
        dense: the number of those that are not, by what holds them; without embeddings and what
            was left out on purpose.
        of: the towers that are counted, where others of the model are left as they are.
    """

    quantized: int
    dense: Mapping[str, int] = field(default_factory=dict)
    of: Sequence[str] = ()

    @property
    def fraction(self) -> float:
        """The share that is quantized, 0 to 1."""
        total = self.quantized + sum(self.dense.values())
        return self.quantized / total if total else 1.0

    @property
    def is_low(self) -> bool:
        """Whether a user is to be warned."""
        return self.fraction < ENOUGH

    @property
    def has_dense_experts(self) -> bool:
        """Whether stacks of experts are not quantized, which are most of what is dense."""
        return 2 * self.dense.get("experts", 0) > sum(self.dense.values())

    def without(self, left: Mapping[str, tuple[int, int]]) -> Share:
        """Return it with layers and stacks dense that were to be quantized, by name with sizes."""
        dense = Counter(self.dense)
        for name, size in left.items():
            dense[part_of(name) or "Linear"] += math.prod(size)
        numbers = sum(map(math.prod, left.values()))
        return Share(self.quantized - numbers, dense, self.of)

    @property
    def words(self) -> str:
        """What is told of it, one sentence."""
        return f"{BEGINNING} {self.amount}"

    @property
    def amount(self) -> str:
        """The same, where it is said already that this is quantized."""
        total = self.quantized + sum(self.dense.values())
        names = sorted((n for n in self.dense if self.dense[n]), key=lambda n: -self.dense[n])
        some = ", ".join(f"{n} {self.dense[n] / total:.1%}" for n in names[:_MOST])
        rest = f"; dense stay {some}" if some else ""
        whose = f" of {' and '.join(self.of)}" if self.of else ""
        counted = f"of the weights{whose}, embeddings and head not counted"
        return f"{self.fraction:.1%} {counted}{rest}"


def remark(note: str) -> str:
    """Return a plan's note as it is shown: that few weights are quantized is a warning."""
    return f"{'warning' if note.startswith(BEGINNING) else 'note'}: {note}"


def tower_of(name: str) -> str:
    """Return which tower a tensor is of, as its name in a checkpoint says."""
    return next((tower for tower, known in _TOWERS.items() if known.search(name)), "language")


def tower_sizes(folder: Path) -> dict[str, int]:
    """Return how many weights each tower of a checkpoint has; see `share_on_disk` for `folder`."""
    found: Counter[str] = Counter()
    for file in folder.glob("*.safetensors"):
        for name, tensor in read_header(file_in(folder, file.name)).items():
            found[tower_of(name)] += weights_in(tensor)
    return dict(found)


def weights_in(tensor: Mapping[str, Any]) -> int:
    """Return how many numbers a tensor has, as its header says."""
    return math.prod(tensor["shape"])


def share_on_disk(
    folder: Path,
    vocabulary: int | None,
    skip: tuple[str, ...],
    *,
    experts: bool,
    towers: Collection[str] = ("language",),
) -> Share | None:
    """Return what will be quantized of a checkpoint, as the names and sizes in its files say it;
    None where they are not here.

    Args:
        folder: where the weights lie; their headers have been checked.
        vocabulary: how many tokens the model has, by which embedding and head are known.
        skip: the modules that are left out.
        experts: whether the backend quantizes stacks of experts.
        towers: the parts of an image-text model that are quantized; others are left out.
    """
    dense: Counter[str] = Counter()
    quantized, others = 0, False
    for file in folder.glob("*.safetensors"):
        for name, tensor in read_header(file_in(folder, file.name)).items():
            shape = tensor["shape"]
            if len(shape) < 2 or vocabulary in shape or _TABLE.search(name):
                continue
            if any(f".{s}." in f".{name}." for s in skip):
                continue
            if tower_of(name) not in towers:
                others = True
                continue
            if is_expert_bias(name):
                continue
            kind = part_of(name)
            dense_experts = kind == "experts" and (not experts or _NO_STACK.search(name))
            if kind == "routers" or dense_experts:
                dense[kind] += math.prod(shape)
            else:
                quantized += math.prod(shape)
    of = tuple(towers) if others else ()
    return Share(quantized, dense, of) if quantized or dense else None


def packed_share(folder: Path, numbers: int) -> Share | None:
    """Return what is quantized of a checkpoint that holds packed weights, by what its files hold as
    plain floats; None where they are not here.

    Args:
        folder: where the weights lie; their headers have been checked.
        numbers: how many weights the linear layers and stacks of all blocks have.
    """
    tensors: dict[str, dict[str, Any]] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= read_header(file_in(folder, file.name))
    if not tensors:
        return None
    packed = {owner_of(name) for name in tensors if not _IS_WEIGHT.search(name)}
    dense: Counter[str] = Counter()
    for name, tensor in tensors.items():
        if len(tensor["shape"]) < 2 or not IN_BLOCK.search(name) or is_expert_bias(name):
            continue
        plain = tensor["dtype"] in FLOATS and owner_of(name) not in packed
        if plain and tower_of(name) == "language":
            dense[part_of(name) or "Linear"] += math.prod(tensor["shape"])
    return Share(max(0, numbers - sum(dense.values()) + dense["routers"]), dense)


def owner_of(name: str) -> str:
    """Return whose a tensor is, as `experts.0.w1` of `experts.0.w1.weight.absmax`."""
    return _WHAT_OF.sub("", name)


def is_expert_bias(name: str) -> bool:
    """Say whether a tensor holds biases, one row for each expert, and so no weights."""
    return _EXPERTS.search(name) is not None and name.endswith("bias")


def part_of(name: str) -> str:
    """Return which part of a mixture of experts a tensor is: "experts", "routers", or ""."""
    return "experts" if _EXPERTS.search(name) else "routers" if _ROUTER.search(name) else ""


def towers_words(there: Collection[str], chosen: Collection[str], sizes: Mapping[str, int]) -> str:
    """Return what is told of the towers of a model, one sentence.

    Args:
        there: those that its config.json has beside the language model.
        chosen: those that are quantized and adapted.
        sizes: how many weights each has; empty where that is not known.
    """
    total = sum(sizes.values())
    others = [name for name in ("vision", "audio", "projector") if name in {*there, *sizes}]
    left = [name for name in others if name not in chosen]
    shares = [
        f"{name} ({sizes[name] / total:.1%} of the weights)" if name in sizes else name
        for name in left
    ]
    done = f"quantized and adapted: {', '.join(chosen)}"
    return f"towers: {done}; as they are stay {', '.join(shares)}" if left else f"towers: {done}"
