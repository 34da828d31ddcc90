"""The quantize stage."""

from __future__ import annotations

from .dense import nothing_quantized, skip_for
from .examples import UnusedOptionWarning
from .stage import quantize_plan, with_config
from .tokenizer import load_tokenizer

__all__ = [
    "UnusedOptionWarning",
    "load_tokenizer",
    "nothing_quantized",
    "quantize_plan",
    "skip_for",
    "with_config",
]
