"""How large adapters are: what each PEFT method trains, and what it holds beside that.

From the sizes of the layers and the method's options alone, as PEFT 0.21 makes its tensors, all in
float32 whatever the model computes in. A method that is not here counts as LoRA of its rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Layer(NamedTuple):
    """Equal linear layers that are adapted, one in each of so many `blocks`; a stack of experts is
    one tall layer: `outputs` are those of all experts."""

    name: str
    inputs: int
    outputs: int
    experts: int = 1
    blocks: int = 1


class Size(NamedTuple):
    """How many numbers are trained, and how many bytes are held beside them."""

    trained: int = 0
    fixed: int = 0


class _Values(dict[str, Any]):
    """Options by name; 0 where the installed PEFT has none of that name, or it is None."""

    def __missing__(self, name: str) -> int:
        return 0

    def of(self, layer: str) -> _Values:
        """Return them with the rank that `rank_pattern` has for a layer of this name."""
        patterns = self["rank_pattern"] or {}
        named = (r for key, r in patterns.items() if re.match(rf"(.*\.)?({key})$", layer))
        return _Values(self | {"r": next(named, self["r"])}) if patterns else self


@dataclass(frozen=True)
class Method:
    """A PEFT method, by PEFT's name of it, with its options and their defaults."""

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def factors(self) -> int:
        """The rank of A and B where passes make them, which then compute as LoRA's do (see
        `adapting.low_rank`); else 0."""
        name = {"VERA": "r", "ADALORA": "init_r"}.get(self.kind, "")
        return int(self.options.get(name) or 0)

    def rank(self, layer: str) -> int:
        """Return the rank `r` of a layer of that name."""
        return int(_Values(self.options).of(layer)["r"] or 0)

    def factor_bytes(self, layers: Sequence[Layer], dtype_bytes: int) -> int:
        """Return what passes keep of them, as they are multiplied with: in float32 AdaLoRA's B is
        what is trained."""
        trained_b = self.kind == "ADALORA" and dtype_bytes == 4
        sides = sum(x.inputs + (0 if trained_b else x.outputs) for x in layers)
        return self.factors * dtype_bytes * sides

    @property
    def scales(self) -> bool:
        """Whether its layers keep what they scale, and no other input (see `adapting.fused_ia3`)"""
        return self.kind == "IA3"

    def scaled_input(self, layer: str) -> bool:
        """Say whether a layer of that name, of a method that `scales`, scales its input."""
        return _is_fed(self.options, layer)

    @property
    def importances(self) -> int:
        """The bytes of each trained weight that AdaLoRA has from the first step on to tell which
        directions go: three numbers in float32."""
        given = self.options.get
        prunes = int(given("init_r") or 0) > int(given("target_r") or 0)
        return 12 if self.kind == "ADALORA" and prunes else 0

    @property
    def early_gradients(self) -> bool:
        """Whether all gradients are there when backward begins: AdaLoRA's loss on its factors has
        them, where that counts."""
        return self.kind == "ADALORA" and self.options.get("orth_reg_weight") != 0

    def size(self, layers: Sequence[Layer], dtype_bytes: int) -> Size:
        """Return what it takes on `layers` of a model that computes in so many bytes a number."""
        q = _Values({name: v for name, v in self.options.items() if v is not None})
        q["dtype_bytes"] = dtype_bytes
        of_layer = _OF_LAYER.get(self.kind, _lora)
        each = [(layer.blocks, *of_layer(q.of(layer.name), layer)) for layer in layers]
        trained, fixed = (sum(one[0] * one[part] for one in each) for part in (1, 2))
        if self.kind in _SHARED and layers:
            more = _SHARED[self.kind](q, layers)
            trained, fixed = trained + more.trained, fixed + more.fixed
        return Size(trained, fixed)


# --- in each layer -------------------------------------------------------------------------------
# In formulas q are the options, and i and o the inputs and outputs of a layer.


def _lora(q: _Values, layer: Layer) -> Size:
    inputs, outputs = layer.inputs * layer.experts, layer.outputs
    vectors = outputs * (bool(q["use_dora"]) + bool(q["lora_bias"]))
    return Size(max(q["r"], 1) * (inputs + outputs) + vectors)


def _low_rank(q: _Values, layer: Layer) -> int:
    return int(q["r"] * (layer.inputs + layer.outputs))


