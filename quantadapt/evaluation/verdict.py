"""Whether training was worth it: what its user has to be warned of. Loads no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..folders.metrics import HIGHER, label, losses, with_unit

NO_GAIN = 1e-4
"""Gains below this many nats per token are taken for noise."""

DIVERGED = 1.2
"""A training loss that ends so many times as high as it began has diverged."""

_LOWER = "lower train.learning_rate"
_LIKE = "check that the held-out data are like the training data"


def warnings_of(metrics: Mapping[str, Any], logged: Sequence[tuple[int, float]]) -> list[str]:
    """Return what is wrong with a tuned model, a sentence each; none where it is better than
    before.

    Args:
        metrics: the figures of a run, see `folders.metrics`.
        logged: (step, training loss) as `TrainResult.losses` has them.
    """
    found = [*_of_loss(losses(metrics)), *_of_others(metrics)]
    return found or training_warnings(logged)


def training_warnings(logged: Sequence[tuple[int, float]]) -> list[str]:
    """Return what the training losses alone tell: they grew, or did not move at all."""
    losses_ = [loss for _, loss in logged]
    if len(losses_) < 3:
        return []
    tail = losses_[-max(len(losses_) // 10, 2) :]
    first, last = losses_[0], sum(tail) / len(tail)
    if not math.isfinite(last) or last > DIVERGED * first + NO_GAIN:
        return [f"training diverged: its loss went from {first:.4g} to {last:.4g}; {_LOWER}"]
    if max(losses_) - min(losses_) < NO_GAIN * abs(first):
        what = f"training changed nothing: its loss stayed at {first:.4g}"
        return [f"{what}; raise train.learning_rate, or train longer"]
    return []


def _of_loss(found: Mapping[str, float]) -> list[str]:
    """Compare the mean losses in nats before and after training."""
    if not {"quantized", "tuned"} <= found.keys():
        return []
    before, after = found["quantized"], found["tuned"]
    if not math.isfinite(after):
        return [f"the tuned model is useless: its loss on held-out data is no number; {_LOWER}"]
    if after > before + NO_GAIN:
        change = f"from {before:.4g} to {after:.4g} nats per token"
        perplexity = f"perplexity from {_perplexity(before)} to {_perplexity(after)}"
        what = "training made the model worse: on held-out data its loss rose"
        return [f"{what} {change}, {perplexity}; {_LOWER}, or {_LIKE}"]
    if before - after < NO_GAIN:
        what = f"training changed nothing: the loss on held-out data stayed at {after:.4g}"
        return [f"{what} nats per token; raise train.learning_rate, or train longer"]
    return []


def _of_others(metrics: Mapping[str, Any]) -> list[str]:
    """Compare the headlines of the evaluations that have no loss."""
    found = []
    for evaluation, figures in metrics["evaluations"].items():
        name, figure = next(iter(figures.items()))
        values, better = figure["values"], figure["better"]
        if "loss" in figures or not better or not {"quantized", "tuned"} <= values.keys():
            continue
        before, after = values["quantized"], values["tuned"]
        gain = after - before if better == HIGHER else before - after
        error = figure.get("changes", {}).get("tuned", {}).get("error")
        noise = 0.01 * abs(before) if error is None else 2 * error
        if not gain >= -noise:
            shown = [with_unit(value, figure["unit"], "{:.4g}".format) for value in (before, after)]
            what = f"training made {label(evaluation, name)} worse, {better} being better"
            found.append(f"{what}: from {shown[0]} to {shown[1]} on held-out data; {_LIKE}")
    return found


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.4g}" if loss < 700 else "infinity"
