"""Two and four processes that share each row train as one does that has all of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_sizes import LLAMA_8B as LLAMA
from processes import in_processes

import quantadapt as qa
from quantadapt import demo
from quantadapt.errors import PlanRefused, QuantadaptError
from quantadapt.machine import Machine
from quantadapt.memory import GIB, Workload
from quantadapt.memory.shape import Shape
from quantadapt.objectives.dpo import DPO
from quantadapt.objectives.sft import SFT
from quantadapt.planning import plan
from quantadapt.planning.context_parallel import context_problems
from quantadapt.spec import Spec, TrainSpec

STEPS = 2
SIZES = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def made(kind: str, folder: Path) -> Path:
    """A tiny model with random weights, and the demo's tokenizer."""
    from transformers import (
        AutoTokenizer,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    from quantadapt import demo

    classes = {
        "llama": (LlamaForCausalLM, LlamaConfig),
        "qwen3": (Qwen3ForCausalLM, Qwen3Config),
    }
    torch.manual_seed(0)
    model, config = classes[kind]
    model(config(tie_word_embeddings=kind == "qwen3", **SIZES)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo.MODEL_DIR).save_pretrained(folder)
    return folder


def data() -> Any:
    """Rows of unequal length, of some of which only the last tokens count."""
    from datasets import Dataset

    made = torch.Generator().manual_seed(1)
    rows = [torch.randint(2048, (n,), generator=made).tolist() for n in (21, 9, 33, 14, 5, 26)]
    masks = [[int(i >= len(r) // 2 or k % 2) for i in range(len(r))] for k, r in enumerate(rows)]
    return Dataset.from_dict({"input_ids": rows, "completion_mask": masks})


def train(folder: Path, case: dict[str, Any], batch: int, output: Path) -> dict[str, Any]:
    from quantadapt.sharding import shard

    case = dict(case)
    backend, adapter = case.pop("backend", "hqq"), case.pop("adapter", "lora")
    base = qa.quantize(str(folder), backend, device="cpu", dtype="float32")
    if case.get("parallel") == "fsdp":
        shard(base)
    model = qa.attach(base, adapter, **case.pop("options", {"r": 4}))
    for name, weight in model.named_parameters():  # B is not zero, so that A learns at once
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05, generator=torch.Generator().manual_seed(2))
    logs: list[dict[str, Any]] = []
    given = {"max_steps": STEPS, "logging_steps": 1, "learning_rate": 3e-3, "max_grad_norm": 0.0}
    qa.train(
        *(model, data()),
        eval_data=data() if "eval_steps" in case else None,
        output=output,
        on_log=logs.append,
        per_device_train_batch_size=batch,
        **given | case,
    )
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    steps = [[log["loss"], log["grad_norm"], log["tokens"]] for log in logs if "loss" in log]
    measured = [log["eval_loss"] for log in logs if "eval_loss" in log]
    return {"logs": steps, "measured": measured, "weights": weights}


CASES: dict[str, dict[str, Any]] = {
    "llama": {"gradient_checkpointing": True},
    "qwen3": {
        "model": "qwen3",
        "backend": "bnb-nf4",
        "eval_steps": 2,
        "gradient_accumulation_steps": 2,
    },
    "fsdp": {"parallel": "fsdp", "gradient_checkpointing": True},
    "packed": {"packing": True},
    "resumed": {"save_steps": 1},
    "adalora": {"adapter": "adalora", "options": {"init_r": 6, "target_r": 3}},
}


def work(folder: Path, names: list[str], size: int) -> dict[str, Any]:
    from quantadapt.distributed import start, world

    start("cpu")
    groups = world().size // size
    found = {}
    for name in names:
        case = dict(CASES[name])
        given = case | {"context_parallel_size": size}
        given.pop("model", None)
        output = folder / f"{name}-{world().size}-{size}"
        found[name] = train(folder / case.get("model", "llama"), given, 2 // groups, output)
        if name == "resumed":
            if world().is_main:
                shutil.rmtree(output / "checkpoints" / f"checkpoint-{STEPS}")
            torch.distributed.barrier()
            again = train(folder / "llama", given | {"resume": True}, 2 // groups, output)
            assert len(again["logs"]) == 1
            found[name] |= {"weights": again["weights"]}
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("context")
    for kind in ("llama", "qwen3"):
        made(kind, folder / kind)
    return folder


@pytest.fixture(scope="module")
def alone(folder) -> Callable[[str], dict[str, Any]]:
    """What one process comes to, by the name of a case."""

    @cache
    def found(name: str) -> dict[str, Any]:
        case = CASES[name]
        given = {key: value for key, value in case.items() if key not in ("model", "parallel")}
        return train(folder / case.get("model", "llama"), given, 2, folder / name)

    return found


def assert_the_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    logs, wanted = torch.tensor(found["logs"]), torch.tensor(expected["logs"])
    torch.testing.assert_close(logs, wanted, rtol=1e-5, atol=1e-5)
    assert found["measured"] == pytest.approx(expected["measured"], rel=1e-5)
    for name, weight in found["weights"].items():
        torch.testing.assert_close(weight, expected["weights"][name], rtol=0, atol=1e-4)


QUICK = ["llama"]
TWO = ["qwen3", "fsdp", "adalora", "packed", "resumed"]


@pytest.mark.slow
def test_two_processes_share_each_row(folder, alone) -> None:
    for found in in_processes(2, work, folder, folder, QUICK, 2):
        assert_the_same(found["llama"], alone("llama"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("processes", "size", "names"),
    [(2, 2, TWO), (4, 2, ["fsdp"]), (4, 4, ["qwen3", "packed"])],
)
def test_groups_of_processes_share_each_row(folder, alone, processes, size, names) -> None:
    """With four that share, two heads of keys are fewer than processes."""
    for found in in_processes(processes, work, folder, folder, names, size):
        for name in names:
            assert_the_same(found[name], alone(name))


# What speaks against it ---------------------------------------------------------------------------


def refused(
    size: int = 4,
    processes: int = 4,
    task: Any = None,
    options: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
    longest: int = 8192,
    **config: Any,
) -> list[str | None]:
    spec = TrainSpec(context_parallel_size=size, **train or {})
    found = context_problems(
        *(spec, task or SFT(), LLAMA | config, options or {}),
        processes=processes,
        longest=longest,
    )
    assert all(problem.fix and problem.where for problem in found)
    return [problem.rule for problem in found]


@pytest.mark.parametrize(
    ("given", "rules"),
    [
        ({}, []),
        ({"processes": 8}, []),  # two groups of four
        ({"size": 1, "processes": 3, "num_attention_heads": 7}, []),
        ({"processes": 6}, ["context-processes"]),
        ({"processes": 1}, ["context-processes"]),
        ({"num_attention_heads": 28, "num_key_value_heads": 4}, []),
        ({"num_attention_heads": 30, "num_key_value_heads": 10}, ["context-heads"]),
        ({"num_attention_heads": 24, "num_key_value_heads": 6}, ["context-heads"]),
        ({"num_attention_heads": 24, "num_key_value_heads": 2}, []),  # each key head twice
        ({"task": DPO()}, ["context-by-token"]),
        ({"train": {"packing": True}}, []),
        ({"options": {"alora_invocation_tokens": [1]}}, ["context-whole-row"]),
        ({"sliding_window": 4096}, ["context-plain-attention"]),
        ({"sliding_window": 4096, "longest": 4096}, []),
        ({"sliding_window": 4096, "use_sliding_window": False}, []),
        ({"sliding_window": 64, "layer_types": ["full_attention"] * 32}, []),
        ({"sliding_window": 64, "layer_types": ["sliding_attention"]}, ["context-plain-attention"]),
        ({"layer_types": ["linear_attention"]}, ["context-plain-attention"]),
        ({"rope_scaling": {"rope_type": "dynamic"}}, ["context-plain-attention"]),
        ({"rope_scaling": {"rope_type": "llama3"}}, []),
        ({"rope_parameters": {"full_attention": {"rope_type": "longrope"}}},
         ["context-plain-attention"]),
        ({"is_encoder_decoder": True}, ["context-plain-attention"]),
        ({"output_router_logits": True}, ["context-plain-attention"]),
        ({"attn_logit_softcapping": 50.0}, ["context-plain-attention"]),
        ({"processes": 3, "task": DPO()}, ["context-processes", "context-by-token"]),
    ],
)  # fmt: skip
def test_what_cannot_be_shared_out_is_refused(given, rules) -> None:
    assert refused(**given) == rules


def test_heads_that_do_not_divide_are_told_with_what_would(tmp_path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(LLAMA | {"num_attention_heads": 6, "num_key_value_heads": 6})
    )
    spec = Spec(model=str(tmp_path), train={"context_parallel_size": 4})
    cards = Machine(cuda=((9, 0),) * 4)
    with pytest.raises(PlanRefused) as caught:
        plan(spec, machine=cards, processes=4, check_output=False, weights=False)
    (problem,) = caught.value.problems
    assert problem.what == "the model has 6 attention heads, which 4 GPUs cannot share out"
    assert problem.fix == "use 2 or 3"


def test_a_window_has_to_hold_a_packed_row(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"sliding_window": 4096}))
    cards = Machine(cuda=((9, 0),) * 4)
    refusals = {}
    for packing in (True, 8192):
        spec = Spec(
            model=str(tmp_path),
            data={"max_length": 4096},
            train={"context_parallel_size": 4, "packing": packing},
        )
        try:
            plan(spec, machine=cards, processes=4, check_output=False, weights=False)
        except PlanRefused as error:
            refusals[packing] = [problem.what for problem in error.problems]
    what = "a row cannot be shared out: layers see 4,096 tokens back, and rows have up to 8,192"
    assert refusals == {8192: [what]}


def ways_out(folder: Path, **config: Any) -> str:
    """Say what a plan advises where a row of 128k tokens is too long for a card of 12 GiB."""
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text(json.dumps(LLAMA | config))
    spec = Spec(
        model=str(folder / "model"),
        backend="bnb-nf4",
        data={"path": str(demo.TRAIN_FILE), "max_length": 131072},
        train={"per_device_train_batch_size": 1},
        evaluate={"unquantized": False},
        output=str(folder / "run"),
    )
    cards = Machine(cuda=((9, 0),), memory=(12 * GIB,))
    with pytest.raises(PlanRefused) as caught:
        plan(spec, machine=cards, processes=1, weights=False)
    return str(caught.value)


def test_a_row_that_is_too_long_for_a_card_is_advised_to_be_shared(tmp_path) -> None:
    assert "train.context_parallel_size: 4 on 4 GPUs" in ways_out(tmp_path)
    assert "context_parallel_size" not in ways_out(tmp_path, num_attention_heads=33)


def test_python_refuses_it_as_the_plan_does(folder) -> None:
    model = qa.attach(qa.quantize(str(folder / "llama"), "none"), "lora", r=2)
    with pytest.raises(PlanRefused, match="2 GPUs share a row, and there is one"):
        qa.train(model, data(), context_parallel_size=2)


def unlike(folder: Path, other: str) -> str:
    """Train a model whose tokens meet elsewhere than in attention, or do not know their places."""
    from quantadapt.distributed import start

    start("cpu")
    model = qa.attach(qa.quantize(str(folder / "llama"), "none"), "lora", r=2)
    decoder = model.get_base_model().model
    if other == "mixes":
        decoder.layers[0].mlp.register_forward_pre_hook(lambda _, args: (args[0].cumsum(1),))
    elif other == "counts for itself":
        own = decoder.rotary_emb.forward
        decoder.rotary_emb.forward = lambda x, position_ids: own(
            x, position_ids - position_ids[:, :1]
        )
    else:
        model.get_base_model().set_attn_implementation("eager")
    try:
        qa.train(model, data(), max_steps=1, context_parallel_size=2)
    except QuantadaptError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("other", "told"),
    [
        ("mixes", "LlamaForCausalLM predicts otherwise from parts of a row"),
        ("counts for itself", "LlamaForCausalLM predicts otherwise from parts of a row"),
        ("eager", "its attention is not that of torch"),
    ],
)
def test_what_no_config_tells_is_tried_out(folder, other, told) -> None:
    for found in in_processes(2, unlike, folder, folder, other):
        assert told in found


def test_a_part_of_each_row_is_what_memory_is_planned_for() -> None:
    shape = Shape.of(LLAMA)
    bits = dict.fromkeys(shape.linears, 4.5)
    whole = Workload(shape, bits, ("q_proj",), 16, "adamw_torch", 2, 1, 65536)
    part, short = replace(whole, contexts=4), replace(whole, length=16384)
    setting = whole.settings()[0]
    assert part.peak(setting) == short.peak(setting) < whole.peak(setting)
    assert replace(part, length=65537).peak(setting) > part.peak(setting)