def _adamss(q: _Values, layer: Layer) -> Size:
    _, i, o, *_ = layer
    rank, inside = q["subspace_rank"], min(q["r"], i, o)
    # a projection, and where the rows of each subspace are, twice
    return Size(rank * (q["num_subspaces"] * inside + o), 4 * inside * i + 16 * o)


def _boft(q: _Values, layer: Layer) -> Size:
    _, i, o, *_ = layer
    block = q["boft_block_size"] or i // max(q["boft_block_num"], 1)
    factors = max(q["boft_n_butterfly_factor"], 1)
    return Size(factors * i * block + o, 4 * factors * i * i)  # permutations, as matrices


def _frod(q: _Values, layer: Layer) -> Size:
    _, i, o, *_ = layer
    return Size(i + _sparse(q, i), o * i * q["dtype_bytes"])


def _sparse(q: _Values, inputs: int) -> int:
    return int(inputs * inputs * q["sparse_rate"])


def _lily(q: _Values, layer: Layer) -> Size:
    return Size(q["num_B"] * q["r"])  # the router


def _lokr(q: _Values, layer: Layer) -> Size:
    (small_o, large_o), (small_i, large_i) = (
        _factors(n, q["decompose_factor"] or -1) for n in (layer.outputs, layer.inputs)
    )
    rank, trained = q["r"], 0
    pairs = ((small_o, small_i, bool(q["decompose_both"])), (large_o, large_i, True))
    for o, i, splits in pairs:
        trained += rank * (o + i) if splits and rank < max(o, i) / 2 else o * i
    return Size(trained)


def _factors(number: int, wanted: int) -> tuple[int, int]:
    """Return two factors, the smaller one first: near each other, or near `wanted`."""
    if wanted > 0 and number % wanted == 0:
        return wanted, number // wanted
    most = number if wanted == -1 else wanted
    divisors = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0 and n <= most]
    return divisors[-1], number // divisors[-1]


