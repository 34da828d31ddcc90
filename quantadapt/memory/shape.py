"""The sizes of a decoder, read from its config.json: what memory depends on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .experts import Experts
from .latent import Latent
from .unfused import USUAL, Activation, Scores, activation, dropout_masks

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
    "ngram",  # ProphetNet's are of other hidden states than the decoder's last
)
"""What configs call it that models change their logits in a way of their own."""
TRL_SCALES = frozenset(("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling"))
"""Of these, what TRL's loss knows."""
TRL_ROUTERS = ("gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
"""Models whose loss on routers is TRL's, which is Mixtral's."""
_NORMED_HEADS = (
    *("apertus", "exaone4", "gemma3_text", "nanochat", "olmo2", "olmo3", "olmoe"),
    *("qwen3", "qwen3_moe", "qwen3_vl_moe_text", "qwen3_vl_text"),
)
"""Models that norm queries and keys, and keep them as they were before."""
_NORMS_HEADS = ("use_qk_norm", "qk_layernorm")
"""What configs call it of those that may."""
_QKV = {"gpt_neox": "query_key_value", "phi3": "qkv_proj", "phi4_multimodal": "qkv_proj"}
"""What models call the one linear layer that makes queries, keys and values."""
_GATE_UP = dict.fromkeys(
    ("glm", "glm4", "glm4v_text", "glm_image_text", "glm_ocr_text", "phi3", "phi4_multimodal"),
    "gate_up_proj",
)
"""Likewise of gate and up."""
_HEAD_BY_HEAD = ("glm", "glm4", "glm4v_text", "glm_image_text", "glm_ocr_text", "gpt_neox", "phi")
"""Models that put together what of queries has its positions and what has none: they lie head by
head then, and so does what attention returns, of which the layer behind it wants a copy."""
_HEAD_BY_HEAD_WITHOUT_LIGER = ("phi3", "phi4_multimodal")
"""Those of which Liger does it in place."""
_SANDWICHED = ("gemma2", "gemma3_text", "glm4", "glm4v_text", "glm_image_text", "glm_ocr_text")
"""Models that norm what attention and the MLP get, and what they return."""
_ONE_NORM = ("phi",)
"""Models whose attention and MLP get the same, of one norm."""


@dataclass(frozen=True)
class Shape:
    """A decoder of equal layers; of a mixture of experts the layers that have experts.

    Attributes:
        hidden: size of the hidden states.
        intermediate: size inside the MLP.
        layers: how many decoder layers.
        queries, keys: size of all query heads, and of all key heads.
        vocab: rows of the embedding.
        tied: whether the head is the embedding.
        gated: whether the MLP has a gate, as SwiGLU does.
        scaled: whether logits are more than the head's output, so that they are made all at once.
        normed_heads: whether queries and keys are normed.
        qkv: what the linear layer is called that makes queries, keys and values; empty where each
            has its own.
        gate_up: likewise of gate and up.
        copied: when what attention returns is copied for the layer behind it: "always", "never", or
            "slow", where rotary positions are not Liger's.
        norms: the inputs of how many norms a layer keeps.
        inputs: how many different ones linear layers get from norms.
        squares: whether they are root mean squares.
        activation: what that of the MLP takes.
        dropouts: the masks of those in a layer, in bytes per token.
        scores: what attention keeps of them where no kernel fuses it.
        experts: what is in the place of the MLP, if it is experts.
        key_heads: how many heads of keys there are.
        latent: of attention that keeps latent states; `queries` and `keys` are then all heads'.
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
    normed_heads: bool = False
    qkv: str = ""
    gate_up: str = ""
    copied: str = "never"
    norms: int = 2
    inputs: int = 2
    squares: bool = True
    activation: Activation = USUAL
    dropouts: int = 0
    scores: Scores | None = None
    experts: Experts | None = None
    latent: Latent | None = None
    key_heads: int = 1

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape | None:
        """Read the contents of a config.json; None for architectures whose sizes mean something
        else (experts of a kind of their own, linear attention, encoders). Of a model with towers
        it is the language model's."""
        config = language_config(config)
        kind = config.get("model_type")
        plain = kind in _PLAIN_MLP
        if not is_decoder(config) or any(key.startswith("linear_") for key in config):
            return None
        try:
            experts, latent = Experts.of(config), Latent.of(config)
            hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
            head = int(config.get("head_dim") or hidden // heads)
            key_heads = int(config.get("num_key_value_heads") or heads)
            keys = key_heads * head
            return cls(
                hidden=hidden,
                intermediate=int(config["intermediate_size"]),
                layers=int(config["num_hidden_layers"]),
                queries=latent.queries if latent else heads * head,
                keys=latent.queries if latent else keys,
                vocab=int(config["vocab_size"]),
                tied=bool(config.get("tie_word_embeddings", config["model_type"] in _TIED)),
                gated=not plain,
                scaled=any(config.get(name) is not None for name in SCALED_LOGITS),
                normed_heads=kind in _NORMED_HEADS or any(map(config.get, _NORMS_HEADS)),
                qkv=_QKV.get(str(kind), ""),
                gate_up=_GATE_UP.get(str(kind), ""),
                copied=_copied(str(kind)),
                norms=_norms(config),
                inputs=1 if kind in _ONE_NORM else 2,
                squares="rms_norm_eps" in config,
                activation=activation(config),
                dropouts=dropout_masks(config, hidden),
                scores=Scores.of(config),
                experts=experts,
                latent=latent,
                key_heads=latent.heads if latent else key_heads,
            )
        except (KeyError, TypeError, ValueError, ZeroDivisionError):
            return None

    @property
    def plain_layers(self) -> int:
        """How many layers of a mixture of experts have an MLP all the same; its first, mostly."""
        return self.experts.plain_layers if self.experts else 0

    @property
    def of_plain_layers(self) -> Shape:
        """The sizes of those layers."""
        return replace(self, experts=None)

    @property
    def sandwiched(self) -> bool:
        """Whether what attention and the MLP return is normed, beside what they get."""
        return self.norms > 2

    def stacked(self, name: str) -> int:
        """Return how many experts' layers a layer of `linears` is."""
        experts = self.experts
        return experts.count if experts and name in experts.stacks(self.hidden) else 1

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one decoder layer, (in_features, out_features) under Llama's
        names, in the order of computation; what is one layer for several has the model's. A stack
        of experts is one tall layer: its outputs are those of all experts."""
        named = self._attention
        if self.experts is None and self.gate_up:
            both = {self.gate_up: (self.hidden, 2 * self.intermediate)}
            return named | both | {"down_proj": (self.intermediate, self.hidden)}
        if self.experts is None:
            return named | _mlp("", self.hidden, self.intermediate, self.gated)
        if self.experts.shared:
            named |= _mlp("shared_expert.", self.hidden, self.experts.shared)
        return named | self.experts.stacks(self.hidden)

    @property
    def numbers(self) -> int:
        """How many weights the linear layers of all decoder layers have, stacks of experts too."""
        plain = self.plain_layers
        kinds = [(self.layers - plain, self)] + ([(plain, self.of_plain_layers)] if plain else [])
        return sum(n * i * o for n, shape in kinds for i, o in shape.linears.values())

    @property
    def _attention(self) -> dict[str, tuple[int, int]]:
        if self.latent:
            return self.latent.linears(self.hidden)
        h = self.hidden
        sizes = {"q_proj": self.queries, "k_proj": self.keys, "v_proj": self.keys}
        if self.qkv:
            sizes = {self.qkv: self.queries + 2 * self.keys}
        return {**{name: (h, size) for name, size in sizes.items()}, "o_proj": (self.queries, h)}

    @property
    def mlp(self) -> int:
        """Size inside the MLP that all tokens go through: with experts, of the shared ones."""
        return self.experts.shared if self.experts else self.intermediate

    @property
    def head(self) -> int:
        """Size of an attention head."""
        return self.keys // self.key_heads

    def kept(self, fused_kernels: bool, half: bool) -> int:
        """Return how many numbers per token one layer keeps for its backward: the inputs of its
        norms and of all linear layers, queries, keys and values, and what is inside the MLP. Values
        that are a part of what one layer makes keep all of it. Not what experts keep.

        Args:
            fused_kernels: whether norms, rotary positions and gate are Liger's.
            half: whether it computes in 16 bits; norms without Liger then keep a float32 copy, if
                they are root mean squares.
        """
        h = self.hidden
        attention = self.latent.kept if self.latent else 2 * self.queries + 2 * self.keys
        numbers = (self.inputs + self.norms) * h + attention + self.kept_inside(fused_kernels)
        if self.normed_heads:
            numbers += self.queries + self.keys
        if self.qkv:
            numbers += self.queries + self.keys
        if self.copied == "always" or (self.copied == "slow" and not fused_kernels):
            numbers += self.queries
        if not fused_kernels and half and self.squares:
            numbers += self.norms * h + (self.queries + self.keys if self.normed_heads else 0)
        return numbers

    def kept_inside(self, fused_kernels: bool) -> int:
        """Return how many numbers of those per token are inside the MLP."""
        before_the_last = (2 if self.gated else 1) + (self.gated and not fused_kernels)
        beside = 0 if self.gated and fused_kernels else self.activation.numbers
        return (before_the_last + 1 + beside) * self.mlp

    def masks(self, fused_kernels: bool, tiled: bool) -> int:
        """Return how many bytes per token one layer keeps beside numbers: masks of its own dropout,
        and what is inside an MLP that keeps more than its input."""
        plain = not tiled and not (self.gated and fused_kernels)
        return self.dropouts + (self.mlp * self.activation.bytes if plain else 0)

    def attention_backward(self, groups: int) -> int:
        """Return how many numbers per token the backward of attention works with: the gradients of
        what it returns, and of queries, keys and values. And for one of `groups` of heads the
        gradient of queries in float32, as kernels add it up, and where heads share keys and values
        the gradients of all heads'."""
        work = 2 * self.queries + (2 * self.queries if self.keys < self.queries else 0)
        return 2 * self.queries + 2 * self.keys + work // groups


def _copied(kind: str) -> str:
    if kind in _HEAD_BY_HEAD:
        return "always"
    return "slow" if kind in _HEAD_BY_HEAD_WITHOUT_LIGER else "never"


def _norms(config: Mapping[str, Any]) -> int:
    """Return the inputs of how many norms a layer keeps: two norms may get the same."""
    if config.get("model_type") in _SANDWICHED:
        return 4
    one = config.get("use_parallel_residual") or config.get("model_type") in _ONE_NORM
    return 1 if one else 2


def is_decoder(config: Mapping[str, Any]) -> bool:
    """Say whether a config.json is that of a decoder whose blocks hold linear layers and norms."""
    usual = "rms_norm_eps" in config or config.get("model_type") in _PLAIN_MLP
    return usual and not config.get("is_encoder_decoder")


def head_groups(key_heads: int) -> int:
    """Return in how many groups of heads attention goes through a long row: at most 8, each of
    which has the keys of its queries."""
    return math.gcd(key_heads, 8)


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config.json of the language model alone. Whether its head is the embedding, the
    whole says."""
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        return config
    tied = {k: config[k] for k in ("tie_word_embeddings",) if k in config}
    return {**text, **tied}


def _mlp(prefix: str, hidden: int, inside: int, gated: bool = True) -> dict[str, tuple[int, int]]:
    gate = {f"{prefix}gate_proj": (hidden, inside)} if gated else {}
    rest = {f"{prefix}up_proj": (hidden, inside), f"{prefix}down_proj": (inside, hidden)}
    return gate | rest


_TIED = ("gemma", "gemma2", "gemma3_text", "cohere", "cohere2")
"""Models whose config says nothing where the head is the embedding."""
