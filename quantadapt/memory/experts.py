"""The sizes of experts, as a config.json tells them, and what they keep and work with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

STACKS = ("experts.gate_up_proj", "experts.down_proj")
"""What the two stacks of a block are called here, whatever the model calls them."""
_FAMILIES = (
    *("deepseek_v2", "deepseek_v3", "glm4_moe", "gpt_oss", "granitemoe", "granitemoeshared"),
    *("mixtral", "olmoe", "qwen2_moe", "qwen3_moe"),
)
"""Mixtures of experts whose sizes mean what is said here."""
PART = 2**28
"""Where memory is short, so many bytes of a stack are dequantized at a time, whole experts."""
_ROUTING = 18
"""Bytes that a row keeps of its routing: its token, its place and its expert."""


@dataclass(frozen=True)
class Experts:
    """Experts in the place of an MLP, each of which has a gate.

    Attributes:
        count: how many there are in a layer.
        chosen: how many a token goes through.
        inside: size inside one of them.
        shared: size inside the experts that all tokens go through; 0 if there are none.
        plain_layers: how many layers have an MLP instead.
    """

    count: int
    chosen: int
    inside: int
    shared: int = 0
    plain_layers: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Experts | None:
        """Read the contents of a config.json; None where it speaks of no experts. Raises KeyError
        where it does, and they are none that are known here."""
        if not any("expert" in key for key in config):
            return None
        if config["model_type"] not in _FAMILIES:
            raise KeyError("experts")
        names = ("num_experts", "num_local_experts", "n_routed_experts")
        inside = int(config.get("moe_intermediate_size") or config["intermediate_size"])
        shared = (
            config.get("shared_expert_intermediate_size")
            or config.get("shared_intermediate_size")
            or inside * (config.get("n_shared_experts") or 0)
        )
        return cls(
            count=next(int(config[name]) for name in names if config.get(name)),
            chosen=int(config["num_experts_per_tok"]),
            inside=inside,
            shared=int(shared),
            plain_layers=_plain_layers(config),
        )

    def stacks(self, hidden: int) -> dict[str, tuple[int, int]]:
        """Return the tall layers, (in_features, out_features)."""
        first, second = STACKS
        return {
            first: (hidden, self.count * 2 * self.inside),
            second: (self.inside, self.count * hidden),
        }

    def kept_bytes(self, tokens: int) -> int:
        """Return what the router and the experts of a layer keep beside their input, which the
        norm before them keeps: probabilities in float32, and where the rows of each token are."""
        return tokens * (4 * self.count + (12 + _ROUTING) * self.chosen)

    def dense_numbers(self, tokens: int, hidden: int, *, adapted: bool) -> int:
        """Return how many numbers dense experts keep beside their input, which nobody else needs
        but shared ones: what is inside, and what they return; and where they are adapted their
        rows, and both weights with what an adapter adds to them."""
        inside, weights = hidden + 3 * self.inside, 0
        if adapted:
            inside += hidden + self.inside
            weights = sum(self._weights(hidden))
        return self._rows(tokens, inside) + weights - (0 if self.shared else tokens * hidden)

    def norms(self, hidden: int) -> int:
        """Return how many numbers the norms of DoRA are, those of both stacks."""
        return self.count * (2 * self.inside + hidden)

    def _rows(self, tokens: int, numbers: int) -> int:
        return tokens * self.chosen * numbers

    def _weights(self, hidden: int) -> tuple[int, int]:
        first, second = (i * o for i, o in self.stacks(hidden).values())
        return first, second

    def _there(self, tokens: int, hidden: int, in_parts: int) -> tuple[int, int]:
        """Return how many numbers of each weight are there at a time; of a part with what it makes,
        beside what all make."""
        first, second = self._weights(hidden)
        if not in_parts:
            return first, second
        sizes = ((first, 2 * self.inside), (second, hidden))
        both = [self._part(tokens, numbers, made, in_parts) for numbers, made in sizes]
        return both[0], both[1]

    def _part(self, tokens: int, numbers: int, made: int, size: int) -> int:
        each, rows = numbers // self.count, self._rows(tokens, 1)
        few = part_of(each, self.count, rows, made, size)
        return numbers if few is None else few * each + rows * made * few // self.count

    def forward_numbers(self, tokens: int, hidden: int, in_parts: int = 0) -> int:
        """Return how many numbers the forward pass works with: rows and one dequantized stack.

        Args:
            in_parts: the bytes of a number where stacks are dequantized in parts; else 0.
        """
        first, second = self._there(tokens, hidden, in_parts)
        return max(
            self._rows(tokens, hidden + 2 * self.inside) + first,
            self._rows(tokens, hidden + self.inside) + second,
        )

    def backward_numbers(
        self, tokens: int, hidden: int, in_parts: int = 0, *, dora: bool = False
    ) -> int:
        """Return how many numbers the backward pass works with, likewise: in the product that is
        made again, in the gradient of what is inside, or in that of the input. With DoRA the first
        product is there twice, and the second is made again."""
        first, second = self._there(tokens, hidden, in_parts)
        inside = (5 if dora else 3) * self.inside
        return max(
            self._rows(tokens, hidden + 2 * self.inside) + first,
            self._rows(tokens, 2 * hidden + inside) + second,
            self._rows(tokens, 3 * hidden + inside) if dora else 0,
        )


def part_of(each: int, count: int, rows: int, made: int, size: int) -> int | None:
    """Return how many experts of a stack are dequantized at a time where memory is short; None: all
    at once, as a part takes no less, with what it makes of its rows before that is in its place.

    Args:
        each, count: how many numbers an expert has, and how many experts there are.
        rows, made: how many rows go through all, and the numbers that each becomes.
        size: the bytes of a number.
    """
    few = min(experts_at_a_time(each * size), count)
    return few if few * each + rows * made * few // count < count * each else None


def experts_at_a_time(nbytes: int) -> int:
    """Return how many experts of a stack are dequantized at a time where memory is short.

    Args:
        nbytes: of one of them, dequantized.
    """
    return max(1, PART // nbytes)


def _plain_layers(config: Mapping[str, Any]) -> int:
    layers = int(config["num_hidden_layers"])
    if kinds := config.get("mlp_layer_types"):
        return sum(kind == "dense" for kind in kinds)
    if (first := config.get("first_k_dense_replace")) is not None:
        return min(int(first), layers)
    plain = set(config.get("mlp_only_layers") or ())
    step = int(config.get("decoder_sparse_step") or 1)
    return sum(layer in plain or (layer + 1) % step != 0 for layer in range(layers))
