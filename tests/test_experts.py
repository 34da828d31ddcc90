"""Stacks of experts, quantized and adapted, against transformers and PEFT on the dense model."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.utils import transformers_weight_conversion
from torch import Tensor, nn

import quantadapt as qa
from quantadapt.adapting.targets import StacksWarning
from quantadapt.errors import PlanRefused
from quantadapt.facade import QuantExperts, densify, linear_facades, stack_facades
from quantadapt.registry import registry

BASE = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {"moe_intermediate_size": 32, "num_experts": 4, "head_dim": 8, "mlp_only_layers": []},
    ),
    "gpt-oss": (
        "GptOssConfig",
        {"num_local_experts": 4, "head_dim": 8, "sliding_window": 64,
         "layer_types": ["sliding_attention", "full_attention"], "rope_parameters":
         {"rope_type": "default", "rope_theta": 10_000.0}},
    ),
    "deepseek-v3": (
        "DeepseekV3Config",
        {"num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 4,
         "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
         "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
         "v_head_dim": 8},
    ),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 4,
         "mlp_only_layers": []},
    ),
    "olmoe": ("OlmoeConfig", {"num_experts": 4}),
    "granitemoe": ("GraniteMoeConfig", {"num_local_experts": 4}),
    "llama4": (
        "Llama4TextConfig",
        {"num_local_experts": 4, "intermediate_size_mlp": 64, "head_dim": 8,
         "num_experts_per_tok": 1},
    ),
    "nemotron-h": (
        "NemotronHConfig",
        {"n_routed_experts": 4, "moe_intermediate_size": 32, "head_dim": 8, "layers_block_type":
         ["attention", "moe"], "moe_shared_expert_intermediate_size": 32, "n_shared_experts": 1},
    ),
}  # fmt: skip


def made(kind: str) -> nn.Module:
    name, more = KINDS[kind]
    config = getattr(transformers, name)(**{**BASE, **more})
    torch.manual_seed(0)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.1)
    return model


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def quantized(kind: str, backend: str = "hqq") -> nn.Module:
    options = {"bits": 8, "group_size": 32} if backend == "hqq" else {}
    return qa.quantize(made(kind), backend, device="cpu", dtype="float32", **options)


def ids() -> Tensor:
    return torch.randint(0, 128, (2, 11), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids()).logits  # type: ignore[no-any-return]


def error(found: Tensor, right: Tensor) -> float:
    return float((found - right).norm() / right.norm())


def experts_in(model: nn.Module) -> int:
    return sum(p.ndim == 3 and "expert" in n for n, p in model.named_parameters())


def test_all_stacks_are_quantized_and_the_model_answers_as_the_dense_one(kind: str) -> None:
    dense, model = made(kind), quantized(kind)
    assert len(dict(stack_facades(model))) == experts_in(dense) > 0
    assert experts_in(model) == 0
    assert error(logits(model), logits(dense)) < 0.1  # a token near the edge is routed elsewhere
    assert error(logits(densify(copy.deepcopy(model))), logits(model)) < 1e-6


def test_made_dense_it_is_a_model_of_transformers_own_again(kind: str) -> None:
    dense = made(kind)
    again = densify(quantized(kind))
    assert [type(m) for m in again.modules()] == [type(m) for m in dense.modules()]
    assert again.state_dict().keys() == dense.state_dict().keys()
    shapes = {name: tensor.shape for name, tensor in dense.state_dict().items()}
    assert {name: tensor.shape for name, tensor in again.state_dict().items()} == shapes


def test_saved_and_loaded_it_gives_the_same(kind: str, tmp_path: Path) -> None:
    model = quantized(kind)
    qa.save(model, tmp_path / "base")
    # 1e-6: a dense gate of one output adds up in another order where its tensor lies otherwise.
    assert error(logits(qa.load(tmp_path / "base")), logits(model)) < 1e-6


def test_a_stack_reads_as_the_parameter_that_it_was(kind: str) -> None:
    dense, model = made(kind), quantized(kind)
    for name, stack in stack_facades(model):
        right = dense.get_parameter(name)
        read = model.get_submodule(name.rpartition(".")[0]).__getattr__(name.rpartition(".")[2])
        assert read.shape == right.shape
        assert error(read + 0, right) < 0.02
        by_expert = stack.by_expert()
        first = by_expert[0].T if stack.stack.transposed else by_expert[0]
        assert torch.equal(read[0] + 0, first)


def test_what_is_written_into_a_stack_is_quantized(kind: str) -> None:
    model = quantized(kind)
    name, _ = next(stack_facades(model))
    experts = model.get_submodule(name.rpartition(".")[0])
    assert isinstance(experts, QuantExperts)
    before = experts.__getattr__(name.rpartition(".")[2]) + 0
    with torch.no_grad():
        experts.__getattr__(name.rpartition(".")[2]).mul_(2)
    assert error(experts.__getattr__(name.rpartition(".")[2]) + 0, 2 * before) < 0.01


def with_lora(model: nn.Module, **options: Any) -> Any:
    tuned = qa.attach(model, "lora", r=4, **options)
    numbers = torch.Generator().manual_seed(2)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=numbers)
    return tuned


def gradients(tuned: nn.Module) -> tuple[float, dict[str, Tensor]]:
    tuned.train()
    loss = tuned(input_ids=ids(), labels=ids()).loss
    loss.backward()
    found = {n: p.grad for n, p in tuned.named_parameters() if p.grad is not None}
    return float(loss), found


def stock(model: nn.Module, tuned: Any) -> Any:
    """Return stock PEFT's LoRA on the dense weights of `model`, with the values of `tuned`."""
    config = tuned.peft_config["default"]
    own = {name: getattr(config, name) for name in ("r", "lora_alpha", "target_parameters")}
    modules = sorted(
        {n.removeprefix("base_model.model.").partition(".lora_A")[0] for n in tuned.state_dict()
         if ".lora_A" in n and ".experts." not in n}
    )  # fmt: skip
    names = [n for n in modules if n]
    reference: Any = get_peft_model(model, LoraConfig(**own, target_modules=names))  # type: ignore[arg-type]
    state = {name: t for name, t in tuned.state_dict().items() if "lora_" in name}
    assert not reference.load_state_dict(state, strict=False).unexpected_keys
    return reference


