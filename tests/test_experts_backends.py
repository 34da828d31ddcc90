"""Experts on every backend: a stack is quantized as each of its experts by itself would be, it is
saved and loaded, calibrated on what is routed to it, and made of checkpoints that hold experts one
by one."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from parameters import slow_but
from safetensors.torch import load_file, save_file
from torch import nn

import quantadapt as qa
from quantadapt.calibration.experts import ExpertsWarning, close_experts, open_experts
from quantadapt.errors import PlanRefused, QuantadaptError
from quantadapt.facade import facades, stack_facades
from quantadapt.loading import WrongTensors
from quantadapt.model.experts import expert_stacks
from quantadapt.registry.discovery import registry

HIDDEN, INNER, EXPERTS = 64, 128, 4
BASE = {
    "vocab_size": 128,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}
MOE = {"moe_intermediate_size": 64, "num_experts": EXPERTS, "num_experts_per_tok": 2}
ROUTED = {
    "moe_intermediate_size": 64,
    "n_routed_experts": EXPERTS,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "head_dim": 16,
}
LOCAL = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}
LATENT = {"kv_lora_rank": 64, "q_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16}
DELTA = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
MAMBA = {
    "num_hidden_layers": 2,
    "layers_block_type": ["attention", "moe"],
    "moe_shared_expert_intermediate_size": 64,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "ssm_state_size": 16,
    "n_groups": 2,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral": ("MixtralConfig", LOCAL),
    "Qwen3-MoE": ("Qwen3MoeConfig", {**MOE, "head_dim": 16}),
    "gpt-oss": ("GptOssConfig", {**LOCAL, "head_dim": 16, "layer_types": ["full_attention"]}),
    "DeepSeek-V3": (
        "DeepseekV3Config",
        {**ROUTED, **LATENT, "v_head_dim": 16, "first_k_dense_replace": 0},
    ),
    "Qwen2-MoE": ("Qwen2MoeConfig", {**MOE, "shared_expert_intermediate_size": 64}),
    "OLMoE": ("OlmoeConfig", {"num_experts": EXPERTS, "num_experts_per_tok": 2}),
    "GraniteMoE": ("GraniteMoeConfig", LOCAL),
    "GLM-4-MoE": ("Glm4MoeConfig", {**ROUTED, "first_k_dense_replace": 0}),
    "Qwen3-Next": ("Qwen3NextConfig", {**MOE, **DELTA, "shared_expert_intermediate_size": 64}),
    "Llama-4": ("Llama4TextConfig", {**LOCAL, "num_experts_per_tok": 1, "head_dim": 16}),
    "Nemotron-H": ("NemotronHConfig", {**ROUTED, **MAMBA}),
    "JetMoE": ("JetMoeConfig", {**LOCAL, "kv_channels": 16}),
}
LAYERWISE: dict[str, dict[str, Any]] = {
    "hqq": {},
    "hqq 8 bits": {"bits": 8},
    "hqq 3 bits": {"bits": 3},
    "hqq 2 bits": {"bits": 2, "group_size": 32},
    "bnb-nf4": {"double_quant": False},
    "bnb-nf4 nested": {},
    "bnb-fp4": {"double_quant": False},
    "bnb-int8": {},
    "torchao-int8": {},
    "torchao-int4": {"group_size": 32},
    "torchao-intx": {"bits": 3, "group_size": 32},
    "torchao-fp8": {},
    "quanto": {},
    "quanto int4": {"weights": "int4"},
    "quanto int2": {"weights": "int2"},
    "quanto float8": {"weights": "float8"},
    "eetq": {},
    "mxfp4": {},
    "nvfp4": {},
    "inc": {"method": "rtn", "group_size": 32},
    "compressed-tensors": {"group_size": 32},
    "compressed-tensors W8A8": {"scheme": "W8A8"},
    "compressed-tensors NVFP4A16": {"scheme": "NVFP4A16"},
    "finegrained-fp8": {"weight_block_size": (32, 32)},
}
CALIBRATE = ("gptq", "awq", "autoround", "aqlm")
FIRST = tuple({name.split()[0]: name for name in reversed(LAYERWISE)}.values())
"""One of each backend."""
TOGETHER = ("hqq", "bnb-nf4 nested", "compressed-tensors NVFP4A16")
"""What ends its search by the error of a whole weight, or scales the scales of one together."""


def quantizer_of(name: str, **options: Any) -> Any:
    given = options or LAYERWISE.get(name, {})
    return registry().backend(name.split()[0]).quantizer(**given)


@cache
def dense_model(family: str) -> Any:
    import transformers

    torch.manual_seed(0)
    kind, own = FAMILIES[family]
    config = getattr(transformers, kind)(**{**BASE, **own}, pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.ndim > 1:
            parameter.normal_(0, 0.1)
    return model


def fresh(family: str) -> Any:
    import copy

    return copy.deepcopy(dense_model(family))


@cache
def _folder(family: str, parent: str) -> str:
    path = Path(parent) / family
    dense_model(family).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: Any) -> Any:
    """The path of a checkpoint of a family."""
    parent = str(tmp_path_factory.mktemp("mixtures"))
    return lambda family: _folder(family, parent)


def tokens(seed: int = 0, rows: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


def examples(count: int = 8, length: int = 64) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": tokens(n, 1, length)} for n in range(count)]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=tokens()).logits.float()
    return found


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def expert_weights(stored: torch.Tensor, transposed: bool = False) -> list[torch.Tensor]:
    return [one.t() if transposed else one for one in stored]


def linear_of(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    return linear


def test_no_backend_that_quantizes_experts_is_left_out() -> None:
    """Of this file's tests."""
    named = {name.split()[0] for name in LAYERWISE} | {*CALIBRATE}
    own = {b.name for b in registry().backends() if quantizer_of(b.name).quantizes_experts}
    assert own == named


