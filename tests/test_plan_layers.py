"""What a plan says of layers without making the model: as the model itself has them, and in the
words of a run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_experts_backends import BASE, EXPERTS, FAMILIES, LOCAL, MOE, dense_model, fresh
from torch import nn

import quantadapt as qa
from quantadapt.errors import PlanRefused, Problem
from quantadapt.planning.combining import UNKNOWN_LAYERS
from quantadapt.planning.layers import Layers, layers_of
from quantadapt.planning.on_disk import config_of
from quantadapt.planning.targets import on_embeddings
from quantadapt.quantizing.dense import share_of
from quantadapt.registry import registry

DENSE = {
    "Llama": ("LlamaConfig", {}),
    "Phi-3": ("Phi3Config", {}),
    "GPT-NeoX": ("GPTNeoXConfig", {}),
    "Gemma-2": ("Gemma2Config", {"head_dim": 16}),
    "Starcoder-2": ("Starcoder2Config", {}),
    "MiniMax-M2": ("MiniMaxM2Config", {**LOCAL, "head_dim": 16}),
    "Phi-MoE": ("PhimoeConfig", LOCAL),
}
OTHERS = {
    "Hunyuan-3": ("HYV3Config", {**MOE, "head_dim": 16}),  # shared experts have two names
    "GPT-2": ("GPT2Config", {"n_embd": 64, "n_layer": 1, "n_head": 4}),
    "Falcon": ("FalconConfig", {}),
    "Nemotron-H": FAMILIES["Nemotron-H"],
}
KNOWN = [*(family for family in FAMILIES if family not in OTHERS), *DENSE]
ODD = {
    **BASE,
    **MOE,
    "vocab_size": 131,
    "head_dim": 16,
    "moe_intermediate_size": 72,
    "num_hidden_layers": 3,
}


def model_of(family: str) -> Any:
    if family in FAMILIES:
        return dense_model(family)
    kind, own = {**DENSE, **OTHERS}[family]
    config = getattr(transformers, kind)(**{**BASE, **own}, pad_token_id=0)
    return transformers.AutoModelForCausalLM.from_config(config)


def saved(model: Any, folder: Path, **options: Any) -> str:
    model.save_pretrained(folder, **options)
    return str(folder)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**ODD, mlp_only_layers=[0], pad_token_id=0)
    return saved(transformers.Qwen3MoeForCausalLM(config), tmp_path_factory.mktemp("odd"))


def own_layers(model: Any) -> tuple[dict[str, Any], dict[str, Any], set[str]]:
    """Return what is quantized of a model, and its routers, as transformers and torch tell."""
    blocks = {n: m for n, m in model.named_modules() if ".layers." in n}
    routers = {n for n, m in blocks.items() if "Router" in type(m).__name__}
    chosen = (*routers, "shared_expert_gate", "router.layer")  # JetMoE's are layers
    linears = {
        n: (m.in_features, m.out_features)
        for n, m in blocks.items()
        if isinstance(m, nn.Linear) and not n.endswith(tuple(chosen))
    }
    stacks = {}
    for name, p in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if p.ndim == 3 and hasattr(owner, "num_experts"):
            transposed = getattr(owner, "is_transposed", "Llama4" in type(owner).__name__)
            rows, columns = p.shape[1:] if not transposed else (p.shape[2], p.shape[1])
            stacks[name] = columns, p.shape[0] * rows
    return linears, stacks, routers


def no_layers(model: Any, stacks: dict[str, Any]) -> set[str]:
    """Return the modules that hold others, or vectors alone, but for what owns a stack."""
    owners, found = {name.rpartition(".")[0] for name in stacks}, set()
    inside = tuple(f"{owner}." for owner in owners)
    for name, module in model.named_modules():
        own = [p.ndim for p in module.parameters(recurse=False)]
        parts = [p for child in module.children() for p in child.parameters()]
        if name and (parts or (own and max(own) < 2)) and not name.startswith(inside):
            found.add(name)
    return found - owners


def looked_at(model: Any, folder: Path, **options: Any) -> Layers:
    source = saved(model, folder, **options)
    layers = layers_of(config_of(source) or {}, folder)
    assert layers is not None
    return layers


@pytest.mark.parametrize("family", KNOWN)
def test_files_tell_what_layers_the_model_has(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    layers = looked_at(model, tmp_path)
    linears, stacks, routers = own_layers(model)
    assert (layers.linears, layers.stacks) == (linears, stacks)
    if family != "JetMoE":  # whose routers are modules of a layer
        assert set(layers.routers) == routers
    assert {*layers.others} == no_layers(model, stacks)
    held = {n for n, m in model.named_modules() if n and next(m.parameters(), None) is not None}
    assert held <= set(layers.names)
    assert {n for n, _ in model.named_parameters()} <= layers.parameters | {"lm_head.weight"}


def test_shards_tell_it_as_well(tmp_path: Path) -> None:
    model = model_of("Qwen3-MoE")
    layers = looked_at(model, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert (layers.linears, layers.stacks) == own_layers(model)[:2]


@pytest.mark.parametrize(
    "family",
    ["Mixtral", "Qwen3-MoE", "gpt-oss", "DeepSeek-V3", "OLMoE", "GLM-4-MoE", "Llama"],
)
def test_the_config_alone_tells_sizes(family: str) -> None:
    """Of each kind of layer; what experts that are shared are called, it does not."""
    model = model_of(family)
    layers = layers_of(model.config.to_dict(), None)
    assert layers is not None
    assert not layers.names
    linears, stacks, _ = own_layers(model)

    def sizes(found: dict[str, Any]) -> set[Any]:
        return {(name.rpartition(".")[2], size) for name, size in found.items()}

    assert sizes({**layers.linears}) == sizes(linears)
    assert layers.stacks == stacks


@pytest.mark.parametrize("family", OTHERS)
def test_of_other_models_nothing_is_said(family: str, tmp_path: Path) -> None:
    source = saved(model_of(family), tmp_path)
    assert layers_of(config_of(source) or {}, tmp_path) is None
    made = qa.plan(qa.Spec(model=source, backend="hqq", adapter={"target_modules": ["nothing"]}))
    assert made.notes.count(UNKNOWN_LAYERS) == 1
    made = qa.plan(qa.Spec(model=source, backend="hqq"))
    assert UNKNOWN_LAYERS not in made.notes


# --- in the words of a run ------------------------------------------------------------------------


def refused(source: str, backend: Any, adapter: Any = "lora", **more: Any) -> list[Problem]:
    with pytest.raises(PlanRefused) as caught:
        qa.plan(qa.Spec(model=source, backend=backend, adapter=adapter, **more))
    return list(caught.value.problems)


@pytest.mark.parametrize(
    "backend",
    [
        {"name": "eetq"},
        {"name": "torchao-intx", "group_size": 128},
        {"name": "gptq"},
        {"name": "compressed-tensors"},
        {"name": "mxfp4"},
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_the_plan_as_by_the_run(
    odd: str, backend: dict[str, Any]
) -> None:
    """The run looks at the model, as `quantize` does at a live one."""
    torch.manual_seed(0)
    live = transformers.AutoModelForCausalLM.from_pretrained(odd)
    text = [{"input_ids": torch.ones(1, 128, dtype=torch.int64)}]
    name, options = backend["name"], {k: v for k, v in backend.items() if k != "name"}
    with pytest.raises(PlanRefused) as caught:
        qa.quantize(live, name, device="cpu", calibration=text, **options)
    found = refused(odd, backend, data={"calibration_path": None})
    assert found == list(caught.value.problems)
    assert any("experts.down_proj" in problem.where for problem in found)
    qa.plan(qa.Spec(model=odd, backend=backend, skip_misfits=True))


@pytest.mark.filterwarnings("ignore::quantadapt.quantizing.dense.MostlyDenseWarning")
def test_what_does_not_fit_and_stays_dense_is_in_the_share(odd: str) -> None:
    plan = qa.plan(qa.Spec(model=odd, backend="eetq", skip_misfits=True))
    model = qa.quantize(odd, "eetq", device="cpu", skip_misfits=True)
    found = share_of(model, ("lm_head",))
    assert plan.share is not None
    assert (plan.share.quantized, {**plan.share.dense}) == (found.quantized, {**found.dense})
    assert found.dense["experts"] == 2 * EXPERTS * 64 * 72


def test_a_config_without_weights_is_enough_for_sizes(odd: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((Path(odd) / "config.json").read_bytes())
    spec = qa.Spec(model=str(tmp_path), backend="eetq")
    with pytest.raises(PlanRefused) as caught:
        qa.plan(spec, weights=False)
    assert any("experts.down_proj" in problem.where for problem in caught.value.problems)


def test_what_is_left_dense_needs_not_fit(odd: str) -> None:
    qa.plan(qa.Spec(model=odd, backend="eetq", skip_modules=["lm_head", "experts"]))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_prj"]},
        {"target_modules": ["q_proj", "gate", "nothing"], "exclude_modules": ["expert"]},
        {"target_modules": r".*\.mlp\.gate"},
        {"target_modules": "q_proj, v_proj"},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_heads"]},
        {"target_modules": ["q_proj"], "target_parameters": ["gate.weights"]},
    ],
    ids=str,
)
def test_names_that_nothing_has_are_refused_by_the_plan_as_by_the_run(
    odd: str, options: dict[str, Any]
) -> None:
    """The run attaches to a model without weights; here to a live one."""
    found = refused(odd, "hqq", {"name": "lora", **options})
    model = qa.quantize(odd, "hqq", device="cpu", group_size=None)
    with pytest.raises(PlanRefused) as caught:
        qa.attach(model, "lora", **options)
    assert found
    told = [(p.what, p.fix, p.where) for p in caught.value.problems]
    # A router is told once what is named is there; the plan tells all.
    own = [p for p in found if (p.what, p.fix, p.where) in told or p.rule == "no-routers"]
    assert len(told) <= len(found)
    assert own == found


@pytest.mark.parametrize("family", ["JetMoE", "Mixtral", "Llama"])
def test_modules_that_are_no_layers_are_refused_by_the_plan_as_by_the_run(
    family: str, tmp_path: Path
) -> None:
    """Whatever a model calls its modules; and what the run takes, the plan takes."""
    source = saved(model_of(family), tmp_path)
    model = qa.quantize(source, "none", device="cpu")
    endings = {n.rpartition(".")[2]: m for n, m in model.named_modules() if n}
    kinds = {"taken": 0, "refused": 0}
    for name in [n for n, m in endings.items() if any(True for _ in m.parameters())]:
        options = {"target_modules": [name]}
        try:
            qa.attach(model, "lora", **options).unload()
        except PlanRefused as error:
            told = [(p.what, p.fix, p.where) for p in error.problems]
            found = refused(source, "none", {"name": "lora", **options})
            assert [(p.what, p.fix, p.where) for p in found] == told, name
            kinds["refused"] += 1
        else:
            qa.plan(qa.Spec(model=source, backend="none", adapter={"name": "lora", **options}))
            kinds["taken"] += 1
    assert kinds["taken"] > 3
    assert kinds["refused"] > 5


@pytest.mark.parametrize("adapter", [a.name for a in registry().adapters()])
def test_adapters_that_do_not_go_onto_embeddings_are_told_by_the_plan_as_by_the_run(
    adapter: str, tmp_path: Path
) -> None:
    """And those that do go there."""
    record = registry().adapter(adapter)
    if any(rule.id == f"{adapter}-not-supported" for rule in record.rules) or adapter == "adamss":
        return  # on no layer at all; or more clusters than there are numbers here
    source = saved(model_of("Llama"), tmp_path)
    small = {"c3a": {"block_size": 8}, "vblora": {"vector_length": 8}, "road": {"group_size": 8}}
    ranks = {"pissa": {"r": 4}, "adalora": {"init_r": 4, "target_r": 2}}
    options = {"target_modules": ["q_proj", "embed_tokens"], **{**small, **ranks}.get(adapter, {})}
    spec = qa.Spec(model=source, backend="none", adapter={"name": adapter, **options})
    model = qa.quantize(source, "none", device="cpu")
    if on_embeddings(record, record.defaults):
        qa.plan(spec)
        tuned = qa.attach(model, adapter, **options)
        assert type(tuned.get_input_embeddings()) is not nn.Embedding
        return
    (problem,) = refused(source, "none", {"name": adapter, **options})
    assert "target_modules names embed_tokens, which is no layer" in problem.what
    with pytest.raises(PlanRefused) as caught:
        qa.attach(model, adapter, **options)
    assert [(p.what, p.fix) for p in caught.value.problems] == [(problem.what, problem.fix)]


def test_a_pattern_that_takes_in_a_whole_module_is_refused_as_well(tmp_path: Path) -> None:
    source = saved(model_of("JetMoE"), tmp_path)
    (problem,) = refused(source, "hqq", {"target_modules": r".*self_attention(\..*proj)?"})
    assert problem.what == "model.layers.0.self_attention is no layer, but a module of several"
    assert problem.fix == "name its layers: input_linear, kv_proj, output_linear"
    fine = {"target_modules": r".*self_attention\..*proj"}
    qa.plan(qa.Spec(model=source, backend="hqq", adapter=fine))


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3-MoE", "gpt-oss", "GraniteMoE", "Qwen2-MoE"])
def test_what_can_be_named_is_planned(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    source = saved(model, tmp_path)
    parts = {"Mixtral": ["w1", "w2", "w3"], "gpt-oss": ["down_proj"], "GraniteMoE": ["down_proj"]}
    for targets in (
        ["q_proj", "experts"],
        ["gate_up_proj"],
        ["lm_head", "k_proj"],
        ["model.layers.0.self_attn.q_proj"],
        [*parts.get(family, ["gate_proj", "up_proj", "down_proj"]), "v_proj"],
        r".*self_attn\.(q|v)_proj",
        r"model\.layers\.\d+\..*experts",
    ):
        qa.plan(qa.Spec(model=source, backend="hqq", adapter={"target_modules": targets}))
    for module in ("rotary_emb", "activation_fn", "resid_attn_dropout", "act_fn"):
        adapter = {"target_modules": ["q_proj"], "exclude_modules": [module]}
        qa.plan(qa.Spec(model=source, backend="hqq", adapter=adapter))  # in no file
    router = next(n for n, m in model.named_modules() if "Router" in type(m).__name__)
    named = {"target_modules": ["q_proj"], "target_parameters": [f"{router}.weight"]}
    qa.plan(qa.Spec(model=source, backend="hqq", adapter=named))
    whole = {"target_modules": ["q_proj"], "modules_to_save": [router.rpartition(".")[2]]}
    qa.plan(qa.Spec(model=source, backend="hqq", adapter=whole))


@pytest.mark.parametrize(
    "options", [{}, {"target_modules": ["gate_up_proj"]}, {"target_modules": ["q_proj", "w1"]}]
)
def test_adapters_that_do_not_go_onto_experts_are_told_where_those_are_named(
    options: dict[str, Any], tmp_path: Path
) -> None:
    source = saved(model_of("Mixtral"), tmp_path)
    (problem,) = refused(source, "hqq", {"name": "pissa", **options})
    assert problem.rule == "pissa-experts"
    for fine in ({"target_modules": ["q_proj"]}, {"exclude_modules": ["experts"]}):
        qa.plan(qa.Spec(model=source, backend="hqq", adapter={"name": "pissa", **fine}))


@pytest.mark.parametrize("backend", ["hqq", "compressed-tensors"])
def test_experts_that_are_quantized_already_can_be_named(backend: str, tmp_path: Path) -> None:
    """hqq's as stacks, those of compressed-tensors one by one."""
    options = {"group_size": 32} if backend == "compressed-tensors" else {}
    model = qa.quantize(fresh("Mixtral"), backend, device="cpu", **options)
    source = saved(model, tmp_path)
    again = qa.quantize(source, backend, device="cpu")
    for options in (
        {"target_modules": ["q_proj", "gate_up_proj"]},
        {"target_modules": ["w1", "w2", "w3"]},
        {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
    ):
        qa.plan(qa.Spec(model=source, backend=backend, adapter={"name": "lora", **options}))
        qa.attach(again, "lora", **options).unload()
    assert refused(source, backend, {"name": "pissa"})[0].rule == "pissa-experts"


def test_experts_in_mxfp4_are_stacks_too(tmp_path: Path) -> None:
    """gpt-oss, as it is published."""
    from safetensors.torch import save_file

    config = transformers.GptOssConfig(
        **{**BASE, **LOCAL, "head_dim": 16, "layer_types": ["full_attention"]}
    )
    config.save_pretrained(tmp_path)
    place, codes = "model.layers.0.mlp.experts", torch.uint8
    save_file(
        {
            f"{place}.gate_up_proj_blocks": torch.zeros(4, 256, 2, 16, dtype=codes),
            f"{place}.gate_up_proj_scales": torch.zeros(4, 256, 2, dtype=codes),
            f"{place}.down_proj_blocks": torch.zeros(4, 64, 4, 16, dtype=codes),
            f"{place}.down_proj_scales": torch.zeros(4, 64, 4, dtype=codes),
        },
        tmp_path / "model.safetensors",
    )
    layers = layers_of(config.to_dict(), tmp_path)
    assert layers is not None
    expected = {"gate_up_proj": (64, 4 * 256), "down_proj": (128, 4 * 64)}
    assert layers.stacks == {f"{place}.{name}": size for name, size in expected.items()}


def test_no_backend_imports_torch_to_say_what_fits(odd: str) -> None:
    """Or a plan would take seconds."""
    code = f"""
import sys
import quantadapt as qa
from quantadapt.errors import QuantadaptError
from quantadapt.registry.discovery import registry
told = 0
for backend in registry().backends():
    try:
        qa.plan(qa.Spec(model={odd!r}, backend=backend.name, device="cpu"))
    except QuantadaptError as error:
        told += "divide" in str(error)
assert told > 4, told
sys.exit("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not re.search("Traceback", done.stderr)
