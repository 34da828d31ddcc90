"""Which models can be written as GGUF without llama.cpp's converter, and how. Pure.

A family is here where its layout in llama.cpp is known and tested; others take the converter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

_ENDS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_BLOCKS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NORMS_AROUND = {
    **_IN_BLOCKS,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


@dataclass(frozen=True)
class Family:
    """How models of one type are laid out in GGUF.

    Attributes:
        architecture: llama.cpp's name of it.
        read_as: the type that transformers reads its files as; empty: its own.
        rotates_pairs: its rotary embedding turns neighbours (2 i, 2 i + 1), where transformers
            turns halves (i, i + d / 2): rows of query and key are reordered.
        parts: llama.cpp's names of the parts of a block.
        activation: of its MLP.
        tied: its head is its embedding, whatever a file says.
        norms_add_one: norms multiply by 1 + weight, and a file has the sum.
        full_attention_every: of so many layers the last sees all tokens, the others a window; 0:
            all do.
    """

    architecture: str
    read_as: str = ""
    rotates_pairs: bool = False
    parts: Mapping[str, str] = field(default_factory=lambda: _IN_BLOCKS)
    activation: str = "silu"
    tied: bool = False
    norms_add_one: bool = False
    full_attention_every: int = 0


def _gemma(architecture: str, full_attention_every: int) -> Family:
    return Family(
        architecture,
        parts=_NORMS_AROUND,
        activation="gelu_pytorch_tanh",
        tied=True,
        norms_add_one=True,
        full_attention_every=full_attention_every,
    )


FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", rotates_pairs=True),
    "mistral": Family("llama", read_as="llama", rotates_pairs=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma2": _gemma("gemma2", 2),
    "gemma3_text": _gemma("gemma3", 6),
}
"""By `model_type`."""

_BLOCKS = "model.layers."
_ROPES = (None, "default", "linear", "llama3")


def gguf_name(family: Family, name: str) -> str | None:
    """Return llama.cpp's name of a tensor; None where it has no place for it."""
    if name in _ENDS and not (family.tied and name == "lm_head.weight"):
        return _ENDS[name]
    number, _, rest = name.removeprefix(_BLOCKS).partition(".")
    part, _, kind = rest.rpartition(".")
    if not name.startswith(_BLOCKS) or not number.isdecimal() or part not in family.parts:
        return None
    return f"blk.{number}.{family.parts[part]}.{kind}" if kind in ("weight", "bias") else None


def rotated_heads(family: Family, name: str, config: Mapping[str, Any]) -> int | None:
    """Return how many heads the rows of a tensor make whose rows are reordered; None of others."""
    if not family.rotates_pairs:
        return None
    heads = int(config["num_attention_heads"])
    if ".self_attn.q_proj." in name:
        return heads
    return int(config.get("num_key_value_heads") or heads) if ".self_attn.k_proj." in name else None


def head_size(config: Mapping[str, Any]) -> int:
    """Return the size of a head."""
    found = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(found)


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary embedding that a config tells, whichever version wrote it; where layers
    with a window have another one, that of those that see all."""
    found = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    found = dict(found.get("full_attention") or found)
    if config.get("rope_theta") and not found.get("rope_theta"):
        found["rope_theta"] = config["rope_theta"]
    return {"rope_type": found.pop("type", None), **found}


def unknown_in(config: Mapping[str, Any]) -> list[str]:
    """Return what of a model is not known to be written rightly; empty where all is."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        return [f"models of type {kind!r} are not among {', '.join(FAMILIES)}"]
    family = FAMILIES[kind]
    found, rope = [], rope_of(config)
    if rope["rope_type"] not in _ROPES:
        found.append(f"its rotary embedding is scaled as {rope['rope_type']!r}")
    activation = config.get("hidden_activation") or config.get("hidden_act") or family.activation
    if activation != family.activation:
        found.append(f"its activation is {activation!r}")
    if config.get("use_sliding_window"):
        found.append("its attention looks through a sliding window")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        found.append("its rotary embedding turns a part of each head")
    if family.tied and not config.get("tie_word_embeddings", True):
        found.append("its head is another tensor than its embedding")
    return [*found, *_unknown_of_windows(family, config)] if family.full_attention_every else found


_WINDOW_BASE = 10000.0
"""Of the rotary embedding in layers with a window: llama.cpp takes no other."""
_LARGEST = {"gemma2": 46, "gemma3_text": 62}
"""Layers of the models whose attention llama.cpp scales by hidden_size / heads, by their number."""