# Layer by layer --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", slow_but(LAYERWISE, *FIRST))
@pytest.mark.parametrize("family", slow_but(["Mixtral", "gpt-oss"], "gpt-oss"))
def test_a_stack_is_what_its_experts_would_be(family: str, backend: str) -> None:
    """Each expert dequantizes to what the backend makes of an nn.Linear of that expert alone."""
    quantizer = quantizer_of(backend)
    model = quantizer.quantize(fresh(family), device="cpu", dtype=torch.float32)
    dense = dict(dense_model(family).named_parameters())
    from quantadapt.facade import wrap

    found = dict(stack_facades(wrap(model, quantizer.target, torch.float32)))
    assert len(found) == 2
    for name, facade in found.items():
        ours = expert_weights(facade.weight.detach() + 0, family == "gpt-oss")
        for mine, weight in zip(
            ours, expert_weights(dense[name], family == "gpt-oss"), strict=True
        ):
            alone = quantizer.target.dequantize(quantizer.quantize_linear(linear_of(weight)))
            if backend.startswith(TOGETHER):
                error, best = apart(mine, weight), apart(alone.float(), weight)
                assert error < 1.02 * best + 1e-6
            else:
                assert torch.equal(mine, alone.to(mine.dtype)), backend


def _share(model: Any) -> float:
    kinds = (nn.Embedding,)
    outside = {id(p) for m in model.modules() if isinstance(m, kinds) for p in m.parameters()}
    outside |= {id(p) for p in model.get_output_embeddings().parameters()}
    packed = sum(f.in_features * f.out_features for _, f in facades(model))
    inside = {id(p) for _, f in facades(model) for p in f.parameters()}
    dense = sum(p.numel() for p in model.parameters() if id(p) not in outside | inside)
    return packed / (packed + dense)


@pytest.mark.parametrize("backend", slow_but(LAYERWISE, "hqq"))
@pytest.mark.parametrize("family", FAMILIES)
def test_share_of_weights_quantized(family: str, backend: str) -> None:
    """At least 95% of what is neither embedding nor head."""
    options = LAYERWISE[backend]
    misfits = backend == "eetq" and family in ("Qwen3-Next", "DeepSeek-V3", "Qwen2-MoE")
    model = qa.quantize(fresh(family), backend=backend.split()[0], skip_misfits=misfits, **options)
    assert _share(model) > (0.8 if misfits else 0.95)


