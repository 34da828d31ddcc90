"""Runs of three steps on the demo, to compare what is learnt in one way and in another, and what
each objective needs for one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import quantadapt as qa

OBJECTIVES: Mapping[str, Mapping[str, Any]] = {
    "sft": {},
    "pretrain": {"data": {"max_length": 64}},
    "distill": {},
    "dpo": {},
    "orpo": {},
    "simpo": {},
    "kto": {},
    "grpo": {"rewarded": True},
    "rloo": {"rewarded": True},
    "reward": {},
    "classify": {},
    "classify-tokens": {},
    "embed": {},
    "rerank": {},
}
VOWELS = """
def vowels(completions, **_):
    return [sum(c in "aeiou" for c in text) / (len(text) + 1) for text in completions]
"""


def losses(tuned: Any, learning_rate: float) -> list[float]:
    """Train in place; return the loss of each step."""
    steps = {"max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 2}
    return [loss for _, loss in qa.train(tuned, learning_rate=learning_rate, **steps).losses]


def answered(folder: Path, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an objective needs that learns from answers of its own."""
    if not own.get("rewarded"):
        return {}
    file = folder / "vowels.py"
    file.write_text(VOWELS)
    return {"rewards": [f"{file}:vowels"], "num_generations": 4, "max_completion_length": 8}
