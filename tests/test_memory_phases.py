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


@pytest.mark.parametrize(
    "setting",
    [
        *(Setting(count, False, 1) for count in (0, 1, LAYERS // 2, LAYERS - 1, LAYERS)),
        Setting(LAYERS, True, 1),  # the place of inputs in CPU memory is that of the step before
        *(Setting(LAYERS, offload, 1, attention=True) for offload in (False, True)),
    ],
)
def test_the_phases_are_those_of_a_real_step(setting: Setting, tuned: Any) -> None:
    foreseen = max(phase.total for phase in phases(workload(tuned.config), setting))
    assert foreseen - 2 * WORKSPACE == pytest.approx(found(tuned, setting), rel=0.04)


def test_a_recorded_pass_works_twice_as_a_card_sees_it() -> None:
    """It ends before the loss, has workspaces of its own, and what it works with is held for it; a
    run records where all of that is free a second time."""
    config = LlamaConfig(**SIZES, torch_dtype="bfloat16")
    setting = Setting(LAYERS, False, 1)
    eager, recorded = workload(config), workload(config, graphs=True)
    usual, found = phases(eager, setting), phases(recorded, setting)
    assert found[: len(usual)] == usual
    again = found[len(usual) : -1]
    assert [phase.name for phase in again] == [phase.name for phase in usual[1:]]
    for one, other in zip(usual[1:], again, strict=True):
        assert other.total - one.total == 2 * WORKSPACE
    # Replayed, the loss is there beside gradients and what the decoder gave.
    state = TOKENS * SIZES["hidden_size"] * 2
    loss = eager.loss_bytes(TOKENS) + state + 4 * WORKSPACE
    assert found[-1][1:] == (0, 0, loss, 4 * eager.trained)
    work = recorded.peak(setting) - sum(
        (recorded.quantized_bytes, recorded.dense_bytes, recorded.adapter_bytes)
    )
    assert recorded.needed(setting) == recorded.peak(setting) + work
    assert eager.needed(setting) == eager.peak(setting)
    budget = recorded.needed(setting) - 1
    assert recorded.fitted(budget) != (recorded, setting)