def test_sizes_that_do_not_fit_are_told() -> None:
    """EETQ packs tiles of 64 x 64: stacks are named with the layers."""
    import transformers

    sizes = {**BASE, "intermediate_size": 72}
    model = transformers.AutoModelForCausalLM.from_config(transformers.OlmoeConfig(**sizes))
    with pytest.raises(PlanRefused, match=r"experts\.down_proj"):
        qa.quantize(model, backend="eetq")
    left = qa.quantize(model, backend="eetq", skip_misfits=True)
    assert [name.rpartition(".")[2] for name, _ in stack_facades(left)] == ["gate_up_proj"]


@pytest.mark.parametrize(
    "backend",
    slow_but(
        [b for b in LAYERWISE if b.startswith(("bnb", "torchao"))], "bnb-nf4 nested", "torchao-int4"
    ),
)
def test_native_checkpoints_hold_stacks(backend: str, folder: Any, tmp_path: Path) -> None:
    """What transformers loads by itself is loaded by it still, and the stacks beside."""
    from transformers import AutoModelForCausalLM

    model = qa.quantize(folder("Mixtral"), backend=backend.split()[0], **LAYERWISE[backend])
    qa.save(model, tmp_path / "saved")
    again = qa.load(tmp_path / "saved")
    stacks = dict(stack_facades(again))
    assert len(stacks) == 2
    for name, facade in stack_facades(model):
        assert torch.equal(stacks[name].dequantize(), facade.dequantize())
    assert torch.equal(logits(again), logits(model))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    target = model.quantadapt.quantizer.target
    name = "model.layers.0.self_attn.q_proj"
    ours = target.dequantize(model.get_submodule(name).vendor)
    assert torch.equal(target.dequantize(stock.get_submodule(name)).float(), ours.float())


# Calibrated ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"Llama-4", "JetMoE"}))
def test_experts_taken_apart_compute_the_same(family: str) -> None:
    model, before = fresh(family), logits(dense_model(family))
    wanted = {name: p.clone() for name, p in model.named_parameters() if p.ndim == 3}
    opened = open_experts(model, ("lm_head",), lambda *sizes: None)
    assert len(opened) == len(list(expert_stacks(dense_model(family), ())))
    assert apart(logits(model), before) < 1e-5
    made: dict[str, torch.Tensor] = {}

    def join(one: Any, layers: list[Any]) -> nn.Module:
        made[one.stack.name] = one.stack.stored(torch.cat([layer.weight for layer in layers]))
        return nn.Identity()

    close_experts(model, opened, join)
    for name, weight in made.items():
        assert torch.equal(weight, wanted[name])
    assert not any(re.search(r"experts\.\d", name) for name, _ in model.named_modules())


