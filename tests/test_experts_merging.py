"""Adapters on experts become files: merged in memory, in place and onto a base, saved, reloaded.
What is right is said by stock PEFT on the dense model, and by transformers that loads the files."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch as st
import torch
from datasets import Dataset
from merging import moved, relative
from parameters import slow_but
from peft import LoraConfig, PeftModel, get_peft_model
from test_experts import made
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import quantadapt as qa
from quantadapt.errors import ModelError
from quantadapt.exporting.merging import merged_model
from quantadapt.exporting.stored import stored_parameters
from quantadapt.facade import QuantExperts, densify, stack_facades
from quantadapt.loading.tensors import Checkpoint

IDS = torch.arange(24).reshape(2, 12) * 5 % 128
HELD_OUT = Dataset.from_dict({"input_ids": IDS.tolist(), "completion_mask": [[1] * 12] * 2})
ONE_BY_ONE = ["mixtral", "qwen3-moe"]  # as their checkpoints hold experts
ALL = [*ONE_BY_ONE, "gpt-oss", "deepseek-v3", "granitemoe", "llama4", "nemotron-h"]
Q_PROJ = {"deepseek-v3": "q_b_proj"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the folder of a small model, whole ("one"), in shards, or with its stacks as the model
    keeps them ("fused")."""
    root = tmp_path_factory.mktemp("bases")

    def folder(kind: str, how: str = "one") -> str:
        if not (place := root / f"{kind}-{how}").exists():
            options = {
                "shards": {"max_shard_size": "60KB"},
                "fused": {"save_original_format": False},
            }
            made(kind).save_pretrained(place, **options.get(how, {}))
        return str(place)

    return folder


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def quantized(base: str, backend: str = "hqq", **options: Any) -> Any:
    bits = {"hqq": {"bits": 8, "group_size": 32}}.get(backend, {})
    return qa.quantize(base, backend, **bits, **options)


def tuned(base: str, backend: str = "hqq", **options: Any) -> Any:
    return moved(qa.attach(quantized(base, backend), "lora", r=2, **options))


def dense_lora(model: nn.Module, like: Any) -> Any:
    """Stock PEFT over a dense model with the numbers of another adapter."""
    told = like.peft_config["default"]
    config = LoraConfig(
        r=told.r,
        lora_alpha=told.lora_alpha,
        target_modules=told.target_modules,
        target_parameters=told.target_parameters,
    )
    found = get_peft_model(model, config)
    numbers = {k: v for k, v in like.state_dict().items() if "lora_" in k}
    assert not found.load_state_dict(numbers, strict=False).unexpected_keys
    return found


def equal(found: nn.Module, right: nn.Module) -> None:
    """Every tensor of two models is the same, up to rounding in float32."""
    theirs, ours = right.state_dict(), found.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


# Into the base that it was trained on -------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    slow_but(
        ["mixtral", "qwen3-moe", "gpt-oss", "granitemoe", "llama4"], "mixtral", "gpt-oss", "llama4"
    ),
)
def test_a_dense_merge_is_that_of_stock_peft_and_has_the_names_of_the_base(
    kind: str, bases: Any, tmp_path: Path
) -> None:
    base = bases(kind)
    model = tuned(base)
    before = logits(model)
    right = dense_lora(densify(quantized(base)), model).merge_and_unload()
    found = qa.merge(model, tmp_path, data=HELD_OUT)
    assert found["kl"] < 1e-6
    files = Checkpoint(str(tmp_path / "merged")).files
    assert files.keys() == Checkpoint(base).files.keys()
    equal(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), right)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [*ONE_BY_ONE, "gpt-oss"])
def test_a_quantized_checkpoint_is_merged_under_the_names_of_dense_ones(
    kind: str, bases: Any, tmp_path: Path
) -> None:
    """What its experts were called is known from transformers, not from the packed files."""
    qa.save(quantized(bases(kind)), tmp_path / "base")
    model = moved(qa.attach(qa.load(tmp_path / "base"), "lora", r=2))
    qa.merge(model, tmp_path, data=HELD_OUT)
    files = Checkpoint(str(tmp_path / "merged")).files
    assert files.keys() == Checkpoint(bases(kind)).files.keys()
    right = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert relative(right, logits(model)) < 1e-5


