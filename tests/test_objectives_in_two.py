"""Whatever is learnt, two processes learn it as one does from the same whole batches."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import in_processes

import quantadapt as qa
from quantadapt.distributed import world
from quantadapt.errors import PlanRefused
from quantadapt.machine import Machine
from quantadapt.planning import plan
from quantadapt.spec import Spec
from quantadapt.testing.small_demo import small_model

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
TEXTS = [{"text": f"After {word} comes " + f"the next number, {word}. " * i}
         for i, word in enumerate(WORDS, 1)]  # fmt: skip
PAIRS = [{"prompt": f"What comes after {word}?", "chosen": f"It is {word}. " * i,
          "rejected": "Nobody knows."} for i, word in enumerate(WORDS, 1)]  # fmt: skip
GROUPS = [{"anchor": f"the number {word}", "positive": f"{word} of them " * i,
           "negative": "a word"} for i, word in enumerate(WORDS, 1)]  # fmt: skip
SCORED = [{"sentence1": f"the number {word}", "sentence2": "a number", "score": i / 9}
          for i, word in enumerate(WORDS, 1)]  # fmt: skip
PASSAGES = [{"query": f"what is {word}", "passage": "a number " * i, "label": i % 2}
            for i, word in enumerate(WORDS, 1)]  # fmt: skip
WORDWISE = [{"tokens": row["text"].split()[:4], "tags": ["o", "number", "o", "o"]}
            for row in TEXTS]  # fmt: skip

CASES: dict[str, tuple[str | dict[str, Any], list[dict[str, Any]], dict[str, Any]]] = {
    "distill": ({"name": "distill", "alpha": 0.3}, TEXTS, {}),
    "pretrain": ("pretrain", TEXTS, {}),
    "embed-ranking": ("embed", GROUPS, {}),
    "embed-cosent": ("embed", SCORED, {}),
    "rerank": ("rerank", PASSAGES, {"head": "sequence", "labels": ["relevant"]}),
    "classify-tokens": ("classify-tokens", WORDWISE, {"head": "token", "labels": ["number", "o"]}),
    "orpo": ("orpo", PAIRS, {}),
    "reward": ("reward", PAIRS, {"head": "sequence", "labels": ["reward"]}),
}
WHOLE = ["distill", "pretrain", "embed-cosent", "rerank", "classify-tokens", "reward", "orpo"]
"""One of each kind of loss and of head."""
SHARED = ["distill", "pretrain", "embed-ranking"]
"""Those without a head of their own, which is not sharded."""


def train(folder: Path, name: str, parallel: str) -> dict[str, Any]:
    """Train on batches of eight in all; return what is logged, and the weights."""
    from quantadapt.sharding import shard

    objective, _, head = CASES[name]
    base = qa.quantize(str(folder / "model"), "hqq", device="cpu", dtype="float32", **head)
    if parallel == "fsdp":
        shard(base)
    model = qa.attach(base, "lora", r=4)
    for key, weight in model.named_parameters():  # B is not zero, so that A learns at once
        if "lora_B" in key:
            torch.nn.init.normal_(weight, std=0.02, generator=torch.Generator().manual_seed(1))
    for module in model.modules():  # a head for words has some, which is drawn per process
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    logs: list[dict[str, Any]] = []
    given = {"max_steps": 2, "logging_steps": 1, "learning_rate": 1e-3, "max_grad_norm": 0.0}
    qa.train(
        *(model, folder / f"{name}.jsonl"),
        objective=objective,
        max_length=32,
        on_log=logs.append,
        per_device_train_batch_size=4 // world().size,
        gradient_accumulation_steps=1 if name.startswith("embed") else 2,
        parallel=parallel,
        **given,
    )
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    steps = [[log[key] for key in ("loss", "grad_norm", "tokens")] for log in logs]
    return {"logs": steps, "weights": weights}


def work(folder: Path, names: list[str], parallel: str) -> dict[str, Any]:
    from quantadapt.distributed import start

    torch.set_num_threads(1)
    start("cpu")
    return {name: train(folder, name, parallel) for name in names}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    return filled(folder)


def filled(folder: Path) -> Path:
    """Put the model and everybody's data there."""
    (folder / "model").symlink_to(small_model(), target_is_directory=True)
    for name, (_, rows, _) in CASES.items():
        text = "".join(json.dumps(row) + "\n" for row in rows * 3)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def alone(folder) -> Callable[[str], dict[str, Any]]:
    """What one process comes to, by the name of a case."""
    return cache(lambda name: train(folder, name, "ddp"))


def assert_the_same(both: list[dict[str, Any]], name: str, expected: dict[str, Any]) -> None:
    one, other = (found[name]["weights"] for found in both)
    assert all(torch.equal(weight, other[key]) for key, weight in one.items())
    for found in both:
        logs, wanted = torch.tensor(found[name]["logs"]), torch.tensor(expected["logs"])
        torch.testing.assert_close(logs, wanted, rtol=1e-5, atol=1e-5)
    for key, weight in one.items():
        torch.testing.assert_close(weight, expected["weights"][key], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_an_objective_of_whole_batches(folder, alone) -> None:
    both = in_processes(2, work, folder, folder, ["embed-ranking"], "ddp")
    assert_the_same(both, "embed-ranking", alone("embed-ranking"))


@pytest.fixture(scope="module")
def two(folder) -> Callable[[str], list[dict[str, Any]]]:
    """What both processes come to, by how they share the work."""
    names = {"ddp": WHOLE, "fsdp": SHARED}
    return cache(lambda kind: in_processes(2, work, folder, folder, names[kind], kind))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", WHOLE)
def test_two_processes_learn_as_one(two, alone, name) -> None:
    assert_the_same(two("ddp"), name, alone(name))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SHARED)
def test_a_shared_base_learns_as_a_whole_one(two, alone, name) -> None:
    assert_the_same(two("fsdp"), name, alone(name))


@pytest.mark.parametrize(
    ("objective", "rule"),
    [
        ("rerank", "fsdp-head"),
        ("classify", "fsdp-head"),
        ("classify-tokens", "fsdp-head"),
        ("reward", "fsdp-head"),
        ({"name": "grpo", "rewards": ["json:valid"]}, "fsdp-generates"),
        ({"name": "rloo", "rewards": ["json:valid"]}, "fsdp-generates"),
    ],
)
def test_what_does_not_learn_on_a_shared_base_is_refused(objective, rule) -> None:
    spec = Spec(objective=objective, train={"parallel": "fsdp"})
    cards = Machine(cuda=((9, 0),) * 2)
    with pytest.raises(PlanRefused) as caught:
        plan(spec, machine=cards, processes=2, check_output=False)
    assert rule in [problem.rule for problem in caught.value.problems]
    assert all(problem.fix for problem in caught.value.problems)