def _routed(model: Any, layer: int, shown: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """Return what each expert gets in stock transformers: [tokens, hidden]."""
    got: list[list[torch.Tensor]] = [[] for _ in range(EXPERTS)]

    def see(_: Any, args: Any, kwargs: Any) -> None:
        hidden, index = args[0], args[1]
        for expert in range(EXPERTS):
            got[expert].append(hidden[(index == expert).any(-1)])

    experts = model.model.layers[layer].mlp.experts
    hook = experts.register_forward_pre_hook(see, with_kwargs=True)
    with torch.no_grad():
        for example in shown:
            model(**example)
    hook.remove()
    return [torch.cat(rows) for rows in got]


@pytest.mark.parametrize(("backend", "options"), [("gptq", {"group_size": 32}), ("awq", {})])
def test_each_expert_is_calibrated_on_its_tokens(backend: str, options: Any) -> None:
    """As the backend calibrates an nn.Linear of that expert on these very inputs."""
    options = {"group_size": 32, **options}
    model = qa.quantize(fresh("Mixtral"), backend=backend, calibration=examples(), **options)
    stack = dict(stack_facades(model))["model.layers.0.mlp.experts.gate_up_proj"]
    rows = _routed(fresh("Mixtral"), 0, examples())
    dense = dict(dense_model("Mixtral").named_parameters())[
        "model.layers.0.mlp.experts.gate_up_proj"
    ]
    quantizer, differ, nearer = quantizer_of(backend, **options), 0.0, 0.0
    for expert, inputs in enumerate(rows):
        alone = nn.Sequential(linear_of(dense[expert, :INNER]))
        shown = [{"input": inputs}]
        made = quantizer.quantize(
            alone, device="cpu", dtype=torch.float32, calibration=shown, skip_modules=()
        )
        wanted = quantizer.target.dequantize(made[0]).float()
        ours = stack.by_expert()[expert, :INNER]
        differ = max(differ, float((ours - wanted).abs().gt(1e-3).float().mean()))
        rounded = quantizer.target.dequantize(
            quantizer.quantize_linear(linear_of(dense[expert, :INNER]))
        )
        nearer = max(nearer, float((rounded.float() - wanted).abs().gt(1e-3).float().mean()))
    assert differ < 0.01 < 0.1 < nearer  # another order of sums; rounding alone is far off


@pytest.mark.parametrize(
    "backend", slow_but(["gptq", "awq", "autoround", "inc", "aqlm"], "gptq", "inc")
)
def test_calibrating_backends_save_and_load(backend: str, folder: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "gptq": {"group_size": 32, "sym": False},
        "awq": {"group_size": 32},
        "autoround": {"group_size": 32, "iters": 2},
        "inc": {},
        "aqlm": {"nbits_per_codebook": 4, "max_epochs": 1, "init_max_iter": 3},
    }[backend]
    for family in ("Mixtral", "gpt-oss"):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            model = qa.quantize(folder(family), backend=backend, calibration=examples(), **options)
        assert any(issubclass(w.category, ExpertsWarning) for w in told) == (backend == "inc")
        assert len(list(stack_facades(model))) == 2
        assert _share(model) > 0.95
        saved = tmp_path / family
        qa.save(model, saved)
        assert torch.equal(logits(qa.load(saved)), logits(model))


def test_act_order_leaves_stacks_in_order(folder: Any) -> None:
    """An order of columns of its own for each expert would not fit into one tall layer."""
    shown = {"calibration": examples(), "group_size": 32}
    model = qa.quantize(folder("Mixtral"), backend="gptq", desc_act=True, **shown)
    for name, facade in facades(model):
        order = facade.vendor.g_idx
        assert torch.equal(order, order.sort().values) == ("experts" in name)


def test_an_expert_without_tokens_is_told_and_shown_all() -> None:
    """It is calibrated on all tokens of its block, and not on none."""
    model = fresh("Mixtral")
    gate = model.model.layers[0].mlp.gate
    gate.weight.zero_()  # all tokens go to the first two
    before = model.model.layers[0].mlp.experts.gate_up_proj.clone()
    few = examples(4)
    with pytest.warns(ExpertsWarning, match=r"2 of 4 experts .*2 see none"):
        made = qa.quantize(model, backend="gptq", group_size=32, calibration=few)
    rows = torch.cat(_routed_all(few))
    quantizer = quantizer_of("gptq", group_size=32)
    alone = quantizer.quantize(
        nn.Sequential(linear_of(before[3, :INNER])),
        device="cpu",
        dtype=torch.float32,
        calibration=[{"input": rows}],
        skip_modules=(),
    )
    stack = dict(stack_facades(made))["model.layers.0.mlp.experts.gate_up_proj"]
    wanted = quantizer.target.dequantize(alone[0]).float()
    assert (stack.by_expert()[3, :INNER] - wanted).abs().gt(1e-3).float().mean() < 0.01


def _routed_all(shown: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    model, got = fresh("Mixtral"), []
    model.model.layers[0].mlp.gate.weight.zero_()
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda _, args: got.append(args[0]))
    with torch.no_grad():
        for example in shown:
            model(**example)
    return got


def test_experts_that_a_model_runs_itself_are_rounded_and_told() -> None:
    with pytest.warns(ExpertsWarning, match="2 stacks of experts are rounded"):
        model = qa.quantize(
            fresh("Llama-4"), backend="gptq", group_size=32, calibration=examples(2)
        )
    assert _share(model) > 0.95


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("torchao-int8", {}),
        ("quanto", {"weights": "int8"}),
        ("gptq", {"group_size": 32, "bits": 8}),
        ("autoround", {"group_size": 32, "bits": 8, "iters": 1}),
    ],
)
def test_adapters_learn_and_stacks_are_written(backend: str, options: Any) -> None:
    """LoRA on experts starts at zero and gets the gradients that it has on the dequantized model;
    a stack that is written anew holds what was written."""
    import copy

    from quantadapt.facade import densify

    shown = {"calibration": examples(2)} if backend in ("gptq", "autoround") else {}
    model = qa.quantize(fresh("Mixtral"), backend=backend, **shown, **options)
    name, stack = next(stack_facades(model))
    written = stack.dequantize().flip(0)
    stack.write(written)
    assert apart(stack.dequantize(), written) < 0.02
    gradients = []
    for base in (model, densify(copy.deepcopy(model))):
        torch.manual_seed(0)
        tuned = qa.attach(base, "lora", r=4, target_modules=[], target_parameters=[name])
        before = logits(tuned)
        for key, parameter in sorted(tuned.named_parameters()):
            if "lora_B" in key:
                parameter.data.normal_(0, 0.1)
        tuned.train()(input_ids=tokens()).logits.float().square().mean().backward()
        grads = [p.grad for _, p in sorted(tuned.named_parameters()) if p.grad is not None]
        gradients.append([before, *grads])
    assert len(gradients[0]) == 3
    for ours, dense in zip(*gradients, strict=True):
        assert apart(ours, dense) < 1e-5


