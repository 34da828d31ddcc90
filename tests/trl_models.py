"""Stock models that TRL's trainers begin with where a test compares with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from quantadapt.testing.small_demo import small_model


def begun_as_ours(start: Mapping[str, torch.Tensor], begun: Path | None) -> tuple[Any, Any]:
    """Return a model with an adapter, and the reference that TRL is given.

    Args:
        start: what a new adapter begins with, by the names of its parameters.
        begun: an adapter that is there already; a model of its own is the reference then.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    def stock() -> Any:
        return AutoModelForCausalLM.from_pretrained(small_model(), dtype=torch.float32)

    if begun is not None:
        model = PeftModel.from_pretrained(stock(), str(begun), is_trainable=True)
        return model, PeftModel.from_pretrained(stock(), str(begun)).merge_and_unload()
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(stock(), lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(start[name])
    return model, None
