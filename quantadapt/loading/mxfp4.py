"""Checkpoints whose experts are stored in MXFP4, as gpt-oss was released. A backend that keeps them
packed finds their tensors by the names that a stack's have; for all others they are dequantized
while they are read, each stack by itself."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from ..model.experts import Stack

METHOD = "mxfp4"
PARTS = {"blocks": "weight_packed", "scales": "weight_scale"}
"""How the tensors of a stack's parameter end in the files, and what a packed layer calls them."""


def is_mxfp4(config: Any) -> bool:
    """Say whether a checkpoint with this config of transformers holds such experts."""
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else None
    return bool(method == METHOD)


def names_of(stack: Stack) -> dict[str, str]:
    """Return what the tensors in the files become that hold a stack: name -> name."""
    return {f"{stack.name}_{ending}": f"{stack.module}.{part}" for ending, part in PARTS.items()}


def dequantizing() -> Any:
    """Return what has transformers itself dequantize all of them."""
    from transformers import Mxfp4Config

    return Mxfp4Config(dequantize=True)


def conversions() -> list[Any]:
    """Return transformers' conversions from the tensors in the files to the model's parameters."""
    from transformers.core_model_loading import WeightConverter

    return [
        WeightConverter(
            source_patterns=[f"{name}_blocks", f"{name}_scales"],
            target_patterns=name,
            operations=[_dequantize_class()()],
        )
        for name in ("gate_up_proj", "down_proj")
    ]


@cache
def _dequantize_class() -> Any:
    from transformers.core_model_loading import ConversionOps
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    class Dequantize(ConversionOps):  # type: ignore[misc]
        """Makes a parameter of its blocks and scales."""

        def convert(
            self, input_dict: dict[str, Any], full_layer_name: str = "", model: Any = None, **_: Any
        ) -> dict[str, Any]:
            parts = {}
            for key, value in input_dict.items():
                tensor = value[0] if isinstance(value, list) else value
                # transformers casts what is to be quantized; bytes are exact in any float.
                parts[key.rpartition("_")[2]] = tensor.to(torch.uint8)
            dtype = model.get_parameter(full_layer_name).dtype
            made = convert_moe_packed_tensors(parts["blocks"], parts["scales"], dtype=dtype)
            return {full_layer_name: made.contiguous()}

    return Dequantize