def _unknown_of_windows(family: Family, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what llama.cpp would compute otherwise: it knows these models by their numbers."""
    count, every = int(config["num_hidden_layers"]), family.full_attention_every
    kinds = ["sliding_attention"] * (every - 1) + ["full_attention"]
    usual = [kinds[i % every] for i in range(count)]
    pattern = config.get("sliding_window_pattern") or every
    if list(config.get("layer_types") or usual) != usual or pattern != every:
        yield f"other than every {every}th layer sees all tokens"
    local = dict(config.get("rope_parameters") or {}).get("sliding_attention") or {}
    base = local.get("rope_theta") or config.get("rope_local_base_freq") or _WINDOW_BASE
    if base != _WINDOW_BASE or local.get("rope_type", "default") != "default":
        yield "the rotary embedding of its layers with a window is not the usual one"
    largest = _LARGEST[config["model_type"]] == count
    heads, size = int(config["num_attention_heads"]), head_size(config)
    scale = int(config["hidden_size"]) // heads if largest else size
    if config.get("query_pre_attn_scalar", scale) != scale:
        yield f"its attention is scaled by {config['query_pre_attn_scalar']}, not by {scale}"
    caps = config.get("attn_logit_softcapping"), config.get("final_logit_softcapping")
    if (None in caps) if family.architecture == "gemma2" else caps[0] is not None:
        yield "its scores are capped otherwise"
    if config.get("use_bidirectional_attention"):
        yield "its attention looks ahead"


def context_length(config: Mapping[str, Any]) -> int:
    """Return how many tokens it takes: no more than its window, which llama.cpp does not know."""
    longest = int(config["max_position_embeddings"])
    window = config.get("sliding_window")
    slides = config.get("model_type") == "mistral" and isinstance(window, int)
    return min(longest, int(window)) if slides and window else longest  # type: ignore[arg-type]


def metadata(family: Family, config: Mapping[str, Any]) -> Iterator[tuple[str, int | float | str]]:
    """Yield what llama.cpp has to know of a model: key without the architecture, and value. Counts
    are ints, everything else a float or a string."""
    rope, size = rope_of(config), head_size(config)
    heads = int(config["num_attention_heads"])
    yield "vocab_size", int(config["vocab_size"])
    yield "context_length", context_length(config)
    yield "embedding_length", int(config["hidden_size"])
    yield "block_count", int(config["num_hidden_layers"])
    yield "feed_forward_length", int(config["intermediate_size"])
    yield "attention.head_count", heads
    yield "attention.head_count_kv", int(config.get("num_key_value_heads") or heads)
    yield "attention.layer_norm_rms_epsilon", float(config["rms_norm_eps"])
    yield "attention.key_length", size
    yield "attention.value_length", size
    yield "rope.dimension_count", size
    yield "rope.freq_base", float(rope.get("rope_theta") or 10000.0)
    if rope["rope_type"] == "linear":
        yield "rope.scaling.type", "linear"
        yield "rope.scaling.factor", float(rope["factor"])
    if family.full_attention_every:
        yield "attention.sliding_window", int(config["sliding_window"])
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(key) is not None:
            yield key, float(config[key])


def rope_factors(config: Mapping[str, Any]) -> list[float] | None:
    """Return by what each frequency of the rotary embedding is divided, where a model scales them
    as Llama 3.1 does; None elsewhere."""
    rope = rope_of(config)
    if rope["rope_type"] != "llama3":
        return None
    factor, before = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    size, theta = head_size(config), float(rope.get("rope_theta") or 10000.0)
    found = []
    for i in range(0, size, 2):
        wavelength = 2 * math.pi * theta ** (i / size)
        turns = before / wavelength
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        found.append(1 / ((1 - smooth) / factor + smooth))
    return found


_ONLY_PEFT = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices")
"""Options of LoRA that llama.cpp knows nothing of."""


def adapter_problems(options: Mapping[str, Any]) -> list[str]:
    """Return why an adapter with these options of LoRA cannot be written; empty if it can."""
    found = [f"llama.cpp has no {name}" for name in _ONLY_PEFT if options.get(name)]
    if options.get("target_parameters"):
        found.append("llama.cpp has no LoRA on parameters such as experts")
    start = options.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(("pissa", "olora", "loftq", "corda")):
        found.append(f"{start} has changed the base, and llama.cpp would take the one before")
    return found