@pytest.mark.parametrize(
    ("kind", "backend"), [("mixtral", "hqq"), ("gpt-oss", "hqq"), ("qwen3-moe", "bnb-nf4")]
)
def test_quantized_again_what_is_adapted_changes_alone(
    kind: str, backend: str, bases: Any, tmp_path: Path
) -> None:
    model = tuned(bases(kind), backend, target_modules=["down_proj"])
    merged: Any = merged_model(model, "requantize")
    dense = dict(stack_facades(merged_model(model, "dense")))
    assert not dense
    wanted = merged_model(model, "dense").state_dict()
    for (name, stack), (_, base) in zip(
        stack_facades(merged), stack_facades(model.get_base_model()), strict=True
    ):
        off = relative(stack.weight.clone(), wanted[name])
        if name.endswith("down_proj"):
            assert 1e-4 < off < 0.2
        else:
            torch.testing.assert_close(stack.dequantize(), base.dequantize(), rtol=0, atol=0)
    qa.merge(model, tmp_path, kind="requantize", data=HELD_OUT)
    torch.testing.assert_close(logits(qa.load(tmp_path)), logits(merged), rtol=0, atol=0)


@pytest.mark.parametrize("way", ["grid", "dithered", "compensated"])
@pytest.mark.parametrize("kind", slow_but(["mixtral", "gpt-oss"], "gpt-oss"))
def test_ways_of_rounding(kind: str, way: str, bases: Any, tmp_path: Path) -> None:
    """Stacks that no adapter touches stay as they are; the others come near, in 8 bits."""
    wanted = {"target_modules": ["down_proj", "q_proj"], "r": 2}
    model = moved(qa.attach(quantized(bases(kind)), "lora", **wanted), by=0.001)
    shown = [{"input_ids": (torch.arange(40)[None] * 7 + n) % 128} for n in range(6)]
    given: dict[str, Any] = {"data": HELD_OUT, "calibration": shown, "rounding": way}
    qa.merge(model, tmp_path, kind="requantize", min_gain=0, **given)
    merged = qa.load(tmp_path / "merged")
    dense = merged_model(model, "dense").state_dict()
    before = stack_facades(model.get_base_model())
    base = {name.replace(".base_layer", ""): stack for name, stack in before}
    for name, stack in stack_facades(merged):
        assert relative(stack.weight.clone(), dense[name]) < 0.05
        same = torch.equal(stack.dequantize(), base[name].dequantize())
        assert same == (not name.endswith("down_proj"))


@pytest.mark.parametrize("kind", slow_but(["qwen3-moe", "gpt-oss"], "gpt-oss"))
def test_peft_merges_in_place_and_back(kind: str, bases: Any) -> None:
    model = tuned(bases(kind))
    adapted = logits(model)
    with model.disable_adapter():
        bare = logits(model)
    packed = {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    model.merge_adapter()
    assert relative(logits(model), adapted) < 1e-5
    model.unmerge_adapter()
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in packed.items())
    torch.testing.assert_close(logits(model), adapted, rtol=0, atol=0)
    again = logits(merged_model(model, "requantize"))
    unloaded = copy.deepcopy(model).unload()
    torch.testing.assert_close(logits(unloaded), bare, rtol=0, atol=0)
    merged = model.merge_and_unload()
    assert any(isinstance(module, QuantExperts) for module in merged.modules())
    torch.testing.assert_close(logits(merged), again, rtol=0, atol=0)


def test_several_adapters(bases: Any, tmp_path: Path) -> None:
    base = bases("mixtral")
    model = tuned(base, target_modules=["q_proj", "experts"])
    config = copy.deepcopy(model.peft_config["default"])
    config.r, config.lora_alpha = 1, 3
    model.add_adapter("second", config)
    model.set_adapter("second")
    alone = logits(moved(model))
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    saved = qa.save(model, tmp_path)
    torch.testing.assert_close(logits(qa.load(saved)), both, rtol=0, atol=0)
    right = PeftModel.from_pretrained(densify(quantized(base)), str(saved))
    right.load_adapter(str(saved / "second"), "second")
    right.base_model.set_adapter(["default", "second"])
    assert relative(both, logits(right)) < 1e-5
    qa.merge(model, tmp_path, data=HELD_OUT)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert relative(logits(merged), both) < 1e-5
    model.merge_adapter()
    assert relative(logits(model), both) < 1e-5
    model.unmerge_adapter()
    model.set_adapter("second")
    torch.testing.assert_close(logits(model), alone, rtol=0, atol=0)


