"""The quantize stage."""

from __future__ import annotations

from .stage import (
    UnusedOptionWarning,
    load_tokenizer,
    nothing_quantized,
    quantize_plan,
    skip_for,
    with_config,
)

__all__ = [
    "UnusedOptionWarning",
    "load_tokenizer",
    "nothing_quantized",
    "quantize_plan",
    "skip_for",
    "with_config",
]