@pytest.mark.parametrize("backend", ["hqq", "none"])
def test_lora_on_experts_trains_as_stock_peft_does(
    kind: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It takes the names of DeepSeek's shared experts for those that its experts had once.
    conversion = "convert_peft_config_for_transformers"
    monkeypatch.setattr(transformers_weight_conversion, conversion, lambda *a, **k: None)
    model = quantized(kind, backend)
    dense = densify(copy.deepcopy(model))
    tuned = with_lora(model)
    loss, found = gradients(tuned)
    right, expected = gradients(stock(dense, tuned))
    assert any(".experts." in name for name in found)
    assert abs(loss - right) < 1e-6
    assert found.keys() == expected.keys()
    assert max(float((found[n] - expected[n]).abs().max()) for n in found) < 1e-6


def adapted(tuned: Any) -> set[str]:
    names = (n for n in tuned.state_dict() if "lora_A" in n)
    return {n.partition(".lora_A")[0].removeprefix("base_model.model.") for n in names}


def test_target_modules_may_name_experts_or_leave_them_out() -> None:
    model = quantized("qwen2-moe")
    everything = adapted(with_lora(copy.deepcopy(model)))
    layers = {name for name, _ in linear_facades(model)}
    owners = {name.rpartition(".")[0] for name, _ in stack_facades(model)}
    nested = {f"{name}.base_layer" for name in owners}
    assert everything == layers | owners | nested
    assert adapted(with_lora(copy.deepcopy(model), exclude_modules=["experts"])) == layers
    assert adapted(with_lora(copy.deepcopy(model), target_modules=["experts"])) == owners | nested
    with pytest.warns(StacksWarning, match="add 'experts' to adapt experts, too"):
        named = adapted(with_lora(copy.deepcopy(model), target_modules=["down_proj"]))
    assert named == {name for name in layers if name.endswith("down_proj")}
    both = adapted(with_lora(copy.deepcopy(model), target_modules=["down_proj", "experts"]))
    assert both == named | owners | nested
    one = adapted(with_lora(copy.deepcopy(model), layers_to_transform=[1]))
    assert one == {name for name in everything if name.startswith("model.layers.1.")}


@pytest.mark.parametrize("adapter", ["vera", "ia3", "adalora", "pissa"])
def test_what_does_not_go_onto_experts_is_refused_with_the_way_out(adapter: str) -> None:
    model = quantized("qwen3-moe")
    names = ["k_proj", "o_proj", "q_proj", "v_proj"]
    excludes = adapter != "vera"  # PEFT's options for it have no exclude_modules
    fix = "exclude_modules: [experts]" if excludes else f"target_modules: [{', '.join(names)}]"
    with pytest.raises(PlanRefused, match=re.escape(fix)):
        qa.attach(model, adapter)
    way_out = {"exclude_modules": ["experts"]} if excludes else {"target_modules": names}
    tuned = qa.attach(model, adapter, **way_out)
    assert not any(".experts." in name for name, p in tuned.named_parameters() if p.requires_grad)


@pytest.mark.parametrize(("kind", "name"), [("qwen3-moe", "gate"), ("gpt-oss", "router")])
def test_routers_are_no_layers_and_their_weight_may_be_named(kind: str, name: str) -> None:
    model = quantized(kind)
    with pytest.raises(PlanRefused, match=re.escape(f"target_parameters: [{name}.weight]")):
        qa.attach(model, "lora", r=4, target_modules=[name])
    tuned = qa.attach(
        model, "lora", r=4, target_modules=["q_proj"], target_parameters=[f"{name}.weight"]
    )
    trained = {n for n, p in tuned.named_parameters() if p.requires_grad}
    assert any(f".{name}.lora_A" in n for n in trained)


@pytest.mark.parametrize("backend", ["hqq", "none"])
def test_experts_may_have_a_rank_of_their_own(backend: str) -> None:
    pattern = {"gate_up_proj": 2, "experts.down_proj": 1}
    tuned = qa.attach(quantized("qwen2-moe", backend), "lora", r=4, rank_pattern=pattern)
    rows = {n: len(p) for n, p in tuned.named_parameters() if ".layers.0." in n and "lora_A" in n}
    of_experts = sorted(count for name, count in rows.items() if ".experts." in name)
    assert of_experts == [1 * 4, 2 * 4]
    assert {count for name, count in rows.items() if ".experts." not in name} == {4}
    with pytest.raises(PlanRefused, match="rank_pattern"):
        qa.attach(quantized("qwen2-moe", backend), "lora", r=4, rank_pattern={"expert_proj": 2})


@pytest.mark.parametrize("adapter", ["pissa", "vera", "lora"])
def test_a_plan_refuses_what_does_not_go_onto_experts(adapter: str, tmp_path: Path) -> None:
    made("qwen3-moe").save_pretrained(tmp_path / "model")

    def problems(**options: Any) -> list[str]:
        spec = qa.Spec(
            model=str(tmp_path / "model"),
            backend={"name": "hqq", "group_size": 32},
            adapter={"name": adapter, **options},
            output=str(tmp_path / "run"),
        )
        try:
            qa.plan(spec)
        except PlanRefused as error:
            return [problem.rule for problem in error.problems]
        return []

    assert problems() == ([] if adapter == "lora" else [f"{adapter}-experts"])
    assert problems(target_modules=["q_proj", "v_proj"]) == []


def test_every_method_goes_onto_experts_or_is_refused_with_the_way_out(tmp_path: Path) -> None:
    """By a rule, before any work: with what to do in place of it."""
    made("qwen3-moe").save_pretrained(tmp_path / "model")
    reach = set()
    for adapter in registry().adapters():
        backend = {"name": "hqq", "group_size": 32}
        spec = qa.Spec(model=str(tmp_path / "model"), backend=backend, adapter=adapter.name)
        spec.output = str(tmp_path / "run")
        try:
            qa.plan(spec)
        except PlanRefused as refused:
            ways = {p.rule: p.fix for p in refused.problems}
            rules = {f"{adapter.name}-experts", f"{adapter.name}-not-supported"} & ways.keys()
            assert rules, adapter.name
            assert all("use " in ways[rule] for rule in rules)
            continue
        reach.add(adapter.name)
    assert reach == {"lora", "rslora", "dora"}
