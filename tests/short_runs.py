"""Runs of three steps on the demo, to compare what is learnt in one way and in another."""

from __future__ import annotations

from typing import Any

import quantadapt as qa


def losses(tuned: Any, learning_rate: float) -> list[float]:
    """Train in place; return the loss of each step."""
    steps = {"max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 2}
    return [loss for _, loss in qa.train(tuned, learning_rate=learning_rate, **steps).losses]