# One by one ------------------------------------------------------------------------------------

ONE_BY_ONE: dict[str, dict[str, Any]] = {
    "gptq": {"group_size": 32},
    "awq": {"group_size": 32},
    "autoround": {"group_size": 32, "bits": 3},
    "bnb-nf4": {},
    "bnb-fp4": {"double_quant": False},
    "bnb-int8": {},
    "mxfp4": {},
    "nvfp4": {},
}


def _one_by_one(source: str, path: Path, backend: str) -> dict[str, torch.Tensor]:
    """Write a checkpoint whose layers are quantized each by itself, experts as others write them;
    return what each dequantizes to."""
    quantizer = quantizer_of(backend, **ONE_BY_ONE[backend])
    tensors, weights = {}, {}
    for name, tensor in load_file(f"{source}/model.safetensors").items():
        if tensor.ndim < 2 or re.search(r"embed|lm_head|norm|(moe|mlp)\.gate\.", name):
            tensors[name] = tensor
            continue
        made = quantizer.quantize_linear(linear_of(tensor))
        weights[name] = quantizer.target.dequantize(made).float().contiguous()
        if backend == "gptq":
            from quantadapt_gptqmodel.codes import add_to_packed

            made.qzeros = add_to_packed(made.qzeros, made.bits, -1)
        state = made.state_dict()
        tensors |= {f"{name[:-6]}{key}": value.contiguous() for key, value in state.items()}
    path.mkdir()
    save_file(
        {k: v.clone() for k, v in tensors.items()}, path / "model.safetensors", {"format": "pt"}
    )
    config = json.loads(Path(source, "config.json").read_text())
    config["quantization_config"] = quantizer.quantization_config()
    (path / "config.json").write_text(json.dumps(config, default=str))
    return weights


