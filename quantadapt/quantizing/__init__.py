"""The quantize stage."""

from __future__ import annotations

from .stage import load_tokenizer, nothing_quantized, quantize_plan, skip_for, with_config

__all__ = ["load_tokenizer", "nothing_quantized", "quantize_plan", "skip_for", "with_config"]
