"""Predicted memory of mixtures of experts: against real models, and against what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import transformers
from allocations import left_by, peak_of

import quantadapt as qa
from quantadapt import demo
from quantadapt.adapting.merge_aware import make_merge_aware
from quantadapt.machine import Machine
from quantadapt.memory import GIB, WORKSPACE, Setting, Workload, usable
from quantadapt.memory.cost import step_cost
from quantadapt.memory.experts import STACKS, part_of
from quantadapt.memory.phases import phases
from quantadapt.memory.shape import Shape
from quantadapt.planning import plan
from quantadapt.protocols import Grid
from quantadapt.spec import Spec
from quantadapt.training.lent import fused_layers, recomputed

NF4 = 4.127
QWEN3_30B = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "rms_norm_eps": 1e-6,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
DENSE_FIRST = {"num_hidden_layers": 4, "first_k_dense_replace": 1}
SHARED = {"shared_expert_intermediate_size": 5632, "decoder_sparse_step": 2}
FAMILIES = {
    "Qwen3MoeConfig": {"num_hidden_layers": 2, "head_dim": 128},
    "Qwen2MoeConfig": {"num_hidden_layers": 4, **SHARED},
    "MixtralConfig": {"num_hidden_layers": 2},
    "OlmoeConfig": {"num_hidden_layers": 2},
    "GptOssConfig": {"num_hidden_layers": 2, "num_local_experts": 32},
    "DeepseekV3Config": DENSE_FIRST,
    "DeepseekV2Config": DENSE_FIRST | {"q_lora_rank": None, "num_experts_per_tok": 6},
    "GraniteMoeConfig": {"num_hidden_layers": 2, "num_local_experts": 8},
    "Glm4MoeConfig": DENSE_FIRST | {"head_dim": 128},
}
"""Real sizes and few layers."""
TOKENS = 4 * 2048
ROWS = 8 * TOKENS


def work(layers: int = 12, **options) -> Workload:
    """What benchmarks/experts.py trains: LoRA of rank 16 on attention and experts, Liger."""
    shape = Shape.of(QWEN3_30B | {"num_hidden_layers": layers})
    bits = dict.fromkeys(shape.linears, NF4)
    sizes = {"dtype_bytes": 2, "batch": 4, "length": 2048}
    return Workload(shape, bits, tuple(shape.linears), 16, "adamw_torch", **(sizes | options))


# --- against measurements (one H200, bnb-nf4, Liger's kernels, 12 layers) -------------------------


def test_the_peak_is_that_which_was_measured() -> None:
    assert work().peak(Setting(12, False, 4)) / GIB == pytest.approx(9.01, rel=0.05)


def test_a_loaded_model_is_as_large_as_was_measured() -> None:
    made = work()
    assert made.trained == 160_628_736
    loaded = made.quantized_bytes + made.dense_bytes + 4 * made.trained
    assert loaded / GIB == pytest.approx(5.37, rel=0.01)


@pytest.mark.parametrize(("layers", "measured"), [(48, 17.21), (24, 13.44)])
def test_whole_models_take_what_was_measured(layers: int, measured: float) -> None:
    """Qwen3-30B-A3B and gpt-oss-20b, 1 x 2048, LoRA on attention, every layer recomputed, recorded
    as CUDA graphs."""
    config = transformers.GptOssConfig(num_local_experts=32, num_hidden_layers=24).to_dict()
    shape = Shape.of(QWEN3_30B if layers == 48 else config)
    assert shape.layers == layers
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    made = replace(work(graphs=True), shape=shape, targets=attention, batch=1)
    assert made.peak(Setting(layers, False, 1)) / GIB == pytest.approx(measured, rel=0.02)
    if layers == 24:
        loaded = made.quantized_bytes + made.dense_bytes + 4 * made.trained
        assert loaded / GIB == pytest.approx(11.70, rel=0.005)


# --- against the sizes of real models -------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_those_of_the_real_model(family) -> None:
    """All of them but biases and small norms; each layer by its sizes."""
    config = getattr(transformers, family)(**FAMILIES[family])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shape = Shape.of(config.to_dict())
    found = Workload(shape, {}, (), 0, "sgd", 4, 1, 1)
    assert found.unquantized_bytes / 4 == pytest.approx(
        sum(p.numel() for p in model.parameters()), rel=3e-4
    )
    known = shape.linears | (shape.of_plain_layers.linears if shape.plain_layers else {})
    sizes = {(m.in_features, m.out_features) for m in model.modules() if type(m) is torch.nn.Linear}
    routers_and_head = {(shape.hidden, n) for n in (1, shape.experts.count, shape.vocab)}
    assert sizes - routers_and_head == {s for n, s in known.items() if n not in STACKS}
    first, second = (known[name] for name in STACKS)
    stacks = [p for n, p in model.named_parameters() if ".experts." in n and p.ndim == 3]
    assert {p.numel() for p in stacks} == {first[0] * first[1], second[0] * second[1]}
    assert len(stacks) == 2 * (shape.layers - shape.plain_layers)


def test_lora_on_a_stack_is_one_on_each_expert() -> None:
    stacks = replace(work(1), targets=STACKS)
    assert stacks.trained == 128 * 16 * ((2048 + 2 * 768) + (768 + 2048))
    assert replace(work(1), targets=("q_proj",)).trained == 16 * (2048 + 4096)


# --- what a pass keeps and works with -------------------------------------------------------------


def test_experts_keep_their_input_alone_unless_autograd_sees_their_products() -> None:
    parts = work(8).parts(Setting(0, False, 4))
    attention = 4 * 2048 + 3 * (4096 + 512)  # with queries and keys before their norms
    routing, scores = 4 * 128 + 30 * 8, 4 * 32
    low = 4 * 16  # x Aᵀ of attention's adapters
    assert parts["activations"] == 8 * TOKENS * (2 * (attention + low) + routing + scores)
    weights = 3 * 128 * 2048 * 768
    ranks = 12 * 2 * 16 * ROWS * 2  # what A makes of the rows of both stacks, recomputed or not
    for count in (12, 5, 0):
        setting = Setting(count, False, 4)
        whole = work(accumulates=True)  # gradients are there at all times
        alone = replace(whole, targets=("q_proj",))
        inputs = [made.parts(setting)["inputs"] for made in (whole, alone)]
        assert inputs[0] - inputs[1] == ranks
    assert work(accumulates=True).parts(Setting(11, True, 4))["inputs"] == 2 * TOKENS * 2 * 2048
    norms = 12 * 4 * 128 * (2 * 768 + 2048)  # DoRA's, in float32, in each setting
    for setting in (Setting(12, False, 4), Setting(0, False, 4), Setting(11, True, 4)):
        both = (work(dora=dora, accumulates=True) for dora in (True, False))
        kept = [made.parts(setting)["inputs"] for made in both]
        assert kept[0] - kept[1] == norms
    assert work(8, dora=True).kept_bytes(TOKENS) == work(8).kept_bytes(TOKENS)
    alone = replace(work(8, dora=True), targets=("q_proj",))
    assert alone.kept_bytes(TOKENS) == work(8).kept_bytes(TOKENS)
    dense = work(8, dense=STACKS).kept_bytes(TOKENS) - work(8).kept_bytes(TOKENS)
    assert dense == 2 * (ROWS * (2 * 2048 + 4 * 768) + weights - TOKENS * 2048)


def test_the_backward_of_experts_holds_one_dequantized_stack_and_their_rows() -> None:
    hidden, first, second = TOKENS * 2 * 2048, 2 * 128 * 2048 * 768, 128 * 2048 * 768
    again, inside = ROWS * (2048 + 2 * 768) + first, ROWS * (2 * 2048 + 3 * 768) + second
    assert work().backward_bytes(TOKENS) == 2 * (hidden + max(again, inside))
    twice = max(again, inside + 2 * 768 * ROWS, ROWS * (3 * 2048 + 5 * 768))  # the first product
    assert work(dora=True).backward_bytes(TOKENS) == 2 * (hidden + twice)
    few = 64
    assert work().backward_bytes(few) == 2 * (few * (2 * 2048 + 8 * (2048 + 2 * 768)) + first)
    offloaded = work().parts(Setting(11, True, 4))
    rotary = 2 * 2 * 128 * 2048
    assert offloaded["working"] == work().backward_bytes(TOKENS) + rotary + 2 * WORKSPACE


def test_layers_without_experts_count_as_what_they_are() -> None:
    config = QWEN3_30B | {"num_hidden_layers": 6, "mlp_only_layers": [0, 1]}
    shape = Shape.of(config)
    assert shape.plain_layers == 2
    names = shape.linears | shape.of_plain_layers.linears
    mixed = Workload(shape, dict.fromkeys(names, 16.0), tuple(names), 16, "sgd", 2, 1, 64)
    sparse, plain = (
        2 * sum(i * o for i, o in s.linears.values()) for s in (shape, shape.of_plain_layers)
    )
    assert mixed.quantized_bytes == 4 * sparse + 2 * plain
    assert mixed.block_bytes == sparse
    assert mixed.parts(Setting(5, False, 1))["activations"] > 0


def test_rounding_a_stack_takes_two_of_it_in_float32() -> None:
    """Of a LoRA, which is fused; what else is adapted waits, rounded, for its backward."""
    first = 2 * 128 * 2048 * 768
    few = replace(work(rounds=True), targets=("q_proj",))
    for setting in (Setting(12, False, 4), Setting(0, False, 4)):
        plain = work(accumulates=True).peak(setting)
        # what A makes of rows, kept where nothing is rounded; attention's where none comes again
        ranks = 12 * 2 * 16 * ROWS * 2
        ranks += 0 if setting.recomputed_layers else 12 * 4 * 16 * TOKENS * 2
        assert work(rounds=True, accumulates=True).peak(setting) - plain == 8 * first - ranks
        assert few.peak(setting) - work().peak(setting) < 8 * 2048 * 4096
    dora = work(rounds=True, dora=True).kept_bytes(TOKENS) - work(dora=True).kept_bytes(TOKENS)
    attention = 2048 * (2 * 4096 + 2 * 512)
    assert dora == 4 * (first + first // 2) + 2 * attention


@pytest.mark.parametrize("fused", [True, False])
def test_a_layer_rounds_within_what_is_foreseen(fused) -> None:
    """Counted on the CPU, without the numbers of a step that one kernel on CUDA does not write."""
    torch.manual_seed(0)
    rows, columns, tokens = 768, 512, 16
    linear = torch.nn.Linear(columns, rows, bias=False)
    model = torch.nn.Sequential(linear)
    options = {} if fused else {"use_dora": True}
    model = qa.attach(qa.quantize(model, "bnb-nf4"), "lora", target_modules=["0"], **options)
    make_merge_aware(model)
    x = torch.randn(tokens, columns)
    model(x).sum().backward()  # what is made once

    def rounded(self, start, change):
        return start + change

    with patch.object(Grid, "dithered", rounded):
        found = peak_of(lambda: model(x).sum().backward())
    shape = SimpleNamespace(linears={"q_proj": (columns, rows)})
    foreseen = Workload(shape, {}, ("q_proj",), 8, "sgd", 4, 1, 1, rounds=True, dora=not fused)
    weight = 4 * rows * columns
    most = foreseen._rounding_bytes + weight + (0 if fused else foreseen._rounded_bytes)
    assert 0.5 * most < found < 1.1 * most, found / weight


SMALL = {"hidden_size": 128, "num_hidden_layers": 3, "vocab_size": 64}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
SIXTEEN = {"num_experts": 16, "num_experts_per_tok": 4}
MEASURED = {
    "MixtralConfig": {"intermediate_size": 256},
    "Qwen3MoeConfig": {"moe_intermediate_size": 96, "head_dim": 32, **SIXTEEN},
    "OlmoeConfig": {"intermediate_size": 128, **SIXTEEN},
}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recomputed_layers", [0, 3])
@pytest.mark.parametrize("on_experts", [False, True])
@pytest.mark.parametrize("family", MEASURED)
def test_a_step_takes_what_is_foreseen(family, on_experts, recomputed_layers, dtype) -> None:
    """All that forward and backward allocate of 4 x 512 tokens, without the loss. Without kernels,
    too, what stands between the products of experts works on a few rows at a time."""
    torch.manual_seed(0)
    config = getattr(transformers, family)(**SMALL, **MEASURED[family])
    model = transformers.AutoModelForCausalLM.from_config(config)
    chosen = {} if on_experts else {"target_modules": list(ATTENTION)}
    base = qa.quantize(model, "bnb-nf4", device="cpu", dtype=dtype)
    tuned = qa.attach(base, "lora", r=8, **chosen)
    ids = torch.randint(3, 60, (4, 512))
    trained = [p for p in tuned.parameters() if p.requires_grad]

    def step() -> None:
        decoder = tuned.get_base_model().model
        decoder(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()
        for parameter in trained:
            parameter.grad = None

    setting = Setting(recomputed_layers, False, 4)
    with fused_layers(tuned), recomputed(tuned, setting, draws=False):
        step()
        step()
        found = peak_of(step)
    shape = Shape.of(config.to_dict())
    targets = tuple(shape.linears) if on_experts else ATTENTION
    sizes = {"dtype_bytes": 4 if dtype == "float32" else 2, "batch": 4, "length": 512}
    made = Workload(shape, dict.fromkeys(shape.linears, NF4), targets, 8, "sgd", **sizes)
    made = replace(made, fused_adapter=True, fused_kernels=False)
    most = max(
        phase.total - 2 * WORKSPACE for phase in phases(made, setting) if phase.name != "loss"
    )
    # In 16 bits a norm works with float32, which is a large part of a model as narrow as this.
    assert found == pytest.approx(most, rel=0.05 if dtype == "float32" else 0.11)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("on_experts", [False, True])
@pytest.mark.parametrize("family", MEASURED)
def test_dense_experts_keep_what_is_foreseen(family, on_experts, dtype) -> None:
    """As transformers computes them: their rows and weights only where they are adapted."""
    torch.manual_seed(0)
    config = getattr(transformers, family)(**SMALL, **MEASURED[family])
    model = transformers.AutoModelForCausalLM.from_config(config)
    chosen = {} if on_experts else {"target_modules": list(ATTENTION)}
    base = qa.quantize(model, "none", device="cpu", dtype=dtype)
    tuned = qa.attach(base, "lora", r=8, **chosen)
    ids, held = torch.randint(3, 60, (4, 512)), list[torch.Tensor]()

    def forward() -> None:
        decoder = tuned.get_base_model().model
        held.append(decoder(input_ids=ids, use_cache=False).last_hidden_state.sum())

    with fused_layers(tuned):
        forward()
        held.clear()
        found = left_by(forward)
    shape = Shape.of(config.to_dict())
    targets = tuple(shape.linears) if on_experts else ATTENTION
    sizes = {"dtype_bytes": 4 if dtype == "float32" else 2, "batch": 4, "length": 512}
    made = Workload(shape, {}, targets, 8, "sgd", **sizes, dense=STACKS)
    made = replace(made, fused_adapter=True, fused_kernels=False)
    kept = made.kept_bytes(2048) + made.low_bytes(2048)
    assert found == pytest.approx(3 * kept, rel=0.03)


# --- what is chosen ------------------------------------------------------------------------------


def test_of_what_fits_no_micro_batches_are_taken_that_dequantize_all_experts_twice() -> None:
    """What Unsloth takes of memory, 9.06 GiB. Most layers recomputed at the whole batch cost half
    of what the same does in two micro-batches, or with inputs in CPU memory and stacks in parts."""
    made, budget = work(in_parts=True, graphs=True), int(9.06 * GIB)
    eager = replace(made, graphs=False)
    # Recorded, the same takes more than there is.
    assert made.fitted(budget) == (eager, Setting(10, False, 4))
    assert made.needed(Setting(12, False, 4)) > budget
    assert eager.peak(Setting(9, False, 4)) > budget
    costs = [
        step_cost(eager, s) / 1e12
        for s in (Setting(10, False, 4), Setting(8, False, 2), Setting(12, True, 4))
    ]
    # Of layers that are recomputed attention, too, of 2,048 tokens a row.
    again = [n * 1.5 * TOKENS * 2048 * 4096 / 1e12 for n in (10, 8, 12)]
    without = [22.1, 35.2, 39.6]
    assert costs == pytest.approx([w + a for w, a in zip(without, again, strict=True)], rel=0.01)
    # By hand: attention and experts, a product each, and 300 a number that is dequantized.
    attention, experts = 2048 * (2 * 4096 + 2 * 512), 3 * 128 * 2048 * 768
    once = attention * (TOKENS + 300) + experts * (ROWS / 128 + 300)
    assert step_cost(eager, Setting(0, False, 4)) == pytest.approx(12 * 2 * once)
    twice = attention * (TOKENS / 2 + 300) + experts * (ROWS / 256 + 300)
    assert 2 * twice / once == pytest.approx(1.30, rel=0.01)
    plain = replace(made, dense=(*made.shape.linears,))  # nothing is dequantized
    half, whole = (step_cost(plain, Setting(0, False, size)) for size in (2, 4))
    assert half == whole


def test_a_stack_is_read_in_parts_only_where_that_takes_less() -> None:
    """A part of the second stack with what it makes takes more than all of it, for 65,536 rows."""
    each, made = 2048 * 768, 2048
    assert part_of(2 * each, 128, ROWS, 2 * 768, 2) == 42
    assert part_of(each, 128, ROWS, made, 2) is None
    assert 85 * each + ROWS * made * 85 // 128 > 128 * each
    assert part_of(each, 128, ROWS // 4, made, 2) == 85
    for setting in work(in_parts=True).settings():
        assert work(in_parts=True).peak(setting) <= work().peak(setting)


# --- in the plan ----------------------------------------------------------------------------------


def planned(tmp_path, config=QWEN3_30B, gib=24.0, backend="bnb-nf4", **adapter):
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    spec = Spec(
        model=str(folder),
        backend=backend,
        adapter={"name": "lora", "r": 16, **adapter},
        data={"path": str(demo.TRAIN_FILE), "max_length": 2048},
        train={"per_device_train_batch_size": 1},
        evaluate={"unquantized": False},
        output=str(tmp_path / "run"),
    )
    card = Machine(cuda=((9, 0),), memory=(int(gib * GIB),))
    return plan(spec, machine=card, weights=False).memory.work


def test_what_the_adapter_names_decides_what_is_trained(tmp_path) -> None:
    attention = 48 * 16 * (2 * (2048 + 4096) + 2 * (2048 + 512))
    stacks = 48 * replace(work(1), targets=STACKS).trained

    def trained(gib=80.0, **options):
        return planned(tmp_path, gib=gib, **options).trained

    assert trained() == attention + stacks
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert trained(target_modules=names) == attention
    assert trained(target_modules=[*names, "experts"]) == attention + stacks
    assert trained(target_parameters=["experts.gate_up_proj"], target_modules=names) > attention
    assert trained(target_modules=r".*self_attn\.[qkvo]_proj") == attention
    assert trained(target_modules=r".*\.experts\.(gate_up|down)_proj") == stacks


def test_a_backend_that_leaves_experts_dense_needs_their_memory(tmp_path) -> None:
    dense = planned(tmp_path, gib=141, backend="none")
    assert dense.quantized_bytes == pytest.approx(2 * 48 * 623e6, rel=0.01)
    quantized = planned(tmp_path, gib=141)
    assert quantized.dense == ()
    assert quantized.quantized_bytes == pytest.approx(48 * 623e6 * NF4 / 8, rel=0.01)


def test_a_card_of_24_gib_is_answered_for(tmp_path) -> None:
    made = planned(tmp_path, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    setting = made.fit(usable(24 * GIB))
    assert setting is not None
    assert 16 < made.peak(setting) / GIB < 22


def test_experts_of_a_kind_that_is_not_known_are_not_read() -> None:
    assert Shape.of(QWEN3_30B | {"model_type": "other_moe"}) is None
    assert Shape.of({k: v for k, v in QWEN3_30B.items() if k != "num_experts_per_tok"}) is None