def _oft(q: _Values, layer: Layer) -> Size:
    inputs = layer.inputs
    block = _divisor(inputs, q["oft_block_size"]) if q["oft_block_size"] else 0
    block = block or inputs // _divisor(inputs, max(q["r"], 1))
    turns = block * (block - 1) // 2
    return Size(turns * (1 if q["block_share"] else inputs // block), 16 * turns)


def _divisor(number: int, wanted: int) -> int:
    """Return the divisor of `number` that is nearest to `wanted`, the smaller one of two."""
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    return min(divisors, key=lambda n: (abs(n - wanted), n))


def _osf(q: _Values, layer: Layer) -> Size:
    _, i, o, *_ = layer
    least, kept = min(i, o), q["effective_rank"]
    high = int(kept * least) if 0 < kept < 1 else int(kept) or least // 2
    low = (least - high) * (i + o + 1)
    return Size(low, 4 * (low + high * max(i, o) * (i != o)))


def _psoft(q: _Values, layer: Layer) -> Size:
    rank = q["r"]
    half = rank * (rank - 1) // 2
    turns = half if q["psoft_orth"] else rank * rank
    vectors = rank * (bool(q["psoft_mag_a"]) + bool(q["psoft_mag_b"]))
    return Size(turns + vectors, 4 * _low_rank(q, layer) + (16 * half if q["psoft_orth"] else 0))


def _randlora(q: _Values, layer: Layer) -> Size:
    least = min(layer.inputs, layer.outputs)
    return Size(-(-least // q["r"]) * (q["r"] + least))


def _supertuning(q: _Values, layer: Layer) -> Size:
    entries = int(layer.inputs * layer.outputs * (1 - q["sparsity"]))
    return Size(entries + _low_rank(q, layer), 4 * entries)


def _tinylora(q: _Values, layer: Layer) -> Size:
    return Size(0, 4 * (_low_rank(q, layer) + q["u"] * q["r"] ** 2))


def _ia3(q: _Values, layer: Layer) -> Size:
    return Size(layer.inputs if _is_fed(q, layer.name) else layer.outputs)


def _is_fed(options: Mapping[str, Any], layer: str) -> bool:
    feeds = options.get("feedforward_modules") or ()
    names = [feeds] if isinstance(feeds, str) else [str(name) for name in feeds]
    return layer.rpartition(".")[2] in names


_ROAD = {"road_1": 1, "road_2": 2, "road_4": 4}

_OF_LAYER: dict[str, Callable[[_Values, Layer], Size]] = {
    "ADALORA": lambda q, x: Size(q["init_r"] * (x.inputs + x.outputs + 1), 4),
    "ADAMSS": _adamss,
    "BEFT": lambda q, x: Size(x.outputs),
    "BOFT": _boft,
    "C3A": lambda q, x: Size(x.inputs * x.outputs // max(q["block_size"], 1)),
    "DEFT": lambda q, x: Size(_low_rank(q, x)),
    "DELORA": lambda q, x: Size(_low_rank(q, x) + 1, 4 * x.inputs),
    "FOURIERFT": lambda q, x: Size(q["n_frequency"], 16 * q["n_frequency"]),
    "FROD": _frod,
    "GRALORA": lambda q, x: Size((q["r"] + q["hybrid_r"]) * (x.inputs + x.outputs)),
    "HIRA": lambda q, x: Size(_low_rank(q, x)),
    "HRA": lambda q, x: Size(q["r"] * x.inputs),
    "IA3": _ia3,
    "LILY": _lily,
    "LOHA": lambda q, x: Size(2 * _low_rank(q, x)),
    "LOKR": _lokr,
    "LORA": _lora,
    "MISS": lambda q, x: Size(q["r"] * (q["mini_r"] if q["init_weights"] == "mini" else x.outputs)),
    "OFT": _oft,
    "OSF": _osf,
    "PEANUT": lambda q, x: Size(2 * q["r"] * (x.outputs + q["depth"] * q["r"])),
    "PSOFT": _psoft,
    "PVERA": lambda q, x: Size(2 * q["r"] + x.outputs),
    "RANDLORA": _randlora,
    "ROAD": lambda q, x: Size(x.outputs * _ROAD.get(q["variant"], 1)),
    "SHIRA": lambda q, x: Size(_low_rank(q, x), 8 * _low_rank(q, x)),
    "SUPERTUNING": _supertuning,
    "TINYLORA": _tinylora,
    "UNILORA": lambda q, x: Size(0, 12 * _low_rank(q, x)),
    "VBLORA": lambda q, x: Size(_low_rank(q, x) * q["num_vectors"] // max(q["vector_length"], 1)),
    "VERA": lambda q, x: Size(q["r"] + x.outputs),
    "WAVEFT": lambda q, x: Size(q["n_frequency"], 16 * q["n_frequency"]),
}
"""What a method takes in one layer."""


# --- in all layers together ----------------------------------------------------------------------


def _largest(layers: Sequence[Layer]) -> tuple[int, int]:
    return max(x.inputs for x in layers), max(x.outputs for x in layers)


def _vera(q: _Values, layers: Sequence[Layer]) -> Size:
    inputs, outputs = _largest(layers)
    return Size(0, 4 * q["r"] * (inputs + outputs))


def _pvera(q: _Values, layers: Sequence[Layer]) -> Size:
    inputs, outputs = _largest(layers)
    return Size(0, 4 * q["r"] * (2 * inputs + outputs))


def _all_of_randlora(q: _Values, layers: Sequence[Layer]) -> Size:
    least, most = sorted(_largest(layers))
    return Size(0, 4 * q["r"] * (most * -(-least // q["r"]) + least))


def _all_of_frod(q: _Values, layers: Sequence[Layer]) -> Size:
    sizes = {layer.name: layer.inputs for layer in layers}.values()
    return Size(0, sum(i * i * q["dtype_bytes"] + 16 * (_sparse(q, i) + 1) for i in sizes))


def _all_of_lily(q: _Values, layers: Sequence[Layer]) -> Size:
    pairs = sum(-(-x.blocks // max(q["stride_A"], 1)) * x.inputs for x in layers)
    return Size(q["r"] * (pairs + q["num_B"] * sum(x.outputs for x in layers)))


def _all_of_tinylora(q: _Values, layers: Sequence[Layer]) -> Size:
    count = sum(layer.blocks for layer in layers)
    return Size(q["u"] * max(1, round(count * (1 - q["weight_tying"]))))


_SHARED: dict[str, Callable[[_Values, Sequence[Layer]], Size]] = {
    "FROD": _all_of_frod,
    "LILY": _all_of_lily,
    "PVERA": _pvera,
    "RANDLORA": _all_of_randlora,
    "TINYLORA": _all_of_tinylora,
    "UNILORA": lambda q, _: Size(q["theta_d_length"]),
    "VBLORA": lambda q, _: Size(q["num_vectors"] * q["vector_length"]),
    "VERA": _vera,
}
"""What a method has once for all layers."""
