"""What a plan counts of quantized layers beside the decoder's, in towers and as a head: the same
that a run has."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

import quantadapt as qa
from quantadapt import demo
from quantadapt.facade import linear_facades
from quantadapt.facade.dense_weights import DenseWeights
from quantadapt.planning import plan
from quantadapt.planning.workload import _not_converted
from quantadapt.spec import Spec

VISION = ["language", "vision"]
ALL = [*VISION, "projector"]


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> str:
    """A Llama whose head is no embedding."""
    folder = tmp_path_factory.mktemp("untied")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(num_attention_heads=4, vocab_size=1024, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo.MODEL_DIR).save_pretrained(folder)
    return str(folder)


def planned(source: str | Path, backend: str, **values: Any) -> Any:
    values = {"skip_misfits": True, "dtype": "float32", "output": "nowhere"} | values
    return plan(Spec(model=str(source), backend=backend, **values)).memory.work


def quantized(source: str | Path, backend: str, **values: Any) -> Any:
    return qa.quantize(str(source), backend, device="cpu", dtype="float32", **values)


def heads(model: Any) -> list[str]:
    return [name for name, _ in linear_facades(model) if name.endswith("lm_head")]


def trained(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("skip", [None, []])
@pytest.mark.parametrize(
    ("kind", "towers"), [("qwen", VISION), ("qwen", ALL), ("gemma", VISION), ("qwen", ["language"])]
)
def test_dense_weights_of_towers_are_those_that_the_run_keeps(
    kind, towers, skip, small_picture_models
) -> None:
    source = small_picture_models[kind]
    how = {"towers": towers, "skip_modules": skip}
    work = planned(source, "hqq", **how)
    model = quantized(source, "hqq", skip_misfits=True, **how)
    assert work.dequantized_bytes == DenseWeights(model).nbytes
    assert work.packs_head == bool(heads(model)) == (skip == [] and kind == "qwen")
    # What is quantized is not dense, too.
    dense = sum(p.numel() for p in qa.quantize(str(source), "none", device="cpu").parameters())
    counted = work.unquantized_bytes // 4
    assert counted == pytest.approx(dense, rel=0.02)
    assert work.adapter.trained == trained(qa.attach(model, "lora"))
    assert (work.tower is not None) == ("vision" in towers)


@pytest.mark.parametrize(
    ("kind", "towers", "off"),
    [("qwen", ["language"], 0), ("qwen", VISION, 0), ("qwen", ALL, 0.04), ("gemma", VISION, 0.01)],
)
def test_of_a_model_that_is_quantized_already_they_are_known_by_its_files(
    kind, towers, off, small_picture_models, tmp_path
) -> None:
    """The sizes of layers in a projector about, by how many bytes they take."""
    how = {"towers": towers, "skip_misfits": True, "skip_modules": []}
    qa.save(quantized(small_picture_models[kind], "hqq", **how), tmp_path / "packed")
    work = planned(tmp_path / "packed", "hqq", skip_misfits=False)
    model = quantized(tmp_path / "packed", "hqq")
    assert work.dequantized_bytes == pytest.approx(DenseWeights(model).nbytes, rel=off or 1e-9)
    assert work.packs_head == bool(heads(model))
    assert (work.tower is not None) == ("vision" in towers)
    expected = trained(qa.attach(model, "lora"))  # queries, keys, values: one layer, or three
    assert work.adapter.trained == pytest.approx(expected, rel=0.16 if off else 1e-9)


@pytest.mark.parametrize(
    ("backend", "adopted"), [("none", False), ("bnb-nf4", False), ("bnb-nf4", True)]
)
@pytest.mark.parametrize("skip", [None, [], ["q_proj"], ["lm_head"]])
def test_a_quantized_head_is_counted_and_adapted(skip, backend, adopted, untied, tmp_path) -> None:
    source, how = untied, {"skip_modules": skip}
    model = quantized(source, backend, **how)
    if adopted:
        qa.save(model, tmp_path / "packed")
        source, how = tmp_path / "packed", {}
        model = quantized(source, "bnb-nf4")
    work = planned(source, backend, skip_misfits=False, adapter="lora", **how)
    assert work.packs_head == bool(heads(model)) == (skip in ([], ["q_proj"]))
    assert work.dequantized_bytes == DenseWeights(model).nbytes
    assert work.adapter.trained == trained(qa.attach(model, "lora"))
    assert work.whole_logits == work.packs_head  # as PEFT's layer has the head make them
    assert work.unquantized_bytes // 4 == LlamaForCausalLM.from_pretrained(untied).num_parameters()


EXPERTS = {"moe_intermediate_size": 64, "num_experts_per_tok": 2}
FAMILIES = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 64, **EXPERTS},
    "deepseek_v3": {
        **{"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
        **{"q_lora_rank": 32, "kv_lora_rank": 32, "num_key_value_heads": 4, **EXPERTS},
        **{"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16},
    },
    "phi": {},
    "phi3": {"pad_token_id": 0},
    "glm4": {"head_dim": 16, "pad_token_id": 0},
    "gpt_neox": {"num_key_value_heads": 4},
    "gemma2": {"head_dim": 16},
}


@pytest.mark.parametrize("skip", [None, []])
@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_the_same_in_other_families(family, skip, tmp_path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1024}
    config = AutoConfig.for_model(family, **sizes | FAMILIES[family])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(demo.MODEL_DIR).save_pretrained(tmp_path)
    work = planned(tmp_path, "hqq", skip_modules=skip)
    model = quantized(tmp_path, "hqq", skip_modules=skip, skip_misfits=True)
    assert work.packs_head == bool(heads(model)) == (skip == [] and family != "gemma2")
    assert work.dequantized_bytes == DenseWeights(model).nbytes
    assert work.adapter.trained == trained(qa.attach(model, "lora"))


def test_a_tied_head_stays_the_embedding(untied, tmp_path) -> None:
    shutil.copytree(untied, tmp_path / "tied")
    model = LlamaForCausalLM.from_pretrained(untied)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    work = planned(tmp_path / "tied", "hqq", skip_modules=[])
    found = quantized(tmp_path / "tied", "hqq", skip_modules=[])
    assert not work.packs_head
    assert not heads(found)
    assert work.dequantized_bytes == DenseWeights(found).nbytes


def test_what_is_dense_of_a_tower_says_nothing_of_the_language_model() -> None:
    """Whose layers are called alike: the lists of checkpoints name those of towers, block by
    block."""
    names = [f"model.visual.blocks.{n}.mlp.gate_proj" for n in range(4)]
    config = {"quantization_config": {"quant_method": "x", "modules_to_not_convert": names}}
    assert _not_converted(config, 4) == set()
    of_language = [f"model.layers.{n}.mlp.gate_proj" for n in range(4)]
    config["quantization_config"]["modules_to_not_convert"] = of_language
    assert _not_converted(config, 4) == {"gate_proj"}