@pytest.mark.parametrize("backend", ONE_BY_ONE)
@pytest.mark.parametrize("family", ["Mixtral", "Qwen3-MoE"])
def test_experts_one_by_one_become_stacks(
    family: str, backend: str, folder: Any, tmp_path: Path
) -> None:
    weights = _one_by_one(folder(family), tmp_path / "base", backend)
    model = qa.quantize(tmp_path / "base", backend=backend)
    stacks = {name.rpartition(".")[2]: f for name, f in stack_facades(model)}
    parts = ("w1", "w3", "w2") if family == "Mixtral" else ("gate_proj", "up_proj", "down_proj")
    for n in range(EXPERTS):
        gate, up, down = (
            next(w for k, w in weights.items() if k.endswith(f"experts.{n}.{part}.weight"))
            for part in parts
        )
        assert torch.equal(stacks["gate_up_proj"].by_expert()[n].float(), torch.cat([gate, up]))
        assert torch.equal(stacks["down_proj"].by_expert()[n].float(), down)
    qa.save(model, tmp_path / "saved")
    assert torch.equal(logits(qa.load(tmp_path / "saved")), logits(model))


@pytest.mark.parametrize("part", ["", "w1", "w2", "w3"])
@pytest.mark.parametrize("expert", [2, EXPERTS - 1])
@pytest.mark.parametrize("packed", ["", "gptq", "bnb-nf4"])
def test_a_missing_expert_is_named(
    packed: str, expert: int, part: str, folder: Any, tmp_path: Path
) -> None:
    """The last one, too, without which what is there stacks to a smaller parameter."""
    base, stem = tmp_path / "base", f"experts.{expert}.{part}"
    if packed:
        _one_by_one(folder("Mixtral"), base, packed)
    else:
        shutil.copytree(folder("Mixtral"), base)
    file = base / "model.safetensors"
    left = {name: t for name, t in load_file(file).items() if stem not in name}
    save_file(left, file, {"format": "pt"})
    with pytest.raises(WrongTensors) as caught:
        qa.quantize(base, backend=packed or "hqq")
    (problem,) = caught.value.problems
    state = "is not whole" if part else "is missing"
    assert problem.what.startswith(f"expert {expert} of layer 0 {state}: it has no ")
    for name in (part,) if part else ("w1", "w2", "w3"):
        assert f".experts.{expert}.{name}" in problem.what
    assert "shape" not in problem.what


def test_all_that_is_missing_of_experts_is_told(folder: Any, tmp_path: Path) -> None:
    shutil.copytree(folder("Qwen3-MoE"), tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    lost = re.compile(r"experts\.(3\.|1\.up_proj)")
    left = {name: t for name, t in load_file(file).items() if not lost.search(name)}
    save_file(left, file, {"format": "pt"})
    with pytest.raises(WrongTensors) as caught:
        qa.quantize(tmp_path / "base", backend="none")
    whats = [problem.what.partition(":")[0] for problem in caught.value.problems]
    assert sorted(whats) == [
        "expert 1 of layer 0 is not whole",
        "expert 3 of layer 0 is missing",
    ]


@pytest.mark.parametrize("backend", ["none", "hqq"])
def test_layers_that_the_model_has_no_place_for_do_not_hide_what_is_missing(
    backend: str, folder: Any, tmp_path: Path
) -> None:
    """Such as those of DeepSeek's that predict further tokens."""
    shutil.copytree(folder("Qwen3-MoE"), tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    whole = load_file(file)
    first = {n: t for n, t in whole.items() if "layers.0." in n}
    more = {n.replace("layers.0.", "layers.9."): t.clone() for n, t in first.items()}
    cut = {n: t for n, t in (whole | more).items() if "layers.0.mlp.experts.3." not in n}
    save_file(cut, file, {"format": "pt"})
    with pytest.raises(WrongTensors) as caught:
        qa.quantize(tmp_path / "base", backend=backend)
    whats = [problem.what for problem in caught.value.problems]
    assert any(what.startswith("expert 3 of layer 0 is missing") for what in whats)
    assert not any("layer 9" in what for what in whats)


def test_experts_in_orders_of_their_own_are_refused(folder: Any, tmp_path: Path) -> None:
    _one_by_one(folder("Mixtral"), tmp_path / "base", "gptq")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("experts.1.w1.g_idx"))
    tensors[name] = tensors[name].flip(0)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(QuantadaptError, match="desc_act: false"):
        qa.quantize(tmp_path / "base", backend="gptq")
