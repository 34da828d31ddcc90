"""The quantized model that a user of transformers and bitsandbytes has, to compare with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def transformers_nf4(path: Path, device: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Load a checkpoint in nf4 with double quantization, as QLoRA does it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    return AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        device_map={"": device},
        trust_remote_code=False,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
    )


def quantized_here(model: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Turn a dense model on its device into what `transformers_nf4` loads, without files: each
    linear layer but the head is bitsandbytes' own."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from torch import nn

    head = model.get_output_embeddings()
    layers = [
        (n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head
    ]
    for name, dense in layers:
        with torch.device("meta"):
            layer = Linear4bit(
                *(dense.in_features, dense.out_features),
                bias=False,
                compute_dtype=dtype,
                compress_statistics=True,
                quant_type="nf4",
            )
        options = {"compress_statistics": True, "quant_type": "nf4", "module": layer}
        weight = Params4bit(dense.weight.data, requires_grad=False, **options)
        layer.weight = weight.to(dense.weight.device)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer)
    model.is_loaded_in_4bit = True
    return model.requires_grad_(False)