@pytest.mark.parametrize("left", ["experts.gate_up_proj", "experts.down_proj", "experts"])
@pytest.mark.parametrize("kind", slow_but(["mixtral", "gpt-oss"], "mixtral"))
def test_stacks_that_are_left_dense(kind: str, left: str, bases: Any, tmp_path: Path) -> None:
    """PEFT names an adapter's tensors by the order of the parameters, quantized or not."""
    base = bases(kind)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    options = {"target_modules": ["q_proj"], "target_parameters": names}
    skip = [left, "lm_head"]
    model = moved(qa.attach(quantized(base, skip_modules=skip), "lora", r=2, **options))
    expected, saved = logits(model), qa.save(model, tmp_path)
    torch.testing.assert_close(logits(qa.load(saved)), expected, rtol=0, atol=0)
    right = PeftModel.from_pretrained(densify(quantized(base, skip_modules=skip)), str(saved))
    assert relative(expected, logits(right)) < 1e-5
    assert qa.merge(model, tmp_path, data=HELD_OUT)["kl"] < 1e-6
    equal(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), right.merge_and_unload())
    qa.merge(model, tmp_path, kind="requantize", data=HELD_OUT, overwrite=True)
    again = logits(merged_model(model, "requantize"))
    torch.testing.assert_close(logits(qa.load(tmp_path / "merged")), again, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("qwen3-moe", {"modules_to_save": ["experts"]}),
        ("gpt-oss", {"modules_to_save": ["experts"]}),
        ("mixtral", {"modules_to_save": ["gate"]}),
        ("gpt-oss", {"bias": "all"}),
    ],
)
def test_experts_and_routers_that_are_trained_whole(
    kind: str, options: dict[str, Any], bases: Any, tmp_path: Path
) -> None:
    base = bases(kind)
    model = tuned(base, target_modules=["q_proj"], **options)
    expected, saved = logits(model), qa.save(model, tmp_path)
    trained = [n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    assert any("experts" in name or "gate" in name or "router" in name for name in trained)
    torch.testing.assert_close(logits(qa.load(saved)), expected, rtol=0, atol=0)
    right = PeftModel.from_pretrained(densify(quantized(base)), str(saved))
    assert relative(expected, logits(right)) < 1e-5
    for merge in ("dense", "requantize"):
        qa.merge(model, tmp_path / merge, kind=merge, data=HELD_OUT)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense" / "merged")
    assert relative(logits(dense), expected) < 1e-5
    again = logits(merged_model(model, "requantize"))
    torch.testing.assert_close(logits(qa.load(tmp_path / "requantize")), again, rtol=0, atol=0)
    qa.merge_onto(saved, base, tmp_path, data=HELD_OUT)
    onto = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(saved))
    assert relative(logits(onto), logits(theirs)) < 1e-5


# Adapter files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", slow_but(["mixtral", "qwen3-moe", "gpt-oss"], "qwen3-moe", "gpt-oss")
)
def test_stock_peft_reads_what_is_saved(kind: str, bases: Any, tmp_path: Path) -> None:
    model = tuned(bases(kind))
    saved = qa.save(model, tmp_path)
    right = PeftModel.from_pretrained(densify(quantized(bases(kind))), str(saved))
    assert relative(logits(model), logits(right)) < 1e-5


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("mixtral", {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
        ("mixtral", {"target_parameters": ["experts.down_proj"]}),
        ("mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"]}),
        ("qwen3-moe", {"target_modules": ["gate_proj", "up_proj", "down_proj"]}),
        ("gpt-oss", {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    ],
)
def test_what_stock_peft_has_trained_is_read(
    kind: str, names: dict[str, Any], bases: Any, tmp_path: Path
) -> None:
    """Names of transformers 4 are turned by PEFT into parameters, with twice the rank where two
    layers have become one."""
    config = LoraConfig(r=2, lora_alpha=6, **{"target_modules": [], **names})
    right = moved(get_peft_model(densify(quantized(bases(kind))), config))
    right.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(quantized(bases(kind)), str(tmp_path))
    assert relative(logits(model), logits(right)) < 1e-5


def test_an_adapter_of_transformers_4_with_tensors_for_each_expert(
    bases: Any, tmp_path: Path
) -> None:
    """As PEFT wrote them when experts were modules; the right numbers are computed here."""
    dense = densify(quantized(bases("mixtral")))
    weights = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    generator, tensors = torch.Generator().manual_seed(0), {}
    for layer in range(2):
        for expert in range(4):
            for name, part, rows in (
                ("w1", "gate_up_proj", slice(64)),
                ("w2", "down_proj", slice(32)),
                ("w3", "gate_up_proj", slice(64, 128)),
            ):
                weight = weights[f"model.layers.{layer}.mlp.experts.{part}"][expert][rows]
                a = torch.randn(2, weight.shape[1], generator=generator) * 0.1
                b = torch.randn(weight.shape[0], 2, generator=generator) * 0.1
                weight += 3 * b @ a
                place = f"layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                tensors[f"base_model.model.model.{place}.lora_A.weight"] = a
                tensors[f"base_model.model.model.{place}.lora_B.weight"] = b
    st.save_file(tensors, tmp_path / "adapter_model.safetensors")
    LoraConfig(r=2, lora_alpha=6, target_modules=["w1", "w2", "w3"]).save_pretrained(tmp_path)
    dense.load_state_dict(weights)
    model = PeftModel.from_pretrained(quantized(bases("mixtral")), str(tmp_path))
    assert relative(logits(model), logits(dense)) < 1e-5


