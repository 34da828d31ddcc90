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
