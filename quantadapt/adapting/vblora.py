"""VBLoRA with `save_only_topk_weights`: what PEFT saves so can be merged and answered with, and not
trained further, as it holds of each vector's logits the largest alone. Checkpoints hold all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import Problem, TrainingError

OPTION = "save_only_topk_weights"
_CUT = f"holds the top-k weights of VBLoRA alone ({OPTION}), from which training cannot go on"


@contextmanager
def saved_whole(model: Any) -> Iterator[None]:
    """Inside, PEFT saves and loads all that training goes on from."""
    short = [c for c in model.peft_config.values() if getattr(c, OPTION, False)]
    try:
        for config in short:
            setattr(config, OPTION, False)
        yield
    finally:
        for config in short:
            setattr(config, OPTION, True)


def refuse_cut_short(model: Any, folder: Path) -> None:
    """Raise TrainingError where a checkpoint was saved with the largest weights alone."""
    from peft import PeftConfig

    if not any(hasattr(config, OPTION) for config in model.peft_config.values()):
        return
    if getattr(PeftConfig.from_pretrained(str(folder)), OPTION, False):
        fix = "start anew in another --output, whose checkpoints hold all"
        raise TrainingError(f"the checkpoint {_CUT}", fix=fix, where=str(folder))


def cut_short(model: Any) -> list[Problem]:
    """Return why `model`, as it was loaded, cannot be trained further; empty if it can."""
    logits = (p for n, p in model.named_parameters() if "vblora_logits" in n and p.requires_grad)
    if not any(bool(weight.detach().isinf().any()) for weight in logits):
        return []
    fix = f"train it from the run's last checkpoint, or anew with {OPTION}: false"
    return [Problem(f"the adapter {_CUT}", fix, f"adapter.{OPTION}")]
