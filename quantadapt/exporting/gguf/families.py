"""Which models can be written as GGUF without llama.cpp's converter, and how. Pure.

A family is here where its layout in llama.cpp is known and tested; others take the converter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """How models of one type are laid out in GGUF.

    Attributes:
        architecture: llama.cpp's name of it.
        rotates_pairs: its rotary embedding turns neighbours (2 i, 2 i + 1), where transformers
            turns halves (i, i + d / 2): rows of query and key are reordered.
    """

    architecture: str
    rotates_pairs: bool = False


FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", rotates_pairs=True),
    "mistral": Family("llama", rotates_pairs=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
}
"""By `model_type`."""

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
_BLOCKS = "model.layers."
_ROPES = (None, "default", "linear", "llama3")


def gguf_name(name: str) -> str | None:
    """Return llama.cpp's name of a tensor; None where it has no place for it."""
    if name in _ENDS:
        return _ENDS[name]
    number, _, rest = name.removeprefix(_BLOCKS).partition(".")
    part, _, kind = rest.rpartition(".")
    if not name.startswith(_BLOCKS) or not number.isdecimal() or part not in _IN_BLOCKS:
        return None
    return f"blk.{number}.{_IN_BLOCKS[part]}.{kind}" if kind in ("weight", "bias") else None


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
    """Return the rotary embedding that a config tells, whichever version wrote it."""
    found = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    if config.get("rope_theta") and not found.get("rope_theta"):
        found["rope_theta"] = config["rope_theta"]
    return {"rope_type": found.pop("type", None), **found}


def unknown_in(config: Mapping[str, Any]) -> list[str]:
    """Return what of a model is not known to be written rightly; empty where all is."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        return [f"models of type {kind!r} are not among {', '.join(FAMILIES)}"]
    found, rope = [], rope_of(config)
    if rope["rope_type"] not in _ROPES:
        found.append(f"its rotary embedding is scaled as {rope['rope_type']!r}")
    if config.get("hidden_act", "silu") != "silu":
        found.append(f"its activation is {config['hidden_act']!r}")
    if config.get("use_sliding_window"):
        found.append("its attention looks through a sliding window")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        found.append("its rotary embedding turns a part of each head")
    return found


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
