"""What sees pictures or hears beside a language model: its sizes, as config.json has them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .adapters import Layer

_MERGES = "spatial_merge_size"
"""Of towers that see pictures of any size: so many patches in each direction are one token."""


@dataclass(frozen=True)
class Tower:
    """A stack of equal blocks of attention and an MLP.

    Attributes:
        hidden: size of its hidden states.
        inside: size inside the MLP.
        blocks: how many.
        gated: whether the MLP has a gate; norms are root mean squares then.
        slow_gelu: whether the MLP's function is one that keeps what it makes on the way.
        chunks: whether it sees pictures of any size, one by one, and turns queries and keys.
        patches: what an example sends through it, at most: parts of a picture.
    """

    hidden: int
    inside: int
    blocks: int
    gated: bool = False
    slow_gelu: bool = False
    chunks: bool = False
    patches: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any], length: int, max_pixels: int | None) -> Tower | None:
        """Return what sees pictures of a model with this config.json, where each example has one;
        None where there is none, or config.json does not say what a picture becomes.

        Args:
            length: tokens of an example: those that stand for its picture are among them.
            max_pixels: of a picture; None where only the length says how large it may be.
        """
        part = _part(config, "vision_config")
        if (found := _tower(part)) is None:
            return None
        numbers = _numbers(part)
        patch, side, merged = (numbers.get(n, 0) for n in ("patch_size", "image_size", _MERGES))
        if not patch or not (side or merged):
            return None
        patches = length * merged**2 if merged else (side // patch) ** 2
        if merged and max_pixels is not None:
            patches = min(patches, max_pixels // patch**2)
        return replace(found, patches=patches)

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(in_features, out_features) of the linear layers of a block."""
        into = (self.hidden, self.inside)
        mlp = (*((into,) if self.gated else ()), into, into[::-1])
        return ((self.hidden, 3 * self.hidden), (self.hidden, self.hidden), *mlp)

    @property
    def adapted(self) -> list[Layer]:
        """All of them, as adapters see them."""
        sizes = enumerate(self.linears)
        return [Layer(f"tower.{n}", i, o, blocks=self.blocks) for n, (i, o) in sizes]

    @property
    def weights(self) -> int:
        """How many weights its blocks have."""
        return self.blocks * sum(i * o for i, o in self.linears)

    def kept_bytes(self, examples: int, dtype_bytes: int) -> int:
        """Return what it keeps for its backward where it is adapted: the inputs of norms and linear
        layers, queries, keys and values, and what is inside the MLP. Nothing of it is recomputed.
        """
        h, i = self.hidden, self.inside
        numbers = 8 * h + (2 + 2 * self.gated + self.slow_gelu) * i
        if self.chunks:  # queries and keys as they were; attention's outputs, picture by picture
            numbers += 3 * h
        if self.gated and dtype_bytes == 2:  # norms keep a float32 copy
            numbers += 2 * h
        return examples * self.patches * self.blocks * numbers * dtype_bytes


def tower_linears(config: Mapping[str, Any], towers: Collection[str]) -> Counter[tuple[int, int]]:
    """Return about what linear layers the blocks of these `towers` have: (in_features,
    out_features) -> how many."""
    found: Counter[tuple[int, int]] = Counter()
    for name in towers:
        if (tower := _tower(_part(config, f"{name}_config"))) is not None:
            for size in tower.linears:
                found[size] += tower.blocks
    return found


def tower_weights(config: Mapping[str, Any]) -> int:
    """Return about how many weights the towers beside the language model have."""
    towers = (_tower(_part(config, name)) for name in ("vision_config", "audio_config"))
    return sum(tower.weights for tower in towers if tower is not None)


def _part(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = config.get(name)
    return part if isinstance(part, Mapping) else {}


def _tower(part: Mapping[str, Any]) -> Tower | None:
    numbers, function = _numbers(part), part.get("hidden_act")
    hidden = numbers.get("embed_dim") or numbers.get("hidden_size") or 0
    blocks = numbers.get("depth") or numbers.get("num_hidden_layers") or 0
    inside = numbers.get("intermediate_size") or hidden * numbers.get("mlp_ratio", 4)
    if not hidden or not blocks:
        return None
    gated, slow = function in ("silu", "swish"), function == "quick_gelu"
    return Tower(hidden, inside, blocks, gated, slow, chunks=_MERGES in numbers)


def _numbers(part: Mapping[str, Any]) -> dict[str, int]:
    return {k: v for k, v in part.items() if isinstance(v, int) and not isinstance(v, bool)}
