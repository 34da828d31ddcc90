"""What `run` returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..folders.metrics import label, with_unit

if TYPE_CHECKING:
    from peft import PeftModel

    from ..planning.planned import Plan


@dataclass(frozen=True, repr=False)
class RunResult:
    """What a run leaves: the tuned model, its folder and the figures in `metrics.json`."""

    model: PeftModel
    folder: Path
    plan: Plan
    metrics: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        words = []
        for evaluation, figures in self.metrics.get("evaluations", {}).items():
            name, figure = next(iter(figures.items()))
            found = {
                model: with_unit(value, figure["unit"], "{:.4g}".format)
                for model, value in figure["values"].items()
                if value is not None
            }
            if {"quantized", "tuned"} <= found.keys():
                what = label(evaluation, name)
                words.append(f"{what} {found['quantized']} to {found['tuned']}")
        words += [f"warning: {text}" for text in self.metrics.get("warnings", [])]
        return f"<RunResult {str(self.folder)!r}{''.join(f'; {word}' for word in words)}>"
