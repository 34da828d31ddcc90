"""What a plan says of layers whose memory it does not know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import quantadapt as qa
from quantadapt import demo
from quantadapt.memory.other_layers import other_layers
from quantadapt.memory.shape import Shape

SIZES = {
    **{"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 4},
}
SIX = {"num_hidden_layers": 6, "layers_block_type": ["linear_attention", "hybrid"] * 3}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bamba": ("Mamba", {"mamba_n_heads": 4, "mamba_d_head": 32, "attn_layer_indices": [1]}),
    "falcon_h1": ("Mamba", {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32}),
    "zamba": ("Mamba", SIX),
    "zamba2": ("Mamba", SIX),
    "recurrent_gemma": ("recurrent", {}),
}
KNOWN = ("llama", "gemma2", "gemma3_text", "gpt_oss", "mixtral", "qwen3", "deepseek_v3", "exaone4")


def notes(config: Any, folder: Path) -> list[str]:
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo.MODEL_DIR).save_pretrained(folder)
    made = qa.plan(qa.Spec(model=str(folder), backend="bnb-nf4"), cards=[80])
    return [note for note in made.notes if "other blocks" in note]


@pytest.mark.parametrize("family", OTHERS)
def test_blocks_that_are_not_known_are_told(family: str, tmp_path: Path) -> None:
    named, options = OTHERS[family]
    config = AutoConfig.for_model(family, **SIZES | options)
    assert Shape.of(config.to_dict()) is not None
    (note,) = notes(config, tmp_path)
    assert f"({named})" in note
    assert "may need more" in note


@pytest.mark.parametrize("family", KNOWN)
def test_of_others_nothing_is_said(family: str) -> None:
    assert other_layers(AutoConfig.for_model(family).to_dict()) is None


def test_nor_in_their_plans(tmp_path: Path) -> None:
    assert notes(AutoConfig.for_model("llama", **SIZES), tmp_path) == []
