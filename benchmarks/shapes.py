"""Llama shapes with random weights, and how fast training them could be at best."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PEAK_FLOPS = 790e12
"""What a bfloat16 matrix product reaches on an H100 or H200, FLOP per second."""


@dataclass(frozen=True)
class Shape:
    """A Llama, and the batch that it is trained on: `batch` rows of `length` tokens."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    batch: int = 4
    length: int = 2048

    def config(self) -> Any:
        """Return transformers' config of a Llama of this shape."""
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.length,
            rope_theta=500000.0,
        )

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.batch * self.length

    @property
    def linear_weights(self) -> int:
        """Those of the seven projections of all layers."""
        shared = self.hidden_size * self.num_key_value_heads // self.num_attention_heads
        attention = 2 * self.hidden_size * (self.hidden_size + shared)
        return self.num_hidden_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    def floor_seconds(self, recomputed: float) -> float:
        """Return the least time of a step, by its matrix products with frozen weights alone.

        2 FLOP a weight and token for forward, 2 for the gradient of its input, 2 more in the share
        of layers whose forward is `recomputed`, which that of the head never is.
        """
        head = self.hidden_size * self.vocab_size
        flops = (4 + 2 * recomputed) * self.linear_weights + 4 * head
        return self.tokens * flops / PEAK_FLOPS


SHAPES = {
    "demo": Shape(256, 768, 2, 4, 2, 2048, batch=2, length=64),
    "1b": Shape(2048, 8192, 16, 32, 8, 128256),
    "8b": Shape(4096, 14336, 32, 32, 8, 128256),
    "8b-8-layers": Shape(4096, 14336, 8, 32, 8, 128256),
    "70b": Shape(8192, 28672, 80, 64, 8, 128256),
}


def checkpoint(name: str, folder: Path) -> Path:
    """Write random bfloat16 weights of the shape `name`, once, and return their folder.

    The tokenizer beside them is the demo's: some libraries load no model without one.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from quantadapt import demo

    path, partial = folder / f"llama-{name}", folder / f"llama-{name}.partial"
    if path.exists():
        return path
    shutil.rmtree(partial, ignore_errors=True)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(SHAPES[name].config(), dtype=torch.bfloat16)
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(demo.MODEL_DIR).save_pretrained(partial)
    os.replace(partial, path)
    return path
