"""A run that is killed in the middle of training, and resumed, ends as one that was not."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

import quantadapt as qa
from quantadapt.folders.run_folder import RunFolder
from quantadapt.spec import Spec

STEPS, EVERY = 6, 3
"""Steps, and those between checkpoints: answers that grpo uses twice go on over the first of
them."""

REWARD = """
def vowels(completions, **_):
    return [sum(letter in "aeiou" for letter in text) / (len(text) + 1) for text in completions]
"""
ROWS: dict[str, Any] = {
    "judged": lambda i: {"prompt": f"{i}?", "completion": "yes " * (1 + i % 3), "label": i % 2},
    "groups": lambda i: {"anchor": f"number {i}", "positive": str(i), "negative": str(i + 1)},
    "asked": lambda i: {"prompt": f"Say {i}."},
    "texts": lambda i: {"text": f"Line {i}. " * (1 + i % 3)},
}
OWN = ("seconds", "tokens", "peak_memory")
"""Begin the names of what a process counts from its own beginning."""
DRAWN = {"rewards": ["rewards.py:vowels"], "num_generations": 2, "max_completion_length": 4}
OBJECTIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("asked", {**DRAWN, "num_iterations": 2, "beta": 0.1}),
    "kto": ("judged", {}),
    "embed": ("groups", {}),
    "distill": ("texts", {}),
    "pretrain": ("texts", {}),
}
"""Those that keep more than weights from step to step, or read data as they go; of the others
`test_resume` has some."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: Any) -> Path:
    from quantadapt.testing.small_demo import small_model

    folder = tmp_path_factory.mktemp("small")
    (folder / "rewards.py").write_text(REWARD)
    for kind, row in ROWS.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in range(24)))
    shutil.copytree(small_model(), folder / "model")
    return folder


def spec_of(small: Path, objective: str, output: Path, **more: Any) -> Spec:
    kind, options = OBJECTIVES[objective]
    if "rewards" in options:
        options = {**options, "rewards": [f"{small / 'rewards.py'}:vowels"]}
    steps = {"max_steps": STEPS, "save_steps": EVERY, "logging_steps": 1, "learning_rate": 1e-2}
    return Spec(
        model=str(small / "model"),
        backend="hqq",
        adapter={"name": "lora", "r": 2, "lora_dropout": 0.1},
        objective={"name": objective, **options},
        data={"path": str(small / f"{kind}.jsonl"), "max_length": 16},
        evaluate={"evaluations": [], "samples": 0, "unquantized": False},
        export={"merge": "never"},
        device="cpu",
        output=str(output),
        train={**steps, "per_device_train_batch_size": 2, **more},
    )


def killed(spec: dict[str, Any], number: int, step: int) -> None:
    """Run `spec`, and get a signal once a step is done; in a process of its own."""
    import torch

    torch.set_num_threads(1)

    def listen(event: str, data: Any) -> None:
        if data.get("step") == step and "loss" in data:
            os.kill(os.getpid(), number)

    qa.run(Spec(**spec), listener=listen, verbose=False)


@pytest.fixture(scope="module")
def processes() -> Any:
    """What starts processes that have imported everything already."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["quantadapt.pipeline", "trl.trainer.sft_trainer", __name__])
    return found


def end_of(folder: Path) -> tuple[Any, bytes]:
    """Return what was logged of each step, without what a process counts from its own beginning,
    and the adapter's file. Steps that were done again have a line more, and the last one counts."""
    logged = {
        one["step"]: {name: v for name, v in one.items() if not name.startswith(OWN)}
        for one in RunFolder(folder).read_metrics()
    }
    return logged, (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "number", "step"),
    [
        *((name, signal.SIGKILL, 4) for name in OBJECTIVES),
        ("grpo", signal.SIGTERM, 3),
        ("embed", signal.SIGTERM, 1),
    ],
)
def test_it_ends_as_one_that_was_not_killed(
    objective: str, number: int, step: int, small: Path, processes: Any, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    qa.run(spec_of(small, objective, whole))
    spec = spec_of(small, objective, cut)
    process = processes.Process(target=killed, args=(spec.model_dump(mode="json"), number, step))
    process.start()
    process.join(120)
    assert process.exitcode == (-number if number == signal.SIGKILL else 1)
    assert not (cut / "adapter").exists()
    again = qa.run(spec_of(small, objective, cut, resume=True))
    assert again.metrics["train"]["steps"] == STEPS
    logged, adapter = end_of(whole)
    assert len(logged) == STEPS
    assert end_of(cut)[0] == logged
    assert end_of(cut)[1] == adapter
