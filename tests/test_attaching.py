"""An adapter goes into exactly the layers that are named, or the model stays as it was."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import numpy as np
import peft
import pytest
import torch
from merging import gpt2
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from test_experts import made as made_experts
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)

import quantadapt as qa
from quantadapt.adapting import injecting
from quantadapt.adapting.injecting import TargetsWarning, all_or_nothing
from quantadapt.errors import PlanRefused
from quantadapt.facade import facades, linear_facades
from quantadapt.testing.tensors import relative

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": lambda: Qwen3MoeConfig(**SIZES, **EXPERTS, num_experts=4, head_dim=8),
    "deepseek-v3": lambda: DeepseekV3Config(
        **SIZES, **EXPERTS, n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1,
        n_group=1, topk_group=1, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8,
    ),
}  # fmt: skip


def quantized(kind: str = "llama", backend: str = "hqq") -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]()).float().eval()
    options = {"group_size": 16} if backend == "hqq" else {}
    return qa.quantize(model, backend, device="cpu", dtype="float32", **options)


def adapted(model: nn.Module) -> set[str]:
    names = [name for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    return {name.removeprefix("base_model.model.") for name in names}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.arange(3, 27).reshape(2, 12)).logits
    return found


def set_randomly(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) / 20


@pytest.mark.filterwarnings("ignore::quantadapt.adapting.injecting.TargetsWarning")
class TestExactlyTheLayersThatAreNamed:
    @pytest.mark.parametrize("kind", list(CONFIGS))
    @pytest.mark.parametrize("adapter", ["lora", "dora", "vera", "ia3"])
    def test_all_linear_is_every_quantized_layer(self, kind, adapter) -> None:
        model = quantized(kind)
        layers = {name for name, _ in linear_facades(model)}
        options = {"exclude_modules": ["experts"]} if kind != "llama" else {}
        if adapter == "vera" and options:  # which has no such option
            options = {"target_modules": sorted({name.rpartition(".")[2] for name in layers})}
        assert adapted(qa.attach(model, adapter, **options)) == layers

    @pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe", "deepseek-v3"])
    def test_an_expression_is_matched_with_whole_names(self, kind) -> None:
        model = quantized(kind)
        tuned = qa.attach(model, "lora", target_modules=r".*\.1\.self_attn\.o_proj")
        assert adapted(tuned) == {"model.layers.1.self_attn.o_proj"}

    def test_shared_experts_come_back(self, tmp_path) -> None:
        dense = quantized("deepseek-v3", "none")
        base = copy.deepcopy(dense)
        tuned = qa.attach(dense, "lora", r=4)
        set_randomly(tuned)
        qa.save(tuned, tmp_path)
        loaded = qa.load(tmp_path, base=base)
        assert adapted(loaded) == adapted(tuned)
        assert relative(logits(loaded), logits(tuned)) < 1e-6

    def test_names_of_an_older_model_are_still_converted(self, tmp_path) -> None:
        """What PEFT itself makes of Mixtral's w1, w2 and w3, it makes here too."""
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "w1", "w2", "w3"])
        model = quantized("mixtral", "none")
        tuned = injecting.injected(model, config)
        assert "model.layers.0.mlp.experts" in adapted(tuned)

    def test_what_peft_adapts_otherwise_is_refused(self, monkeypatch) -> None:
        model = quantized("deepseek-v3")
        monkeypatch.setattr(injecting, "_CONVERSION", "moved")
        with pytest.raises(PlanRefused, match="does not adapt what is named: 6 modules differ"):
            qa.attach(model, "lora")
        assert not adapted(model)


def test_it_is_told_where_peft_alone_would_read_the_targets_otherwise() -> None:
    with pytest.warns(TargetsWarning, match=r"load the adapter with quantadapt\.load"):
        qa.attach(quantized("deepseek-v3"), "lora")


# Nothing half done --------------------------------------------------------------------------------


