"""The phases of a step, against what torch allocates: whatever number of layers is recomputed."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from allocations import peak_of
from transformers import LlamaConfig, LlamaForCausalLM

import quantadapt as qa
from quantadapt.memory import WORKSPACE, Setting, Workload
from quantadapt.memory.phases import phases
from quantadapt.memory.shape import Shape
from quantadapt.training.lent import fused_layers, recomputed

LAYERS, TOKENS, RANK = 6, 1024, 8
SIZES = {
    "vocab_size": 256, "hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": LAYERS,
    "num_attention_heads": 8, "num_key_value_heads": 8,
}  # fmt: skip
BITS = 4.127


def workload(config: Any, **options: Any) -> Workload:
    shape = Shape.of(config.to_dict())
    names = tuple(shape.linears)
    sizes = (shape, dict.fromkeys(names, BITS), names, RANK, "sgd", 2, 1, TOKENS)
    return Workload(*sizes, fused_kernels=False, **options)


@pytest.fixture(scope="module")
def tuned() -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).to(torch.bfloat16)
    base = qa.quantize(model, "bnb-nf4", device="cpu", dtype="bfloat16")
    return qa.attach(base, "lora", r=RANK).train()


def found(tuned: Any, setting: Setting) -> int:
    """Return the peak of a pass, what was there before aside."""
    ids = torch.arange(TOKENS)[None] % SIZES["vocab_size"]

    def step() -> None:
        tuned(input_ids=ids, use_cache=False).logits.mean().backward()

    def clean() -> None:
        for weight in tuned.parameters():
            weight.grad = None
        gc.collect()

    with fused_layers(tuned), recomputed(tuned, setting):
        step()  # finds which layers get the same input
        clean()
        peak = peak_of(step)
    clean()
    return peak


@pytest.mark.parametrize("count", [0, 1, LAYERS // 2, LAYERS - 1, LAYERS])
def test_the_phases_are_those_of_a_real_step(count: int, tuned: Any) -> None:
    setting = Setting(count, False, 1)
    foreseen = max(phase.total for phase in phases(workload(tuned.config), setting))
    assert foreseen - 2 * WORKSPACE == pytest.approx(found(tuned, setting), rel=0.04)
