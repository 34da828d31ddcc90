"""What a user is told of how many of a model's weights are quantized."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DbrxConfig,
    GptOssConfig,
    MixtralConfig,
)

import quantadapt as qa
from quantadapt.errors import PlanRefused
from quantadapt.planning.share import BEGINNING, DENSE_EXPERTS
from quantadapt.planning.words import plan_remarks
from quantadapt.quantizing.dense import MostlyDenseWarning, share_of
from quantadapt.quantizing.state import state_of

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
ATTENTION, EXPERTS, ROUTER = 4 * 32 * 32, 4 * 3 * 32 * 64, 4 * 32
"""Weights of each in a layer of the model below."""


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    made: nn.Module = AutoModelForCausalLM.from_config(config).float()
    return made


def planned(path: Path, backend: str, **more: object) -> qa.Plan:
    mixtral().save_pretrained(path / "model")
    options = {"group_size": 16} if backend == "hqq" else {}
    spec = qa.Spec(
        model=str(path / "model"),
        backend={"name": backend, **options},
        adapter="lora",
        output=str(path / "run"),
        **more,
    )
    return qa.plan(spec)


def test_a_plan_tells_that_experts_are_quantized_and_routers_are_not(tmp_path: Path) -> None:
    share = planned(tmp_path, "hqq").share
    assert share is not None
    assert share.quantized == 2 * (ATTENTION + EXPERTS)
    assert share.dense == {"routers": 2 * ROUTER}
    assert share.words == (
        "quantized are 99.6% of the weights, embeddings and head not counted; dense stay routers"
        " 0.4%"
    )
    assert share.amount.startswith("99.6% of the weights")


def test_a_plan_warns_of_a_model_that_stays_mostly_dense(tmp_path: Path) -> None:
    skipped = planned(tmp_path, "hqq", skip_modules=["lm_head"])
    assert skipped.share is not None
    assert not [note for note in skipped.notes if note.startswith(BEGINNING)]
    assert planned(tmp_path, "none").share is None


def test_a_quantized_model_has_what_the_plan_said(tmp_path: Path) -> None:
    share = planned(tmp_path, "hqq").share
    model = qa.quantize(str(tmp_path / "model"), "hqq", group_size=16, dtype="float32")
    found = share_of(model, ("lm_head",))
    assert share is not None
    assert (found.quantized, sum(found.dense.values())) == (share.quantized, 2 * ROUTER)
    assert found.dense["routers"] == 2 * ROUTER
    assert any(note.startswith(BEGINNING) for note in state_of(model).notes)


def test_experts_that_are_no_stacks_stay_dense_and_the_plan_says_so(tmp_path: Path) -> None:
    """DBRX keeps the weights of all experts in one matrix."""
    experts = {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}
    config = DbrxConfig(
        d_model=32, n_heads=4, n_layers=2, vocab_size=100, max_seq_len=64, ffn_config=experts,
        attn_config={"kv_n_heads": 4, "rope_theta": 10_000.0},
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    plan = qa.plan(qa.Spec(model=str(tmp_path / "model"), backend="bnb-nf4"))
    assert plan.share is not None
    assert plan.share.dense["experts"] == 2 * EXPERTS
    assert [note for note in plan.notes if note.startswith(BEGINNING)] == [plan.share.words]
    model = qa.quantize(str(tmp_path / "model"), "bnb-nf4", dtype="float32")
    found = share_of(model, ("lm_head",))
    assert (found.quantized, found.dense["experts"]) == (plan.share.quantized, 2 * EXPERTS)


def as_transformers_writes_it(path: Path) -> Path:
    """Return a checkpoint in nf4 by transformers alone, which quantizes layers and no experts."""
    mixtral().save_pretrained(path / "dense")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    options = {"quantization_config": config, "dtype": torch.float32, "device_map": "cpu"}
    packed = AutoModelForCausalLM.from_pretrained(path / "dense", **options)
    packed.save_pretrained(path / "packed")
    return path / "packed"


def test_a_plan_warns_of_a_checkpoint_with_dense_experts_and_counts_their_memory(
    tmp_path: Path,
) -> None:
    folder = as_transformers_writes_it(tmp_path)
    spec = qa.Spec(model=str(folder), backend="bnb-nf4", data={"path": str(qa.demo.TRAIN_FILE)})
    plan = qa.plan(spec)
    model = qa.quantize(str(folder), "bnb-nf4", dtype="float32")
    found = share_of(model, ("lm_head",))
    assert plan.share is not None
    assert plan.share == found
    assert plan.share.quantized == 2 * ATTENTION
    assert plan.share.dense == {"experts": 2 * EXPERTS, "routers": 2 * ROUTER}
    assert [note for note in plan.notes if note.startswith(BEGINNING)] == [plan.share.words]
    remarks = plan_remarks(plan)
    assert f"warning: {plan.share.words}" in remarks
    assert f"note: {DENSE_EXPERTS}" in remarks
    assert plan.memory is not None
    bits = plan.memory.work.bits
    assert {bits["experts.gate_up_proj"], bits["experts.down_proj"]} == {16}  # on a GPU
    assert bits["q_proj"] < 5


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("bnb-nf4", {}),
        ("bnb-int8", {}),
        ("hqq", {"group_size": 16}),
        ("torchao-int4", {"group_size": 32}),
        ("mxfp4", {}),
        ("finegrained-fp8", {"weight_block_size": (32, 32)}),
        ("compressed-tensors", {"group_size": 32}),
        ("gptq", {"group_size": 32}),
    ],
)
def test_a_plan_tells_what_is_quantized_of_packed_checkpoints(
    backend: str, options: dict[str, Any], tmp_path: Path
) -> None:
    shown = {"calibration": [{"input_ids": torch.arange(64)[None]}]} if backend == "gptq" else {}
    model = qa.quantize(mixtral(), backend, device="cpu", dtype="float32", **options, **shown)
    qa.save(model, tmp_path / "saved")
    plan = qa.plan(qa.Spec(model=str(tmp_path / "saved"), backend=backend, adapter="lora"))
    assert plan.adopt
    assert plan.share == share_of(qa.load(tmp_path / "saved"), ("lm_head",))
    assert plan.share is not None
    assert plan.share.quantized == 2 * (ATTENTION + EXPERTS)


def test_quantizing_warns_where_most_stays_dense() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(32, 32)
            self.large = nn.Conv2d(32, 64, 3)

    with pytest.warns(MostlyDenseWarning, match=r"quantized are 5\.3% .*Conv2d 94\.7%"):
        qa.quantize(Attention(), "hqq", group_size=16, device="cpu", dtype="float32")


def test_layers_that_all_do_not_fit_are_told_as_such() -> None:
    options = {"group_size": 128, "skip_misfits": True}
    with pytest.raises(PlanRefused, match="all linear layers of the model are left dense"):
        qa.quantize(mixtral(), "torchao-int4", device="cpu", dtype="float32", **options)


def test_a_model_of_linear_layers_is_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", MostlyDenseWarning)
        model = qa.quantize(backend="hqq", device="cpu", dtype="float32")
    assert share_of(model, ("lm_head",)).fraction == 1.0


def test_what_stays_dense_is_called_as_in_the_plan_and_biases_of_experts_are_no_weights() -> None:
    sizes = {**SIZES, "head_dim": 8, "layer_types": ["full_attention"] * 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GptOssConfig(**sizes, num_local_experts=4)).float()
    weights = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 3)
    assert share_of(model).dense["experts"] == weights
    share = share_of(qa.quantize(model, "hqq", device="cpu", group_size=16), ("lm_head",))
    assert {name for name, count in share.dense.items() if count} == {"routers"}
    assert share.dense["routers"] == 2 * ROUTER
