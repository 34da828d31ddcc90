"""What a user is told where few of a model's weights are quantized."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig

import quantadapt as qa
from quantadapt.planning.share import BEGINNING
from quantadapt.quantizing.stage import MostlyDenseWarning

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def mixtral() -> nn.Module:
    """In each layer 4 * 32 * 32 weights of attention, 4 * 3 * 32 * 64 of experts, 4 * 32 of a
    router: 4096 of 28800 can be quantized."""
    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    made: nn.Module = AutoModelForCausalLM.from_config(config).float()
    return made


def spec(path: Path, backend: str = "hqq") -> qa.Spec:
    options = {"group_size": 16} if backend == "hqq" else {}
    return qa.Spec(
        model=str(path / "model"), backend={"name": backend, **options}, output=str(path / "run")
    )


@pytest.mark.parametrize(("backend", "told"), [("hqq", 1), ("none", 0)])
def test_a_plan_tells_that_experts_stay_dense(tmp_path: Path, backend: str, told: int) -> None:
    mixtral().save_pretrained(tmp_path / "model")
    notes = [n for n in qa.plan(spec(tmp_path, backend)).notes if n.startswith(BEGINNING)]
    assert len(notes) == told
    assert all(": 14%" in note and "experts" in note for note in notes)


def test_quantizing_tells_it_in_python() -> None:
    with pytest.warns(MostlyDenseWarning, match="14%.*MixtralExperts"):
        qa.quantize(mixtral(), "hqq", group_size=16, device="cpu", dtype="float32")


def test_a_model_of_linear_layers_is_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", MostlyDenseWarning)
        qa.quantize(backend="hqq", device="cpu", dtype="float32")
    assert not [n for n in qa.plan(qa.Spec(backend="hqq")).notes if n.startswith(BEGINNING)]
