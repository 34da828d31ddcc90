"""How much of a model is quantized: told where it is little, so that nobody counts on less memory
than a mixture of experts takes, whose experts stay dense."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from ..inputs.weights import file_in, read_header

ENOUGH = 0.8
"""Below this share of the weights a user is told."""
_DENSE = re.compile(r"\.(experts|gate|router)\.")
"""What mixtures of experts call what is no linear layer in them."""
BEGINNING = "only a part of the weights is quantized"


def mostly_dense(quantized: int, dense: Mapping[str, int]) -> str | None:
    """Return what to tell of a model with so many quantized weights, or None where most are.

    Args:
        quantized: how many weights are quantized.
        dense: how many are not, by what holds them; without embeddings and what was left out.
    """
    total = quantized + sum(dense.values())
    if not total or quantized / total >= ENOUGH:
        return None
    most = sorted((name for name in dense if dense[name]), key=lambda name: -dense[name])[:3]
    return (
        f"{BEGINNING}: {quantized / total:.0%}, embeddings and head not counted; these stay"
        f" dense, and take memory as such: {', '.join(most)}"
    )


def dense_experts(folder: Path, vocabulary: int | None) -> str | None:
    """Return what to tell of a checkpoint whose experts stay dense: they are no linear layers.

    Args:
        folder: where the weights lie; their headers have been checked.
        vocabulary: how many tokens the model has, by which embedding and head are known.
    """
    counts: Counter[bool] = Counter()
    for file in folder.glob("*.safetensors"):
        for name, tensor in read_header(file_in(folder, file.name)).items():
            shape = tensor["shape"]
            if len(shape) > 1 and vocabulary not in shape:
                counts[bool(_DENSE.search(name))] += math.prod(shape)
    return mostly_dense(counts[False], {"experts": counts[True]}) if counts[True] else None