# Onto a base --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["one", "shards", "fused"])
@pytest.mark.parametrize("kind", slow_but(["mixtral", "gpt-oss"], "mixtral"))
def test_onto_a_base_whose_experts_are_stored_in_any_way(
    kind: str, how: str, bases: Any, tmp_path: Path
) -> None:
    base = bases(kind, how)
    saved = qa.save(tuned(base), tmp_path)
    assert qa.merge_onto(saved, base, tmp_path, data=HELD_OUT)["kl"] < 1e-6
    files, theirs = Checkpoint(str(tmp_path / "merged")).files, Checkpoint(base).files
    assert files.keys() == theirs.keys()
    assert set(files.values()) == set(theirs.values())
    right = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(saved))
    equal(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), right.merge_and_unload())


@pytest.mark.parametrize(
    "kind",
    slow_but(
        ["qwen3-moe", "deepseek-v3", "granitemoe", "llama4", "nemotron-h"], "deepseek-v3", "llama4"
    ),
)
def test_onto_a_base_with_attention_or_shared_experts_adapted_alone(
    kind: str, bases: Any, tmp_path: Path
) -> None:
    base = bases(kind, "shards")
    model = tuned(base, target_modules=[Q_PROJ.get(kind, "q_proj")])
    saved = qa.save(model, tmp_path)
    assert qa.merge_onto(saved, base, tmp_path, data=HELD_OUT)["kl"] < 1e-6
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(Q_PROJ.get(kind, "q_proj") in name for name in changed)


def test_onto_keeps_the_dtype_of_the_files(bases: Any, tmp_path: Path) -> None:
    half = AutoModelForCausalLM.from_pretrained(bases("mixtral"), dtype=torch.bfloat16)
    half.save_pretrained(base := tmp_path / "base")
    saved = qa.save(moved(qa.attach(quantized(str(base)), "lora", r=2)), tmp_path)
    qa.merge_onto(saved, str(base), tmp_path, data=HELD_OUT)
    merged = Checkpoint(str(tmp_path / "merged"))
    assert {merged.read(key).dtype for key in merged.files} == {torch.bfloat16}


def test_parameters_are_those_that_transformers_makes(bases: Any) -> None:
    for kind in ALL:
        stored = stored_parameters(bases(kind))
        for name, tensor in AutoModelForCausalLM.from_pretrained(bases(kind)).state_dict().items():
            assert torch.equal(stored.read(name), tensor), name


# What is lost or damaged --------------------------------------------------------------------------


def damaged(base: str, folder: Path, change: Any) -> str:
    shutil.copytree(base, folder)
    tensors = st.load_file(folder / "model.safetensors")
    change(tensors)
    st.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


W3 = "model.layers.1.block_sparse_moe.experts.2.w3.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(W3), f"it has no {W3}"),
        (lambda t: t.update({W3: t[W3][:-1].clone()}), rf"{W3} has the shape \[63, 32\]"),
        (lambda t: t[W3].view(-1)[:1].fill_(float("nan")), "no numbers"),
        (lambda t: t.update({W3.replace("2", "4"): t[W3].clone()}), "more than its config"),
    ],
    ids=["lost", "cut", "nan", "more"],
)
@pytest.mark.parametrize("command", ["quantize", "onto"])
def test_a_lost_or_damaged_expert_is_named(
    command: str, change: Any, said: str, bases: Any, tmp_path: Path
) -> None:
    base = damaged(bases("mixtral"), tmp_path / "base", change)
    if command == "quantize":
        with pytest.raises(ModelError, match=said):
            quantized(base)
        return
    saved = qa.save(tuned(bases("mixtral")), tmp_path)
    with pytest.raises(ModelError, match=said):
        qa.merge_onto(saved, base, tmp_path, data=HELD_OUT, force_base=True)


def test_a_lost_stack_of_a_quantized_checkpoint_is_named(bases: Any, tmp_path: Path) -> None:
    qa.save(quantized(bases("qwen3-moe")), tmp_path / "base")

    def lose(tensors: dict[str, Tensor]) -> None:
        for key in [k for k in tensors if "1.mlp.experts.gate_up_proj_stack." in k]:
            del tensors[key]

    base = damaged(str(tmp_path / "base"), tmp_path / "damaged", lose)
    with pytest.raises(ModelError, match=r"no model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        qa.load(base)
