"""The sizes of a decoder, read from its config.json: what memory depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_PLAIN_MLP = ("apertus", "arcee", "gpt_neox", "nanochat", "phi", "starcoder2")
"""Decoders whose MLP is two layers without a gate."""

SCALED_LOGITS = (
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
    "logits_scaling",
    "logits_mup_width_multiplier",
    "logits_soft_cap",
    "output_logit_soft_cap",
)
"""What configs call it that models change their logits in a way of their own."""


@dataclass(frozen=True)
class Shape:
    """A decoder of equal layers.

    Attributes:
        hidden: size of the hidden states.
        intermediate: size inside the MLP.
        layers: how many decoder layers.
        queries, keys: size of all query heads, and of all key heads.
        vocab: rows of the embedding.
        tied: whether the head is the embedding.
        gated: whether the MLP has a gate, as SwiGLU does.
        scaled: whether logits are more than the head's output, so that they are made all at once.
    """

    hidden: int
    intermediate: int
    layers: int
    queries: int
    keys: int
    vocab: int
    tied: bool
    gated: bool = True
    scaled: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape | None:
        """Read the contents of a config.json; None for architectures whose sizes mean something
        else (experts, latent or linear attention, encoders, several modalities)."""
        plain = config.get("model_type") in _PLAIN_MLP
        known = plain or "rms_norm_eps" in config
        other = config.get("is_encoder_decoder") or any(
            "expert" in key or key.startswith(("kv_lora_", "linear_")) for key in config
        )
        if not known or other or "text_config" in config or "vision_config" in config:
            return None
        try:
            hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
            head = int(config.get("head_dim") or hidden // heads)
            return cls(
                hidden=hidden,
                intermediate=int(config["intermediate_size"]),
                layers=int(config["num_hidden_layers"]),
                queries=heads * head,
                keys=int(config.get("num_key_value_heads") or heads) * head,
                vocab=int(config["vocab_size"]),
                tied=bool(config.get("tie_word_embeddings", config["model_type"] in _TIED)),
                gated=not plain,
                scaled=any(config.get(name) is not None for name in SCALED_LOGITS),
            )
        except (KeyError, TypeError, ValueError, ZeroDivisionError):
            return None

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one decoder layer, (in_features, out_features) under Llama's
        names. Models that fuse some of them have as many weights."""
        h, i = self.hidden, self.intermediate
        named = {
            "q_proj": (h, self.queries),
            "k_proj": (h, self.keys),
            "v_proj": (h, self.keys),
            "o_proj": (self.queries, h),
            "gate_proj": (h, i),
            "up_proj": (h, i),
            "down_proj": (i, h),
        }
        if not self.gated:
            del named["gate_proj"]
        return named

    def kept(self, fused_kernels: bool, half: bool) -> int:
        """Return how many numbers per token one layer keeps for its backward: the inputs of both
        norms and of all linear layers, queries, keys and values, and what is inside the MLP.

        Args:
            fused_kernels: whether norms, rotary positions and gate are Liger's.
            half: whether it computes in 16 bits; norms without Liger then keep a float32 copy.
        """
        h, i = self.hidden, self.intermediate
        numbers = 4 * h + 2 * self.queries + 2 * self.keys + (3 if self.gated else 2) * i
        if not fused_kernels:
            numbers += (i if self.gated else 0) + (2 * h if half else 0)
        return numbers


_TIED = ("gemma", "gemma2", "gemma3_text", "cohere", "cohere2")
"""Models whose config says nothing where the head is the embedding."""
