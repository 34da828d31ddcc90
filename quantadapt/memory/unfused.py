"""What layers keep where no kernel does several operations at once: scores of attention,
activations, dropout; as a config.json tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple


class Activation(NamedTuple):
    """What an activation takes of memory, for each number that comes into it.

    Attributes:
        numbers: how many it keeps beside what comes in and what goes out.
        bytes: what it keeps beside those.
        gradients: with how many numbers its backward works, at most, where no gate's are more.
    """

    numbers: int = 0
    bytes: int = 0
    gradients: int = 1


USUAL = Activation()
"""In one operation, as SiLU and GELU are."""
_ACTIVATIONS = {
    "gelu_10": Activation(1, gradients=2),
    "gelu_accurate": Activation(3, gradients=2),
    "gelu_fast": Activation(6, gradients=2),
    "gelu_new": Activation(3, gradients=2),
    "gelu_python": Activation(2, gradients=4),
    "gelu_python_tanh": Activation(3, gradients=2),
    "quick_gelu": Activation(1, gradients=2),
    "relu": Activation(gradients=2),
    "relu2": Activation(gradients=3),
    "xielu": Activation(2, 1, gradients=4),  # its package's kernel keeps less
}
"""Those that transformers composes of several operations."""
_DROPOUTS = ("hidden_dropout", "resid_pdrop", "residual_dropout")
"""What configs call the dropout of what attention and the MLP return."""


def activation(config: Mapping[str, Any]) -> Activation:
    """Return what the activation of an MLP takes."""
    name = config.get("hidden_act") or config.get("hidden_activation")
    return _ACTIVATIONS.get(str(name), USUAL)


def dropout_masks(config: Mapping[str, Any], hidden: int) -> int:
    """Return how many bytes per token the masks of a layer's own dropout are, on CUDA."""
    return 2 * hidden if any(config.get(name) for name in _DROPOUTS) else 0


@cache
def _is_fused(kind: str) -> bool:
    """Say whether the transformers that is here gives a model of that type to PyTorch's attention
    all the same, as older ones do with Gemma 2, whose scores they do not cap then."""
    found = find_spec("transformers")
    if found is None or found.origin is None:
        return False
    file = Path(found.origin).parent / "models" / kind / f"modeling_{kind}.py"
    try:
        return "_supports_sdpa = True" in file.read_text(encoding="utf-8")
    except OSError:
        return False


@dataclass(frozen=True)
class Scores:
    """Attention that makes the scores of all pairs of tokens, one operation after the other.

    Attributes:
        heads: of queries.
        repeated: numbers per token that keys and values are more when each head has its own.
    """

    heads: int
    repeated: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Scores | None:
        """Read the contents of a config.json; None where attention is fused. PyTorch's is not where
        scores are capped, and transformers takes its own then."""
        if config.get("attn_logit_softcapping") is None or _is_fused(str(config.get("model_type"))):
            return None
        heads, head = int(config["num_attention_heads"]), int(config["head_dim"])
        keys = int(config.get("num_key_value_heads") or heads)
        return cls(heads, 2 * (heads - keys) * head)

    def kept(self, length: int, half: bool) -> int:
        """Return how many numbers per token of rows of `length` a layer keeps: the tanh of scores,
        and probabilities, in 16 bits in float32 beside."""
        return self.heads * length * (4 if half else 2) + self.repeated

    def backward(self, length: int, half: bool) -> int:
        """Return how many the backward works with beside them, when those of the product with
        values are gone: the gradients of probabilities and of scores, in float32."""
        return self.heads * length * (3 if half else 2)

    def forward(self, length: int, half: bool) -> int:
        """Return how many a forward pass works with that keeps none: scores, and probabilities in
        float32."""
        return self.heads * length * (3 if half else 2)

    @staticmethod
    def masks(length: int) -> int:
        """Return how many numbers per token masks are: of all, and of a sliding window."""
        return 2 * length
