"""How options of adapters may name experts: as PEFT does, as checkpoints do, and as modules."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_experts import BASE, adapted, gradients, made, quantized, stock, with_lora
from torch import nn
from transformers import AutoTokenizer

import quantadapt as qa
from quantadapt import demo
from quantadapt.adapting.targets import StacksWarning
from quantadapt.errors import PlanRefused, QuantadaptError
from quantadapt.facade import densify, stack_facades

BACKENDS = ["hqq", "none"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def shapes(tuned: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(p.shape) for n, p in tuned.named_parameters() if p.requires_grad}


def experts(model: nn.Module) -> set[str]:
    """Return what `adapted` calls LoRA on both stacks of each layer."""
    owners = {n for n, m in model.named_modules() if n.endswith(".experts")}
    return owners | {f"{name}.base_layer" for name in owners}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("key", ["experts.gate_up_proj", "down_proj", ".*experts.*"])
def test_patterns_of_ranks_may_name_stacks_as_in_peft(
    key: str, backend: str, recwarn: pytest.WarningsRecorder
) -> None:
    model = quantized("qwen3-moe", backend)
    options: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {key: 8},
        "alpha_pattern": {key: 64},
    }
    stacks = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(target_modules=ATTENTION, target_parameters=stacks, **options)
    right: Any = get_peft_model(densify(copy.deepcopy(model)), config)  # type: ignore[arg-type]
    recwarn.clear()
    found: Any = qa.attach(model, "lora", **options)
    assert not [w for w in recwarn if "did not match" in str(w.message)]
    assert shapes(found) == shapes(right)
    scalings = [
        {n: m.scaling for n, m in tuned.named_modules() if hasattr(m, "scaling")}
        for tuned in (found, right)
    ]
    assert scalings[0] == scalings[1]


def test_a_pattern_that_names_no_stack_is_told_what_they_are_called() -> None:
    with pytest.raises(PlanRefused, match="adapted are down_proj, gate_up_proj, k_proj"):
        qa.attach(quantized("qwen3-moe"), "lora", rank_pattern={"up_projection": 8})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("qwen3-moe", ["gate_proj", "up_proj", "down_proj"]),
        ("gpt-oss", ["gate_proj", "up_proj", "down_proj"]),
        ("mixtral", ["w1", "w2", "w3"]),
        ("mixtral", ["experts.w1", "experts.w2"]),
    ],
)
def test_experts_may_be_named_as_the_layers_of_their_checkpoints(
    kind: str, names: list[str], backend: str
) -> None:
    model = quantized(kind, backend)
    layers = {n for n, _ in model.named_modules() if n.endswith(tuple(ATTENTION))}
    with pytest.warns(StacksWarning, match="of which experts here are made as one: gate_up_proj"):
        tuned: Any = qa.attach(copy.deepcopy(model), "lora", target_modules=[*ATTENTION, *names])
    assert adapted(tuned) == layers | experts(model)
    dense: Any = qa.attach(model, "lora", target_modules=[*names, "experts", *ATTENTION])
    assert shapes(tuned) == shapes(dense)


def test_layers_of_that_name_are_what_is_meant_where_there_are_some() -> None:
    tuned = qa.attach(quantized("qwen2-moe"), "lora", target_modules=["gate_proj", "up_proj"])
    assert all("shared_expert." in name for name in adapted(tuned))


def test_parts_of_experts_that_are_excluded_are_left_out_without_a_word(
    recwarn: pytest.WarningsRecorder,
) -> None:
    names = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
    options: Any = {"target_modules": names, "exclude_modules": ["experts"]}
    tuned = qa.attach(quantized("qwen3-moe"), "loha", **options)
    assert not any(".experts." in name for name in shapes(tuned))
    assert not [w for w in recwarn if issubclass(w.category, StacksWarning)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_regular_expression_may_match_experts_and_layers(backend: str) -> None:
    model = quantized("qwen3-moe", backend)
    layers = {n for n, _ in model.named_modules() if n.endswith("q_proj")}
    tuned = qa.attach(copy.deepcopy(model), "lora", target_modules=r".*(q_proj|experts)")
    assert adapted(tuned) == layers | experts(model)
    alone = qa.attach(copy.deepcopy(model), "lora", target_modules=r".*layers\.1\.mlp\.experts")
    assert adapted(alone) == {n for n in experts(model) if n.startswith("model.layers.1.")}


@pytest.mark.parametrize("whole", ["experts", "mlp"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_that_are_trained_whole_get_no_lora(whole: str, backend: str) -> None:
    model = quantized("qwen3-moe", backend)
    options: Any = {"target_modules": ATTENTION, "modules_to_save": [whole]}
    dense: Any = densify(copy.deepcopy(model))
    right: Any = get_peft_model(dense, LoraConfig(r=4, task_type="CAUSAL_LM", **options))
    tuned = qa.attach(model, "lora", r=4, modules_to_save=[whole])
    assert shapes(tuned) == shapes(right)
    loss, found = gradients(tuned)
    expected_loss, expected = gradients(right)
    assert abs(loss - expected_loss) < 1e-6
    names = [name for name in expected if "modules_to_save" in name]
    assert any("down_proj" in name for name in names)
    assert max(float((found[n] - expected[n]).abs().max()) for n in names) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_router_as_a_target_is_refused_with_the_way_out(backend: str) -> None:
    model = quantized("qwen3-moe", backend)
    fix = "train it whole, modules_to_save: [gate]"
    with pytest.raises(PlanRefused, match=re.escape(fix)):
        qa.attach(model, "lora", target_modules=["gate"])
    tuned = qa.attach(model, "lora", target_modules=ATTENTION, modules_to_save=["gate"])
    assert any("gate.modules_to_save" in name for name in shapes(tuned))


@pytest.mark.parametrize("kind", ["qwen3-moe", "gpt-oss"])
@pytest.mark.parametrize("dense", ["down_proj", "gate_up_proj"])
def test_lora_on_two_stacks_of_which_one_is_dense(kind: str, dense: str) -> None:
    skip = [f"model.layers.1.mlp.experts.{dense}", "lm_head"]
    options: Any = {"bits": 8, "group_size": 32, "skip_modules": skip}
    model = qa.quantize(made(kind), "hqq", device="cpu", dtype="float32", **options)
    right: Any = densify(copy.deepcopy(model))
    tuned = with_lora(model, target_modules=["experts"])
    loss, found = gradients(tuned)
    expected_loss, expected = gradients(stock(right, tuned))
    assert abs(loss - expected_loss) < 1e-6
    assert found.keys() == expected.keys()
    assert max(float((found[n] - expected[n]).abs().max()) for n in found) < 1e-6


@pytest.mark.parametrize("kept", ["model.layers.1.mlp.experts.down_proj", "experts"])
def test_stacks_that_were_left_dense_are_adapted_where_they_are_named(kept: str) -> None:
    options: Any = {"bits": 8, "group_size": 32, "skip_modules": [kept, "lm_head"]}
    model = qa.quantize(made("qwen3-moe"), "hqq", device="cpu", dtype="float32", **options)
    quantized_stacks = [name for name, _ in stack_facades(model)]
    everything = adapted(qa.attach(copy.deepcopy(model), "lora"))
    assert len([name for name in everything if ".experts" in name]) == len(quantized_stacks)
    named = qa.attach(copy.deepcopy(model), "lora", target_modules=["experts"])
    assert adapted(named) == experts(model)
    by_pattern = qa.attach(model, "lora", target_modules=".*experts")
    assert shapes(by_pattern) == shapes(named)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mlp", r"mlp is no layer, but a module of several(.|\n)*layers: down_proj, gate_up_proj"),
        ("input_layernorm", "names input_layernorm, which is no layer that the adapter goes onto"),
        ("act_fn", r"names a SiLU\w*, which is no layer that"),
    ],
)
def test_what_is_no_layer_is_refused_by_its_kind(name: str, words: str) -> None:
    with pytest.raises(PlanRefused, match=words):
        qa.attach(quantized("qwen3-moe"), "lora", target_modules=[name])


@pytest.mark.parametrize(
    ("backend", "cut"),
    [
        ("hqq", "layers.1.mlp.experts.down_proj_stack.scale"),
        ("hqq", "layers.1.self_attn.q_proj.W_q"),
        ("bnb-nf4", "layers.1.mlp.experts.down_proj_stack.weight.absmax"),
        ("bnb-nf4", "layers.1.self_attn.q_proj.weight.nested_quant_map"),
    ],
)
def test_a_tensor_that_was_cut_is_found_while_loading(
    backend: str, cut: str, tmp_path: Path
) -> None:
    qa.save(quantized("qwen3-moe", backend), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors[f"model.{cut}"] = tensors[f"model.{cut}"][:8].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(QuantadaptError, match=re.escape(cut.partition("proj")[0])):
        qa.load(tmp_path)


def test_a_run_tells_once_what_a_name_stands_for(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """It said so where it looked at the names, and again where it attached the adapter."""
    config = transformers.MixtralConfig(**{**BASE, "vocab_size": 2048, "num_local_experts": 4})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(demo.MODEL_DIR).save_pretrained(tmp_path / "base")
    qa.run(
        qa.Spec(
            model=str(tmp_path / "base"),
            backend="hqq",
            device="cpu",
            adapter={"name": "lora", "target_modules": ["q_proj", "w1", "w2", "w3"]},
            train={"max_steps": 1, "per_device_train_batch_size": 1},
            data={"max_examples": 4, "max_length": 128, "eval_examples": 2},
            evaluate={"evaluations": [], "samples": 0},
            export={"merge": "never"},
            output=str(tmp_path / "run"),
        )
    )
    told = [str(w.message) for w in recwarn if issubclass(w.category, StacksWarning)]
    assert [words.partition(", of")[0] for words in told] == [
        "target_modules names w1 and w3",
        "target_modules names w2",
    ]