def state(model: nn.Module) -> dict[str, Any]:
    return {
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "trained": [(name, p.requires_grad) for name, p in model.named_parameters()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "vendors": [id(facade.vendor) for _, facade in facades(model)],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "config": model.config.to_dict(),
    }


@pytest.mark.parametrize(
    ("adapter", "options"),
    [
        ("lora", {"use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 2}}),
        ("lora", {"kasa_config": {}, "r": 40}),
        ("lora", {"target_modules": ["q_proj", "input_layernorm"]}),
        ("lora", {"target_parameters": ["embed_tokens.weight"], "lora_dropout": 0.1}),
        ("lora", {"bias": "all", "init_lora_weights": "orthogonal", "r": 3}),
        ("vera", {"bias": "some"}),
        ("oft", {"r": 3}),
        ("road", {"group_size": 5}),
    ],
)
def test_what_peft_refuses_leaves_the_model_as_it_was(adapter, options) -> None:
    model = quantized()
    before, expected = state(model), logits(model)
    with pytest.raises(PlanRefused):
        qa.attach(model, adapter, **options)
    assert state(model) == before
    assert torch.equal(logits(model), expected)
    qa.attach(model, "lora")  # and it can be used


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_so_does_what_stops_it_midway(error, monkeypatch) -> None:
    """PiSSA has rewritten some layers by then."""
    model = quantized()
    before, expected = state(model), logits(model)
    count, init = 0, peft.tuners.lora.LoraLayer.pissa_init

    def stops(self: Any, *args: Any) -> None:
        nonlocal count
        count += 1
        if count == 6:
            raise error("stop")
        init(self, *args)

    monkeypatch.setattr(peft.tuners.lora.LoraLayer, "pissa_init", stops)
    with pytest.raises((error, PlanRefused)):
        qa.attach(model, "pissa", r=4)
    assert state(model) == before
    assert torch.equal(logits(model), expected)


def test_dense_weights_are_put_back() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    weight = model[0].weight.clone()

    def half() -> None:
        with all_or_nothing(model):
            model[0].weight.data = torch.zeros(2, 3)
            model[0].register_forward_hook(lambda *_: None)
            model.append(nn.Linear(2, 2))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half()
    assert torch.equal(model[0].weight, weight)
    assert len(model) == 2
    assert not model[0]._forward_hooks


# What is named and not there ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "where", "words"),
    [
        ({"target_modules": ["qproj"]}, "target_modules", "did you mean 'q_proj'"),
        ({"target_modules": "q_proj"}, "target_modules", r"write a list: \[q_proj\]"),
        ({"target_modules": "q_proj,v_proj"}, "target_modules", r"write a list: \[q_proj, v_proj"),
        ({"target_modules": []}, "target_modules", "it names no layer"),
        ({"target_modules": ["self_attn"]}, "target_modules", "name its layers: k_proj, o_proj"),
        ({"exclude_modules": ["q_prj"]}, "exclude_modules", "did you mean 'q_proj'"),
        ({"exclude_modules": ".*"}, "target_modules", "nothing is left to adapt"),
        ({"modules_to_save": ["lm_hed"]}, "modules_to_save", "did you mean 'lm_head'"),
        ({"rank_pattern": {"foo": 3}}, "rank_pattern", "matches no layer that is adapted"),
        ({"alpha_pattern": {"foo": 3}}, "alpha_pattern", "matches no layer that is adapted"),
        ({"layers_to_transform": [1, 7]}, "layers_to_transform", "there is no layer 7"),
        ({"layers_to_transform": -1}, "layers_to_transform", "use 0 to 1"),
        ({"layers_to_transform": 0, "layers_pattern": "layer"}, "layers_pattern", "mean 'layers'"),
        ({"trainable_token_indices": [64]}, "trainable_token_indices", "the embedding of 64"),
        ({"trainable_token_indices": [-1]}, "trainable_token_indices", "the embedding of 64"),
        ({"trainable_token_indices": []}, "trainable_token_indices", "it names no token"),
        ({"trainable_token_indices": {"emb": [1]}}, "trainable_token_indices", "no embedding"),
        (
            {"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]},
            "trainable_token_indices", "trains model.embed_tokens whole",
        ),
        ({"target_parameters": ["foo"]}, "target_parameters", "no parameter of the model"),
        ({"init_lora_weights": "pissa", "r": 33}, "r", "model.layers.0.self_attn.q_proj has 32"),
        ({"init_lora_weights": "pissa_niter_2", "r": 33}, "r", "use 32 or less"),
        ({"init_lora_weights": "olora", "r": 33}, "r", "use 32 or less"),
        ({"init_lora_weights": "loftq", "r": 33}, "r", "use 32 or less"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights", "preprocess_loraga"),
    ],
)  # fmt: skip
def test_what_is_named_and_not_there_is_refused(options, where, words, checkpoint) -> None:
    model = quantized("llama", "none")
    state(model)
    model.quantadapt.source = str(checkpoint)  # LoftQ has something to compare with
    with pytest.raises(PlanRefused, match=words) as caught:
        qa.attach(model, "lora", **options)
    assert any(p.where.startswith(f"adapter.{where}") for p in caught.value.problems)
    assert not adapted(model)


def test_a_rank_pattern_is_looked_at_too() -> None:
    patterns = {"q_proj": 33, "v_proj": 4}
    with pytest.raises(PlanRefused, match="pissa needs a singular vector for each rank"):
        qa.attach(quantized(), "pissa", r=4, rank_pattern=patterns)


def test_all_of_it_is_told_at_once() -> None:
    options = {"exclude_modules": ["foo"], "modules_to_save": ["bar"], "target_modules": ["baz"]}
    with pytest.raises(PlanRefused) as caught:
        qa.attach(quantized(), "lora", **options)
    assert {problem.where for problem in caught.value.problems} == {f"adapter.{n}" for n in options}


# What may be written in other ways ----------------------------------------------------------------


@pytest.mark.parametrize(
    "targets",
    [{"q_proj", "v_proj"}, ("q_proj", "v_proj"), frozenset({"q_proj", "v_proj"}),
     {"q_proj": 1, "v_proj": 2}.keys(), (name for name in ("q_proj", "v_proj"))],
    ids=["set", "tuple", "frozenset", "keys", "generator"],
)  # fmt: skip
def test_any_collection_of_names_will_do(targets, tmp_path) -> None:
    tuned = qa.attach(quantized("llama", "none"), "lora", r=np.int64(4), target_modules=targets)
    set_randomly(tuned)
    qa.save(tuned, tmp_path)
    config = peft.PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert sorted(config.target_modules) == ["q_proj", "v_proj"]
    loaded = qa.load(tmp_path, base=quantized("llama", "none"))
    assert relative(logits(loaded), logits(tuned)) < 1e-6


def test_peft_own_options_in_options_are_saved(tmp_path) -> None:
    blocks = peft.tuners.lora.config.BdLoraConfig(
        target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=2
    )
    targets = ["q_proj", "o_proj"]
    tuned = qa.attach(quantized(), "lora", r=4, target_modules=targets, use_bdlora=blocks)
    set_randomly(tuned)
    qa.save(tuned, tmp_path)
    loaded = qa.load(tmp_path, base=quantized())
    assert relative(logits(loaded), logits(tuned)) < 1e-6


def test_a_single_name_is_a_list_of_one() -> None:
    tuned = qa.attach(quantized(), "lora", modules_to_save="lm_head")
    assert tuned.peft_config["default"].modules_to_save == ["lm_head"]


def test_tokens_can_be_trained_beside() -> None:
    tuned = qa.attach(quantized(), "lora", trainable_token_indices=(5, 6))
    loss = tuned(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss
    loss.backward()
    names = {n for n, p in tuned.named_parameters() if p.grad is not None and "token" in n}
    assert len(names) == 1


# Before a run does any work -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Any:
    from quantadapt.testing.small_demo import small_model

    return small_model()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"init_lora_weights": "pissa", "r": 4096}, "needs a singular vector for each rank"),
        ({"use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 2}}, "matches neither"),
        ({"rank_pattern": {"foo": 3}}, "matches no layer that is adapted"),
        ({"layers_to_transform": [9]}, "there is no layer 9"),
        ({"target_modules": ["input_layernorm"]}, "names input_layernorm, which is no layer"),
        ({"init_lora_weights": "eva"}, "computed from data"),
        ({"init_lora_weights": "corda"}, "computed from data"),
    ],
)
def test_a_run_is_refused_before_a_weight_is_loaded(
    options, words, checkpoint, tmp_path, monkeypatch
) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a weight is loaded")

    monkeypatch.setattr("quantadapt.loading.reading.from_pretrained", load)
    monkeypatch.setattr("quantadapt.pipeline.base.quantize_plan", load)
    spec = qa.Spec(
        model=str(checkpoint), adapter={"name": "lora", **options}, output=str(tmp_path / "run")
    )
    with pytest.raises(PlanRefused, match=words):
        qa.run(spec)
    assert not (tmp_path / "run").exists()


def test_every_adapter_passes_without_weights(checkpoint) -> None:
    """Or nothing could be run: what wants values is not held against it."""
    from quantadapt.adapting.stage import check_adapter
    from quantadapt.planning import plan
    from quantadapt.registry import registry

    checked, problems = [], []
    for adapter in registry().adapters():
        spec = qa.Spec(model=str(checkpoint), backend="none", adapter=adapter.name)
        try:
            made = plan(spec, check_output=False)
        except PlanRefused as refused:
            problems += refused.problems
            continue
        check_adapter(made, None)
        checked.append(adapter.name)
    assert len(checked) > 30
    assert all(problem.rule for problem in problems)  # of the adapters themselves


@pytest.mark.slow
def test_without_weights_the_same_adapters_go_onto_experts_as_with_them(tmp_path) -> None:
    """DoRA among them, which PEFT alone does not put there."""
    from quantadapt.adapting.stage import check_adapter
    from quantadapt.planning import plan
    from quantadapt.registry import registry

    made_experts("gpt-oss").save_pretrained(tmp_path)
    reached: set[str] = set()
    for adapter in registry().adapters():
        try:
            spec = qa.Spec(model=str(tmp_path), backend="none", device="cpu", adapter=adapter.name)
            made = plan(spec, check_output=False)
        except PlanRefused:  # by its own rules
            continue
        model = qa.quantize(str(tmp_path), "none", device="cpu")
        right = refusal(qa.attach, model, adapter.name)
        assert refusal(check_adapter, made, None) == right, adapter.name
        reached |= set() if right else {adapter.name}
    assert reached == {"lora", "rslora", "dora"}


def refusal(call: Any, *arguments: Any) -> str:
    try:
        call(*arguments)
    except PlanRefused as error:
        return str(error)
    return ""


def test_what_peft_does_otherwise_to_conv1d_is_refused_or_told(tmp_path, recwarn) -> None:
    """GPT-2's layers: what is saved of them is compared with what stock PEFT makes of it."""
    from quantadapt.adapting.stage import check_adapter
    from quantadapt.planning import plan

    base = gpt2(tmp_path / "base")
    stock = AutoModelForCausalLM.from_pretrained
    for adapter, options in {"lora": {"init_lora_weights": "olora"}, "osf": {}}.items():
        options = {"target_modules": ["c_attn"], **options}
        with pytest.raises(PlanRefused, match=r"c_attn is a Conv1D"):
            qa.attach(qa.quantize(base, "none", device="cpu"), adapter, **options)
        spec = qa.Spec(model=base, backend="none", adapter={"name": adapter, **options})
        made = plan(spec, check_output=False)
        with pytest.raises(PlanRefused, match=r"c_attn is a Conv1D"):
            check_adapter(made, None)
    for adapter, told in {"loha": True, "oft": True, "lora": False, "vera": False}.items():
        recwarn.clear()
        model = qa.quantize(base, "hqq", device="cpu", group_size=None)
        qa.save(qa.attach(model, adapter, target_modules=["c_attn"]), tmp_path / adapter)
        assert told == any(w.category is TargetsWarning for w in recwarn.list)
        with pytest.raises(TypeError, match="Conv1D") if told else contextlib.nullcontext():
            PeftModel.from_pretrained(stock(base), str(tmp_path / adapter / "adapter"))
