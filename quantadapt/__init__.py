"""quantadapt: any quantization backend, any PEFT adapter, one pipeline.

    import quantadapt as qa

    model = qa.quantize("path-or-hub-id", backend="hqq", bits=4)
    model = qa.attach(model, adapter="vera", r=64)
    qa.train(model, data="train.jsonl", max_steps=200)
    qa.merge(model, "out/")

Importing this package is cheap; torch, peft and the vendors are imported when they are needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import moved

__version__ = "0.1.0"

moved.install()

if TYPE_CHECKING:
    from .capabilities import Merge, Rule
    from .comparing.stage import ComparisonResult, compare
    from .errors import DataWarning, QuantadaptError
    from .exporting.loading import load
    from .exporting.onto import merge_onto
    from .exporting.same_base import BaseMismatchWarning
    from .exporting.saving import save
    from .exporting.stage import merge
    from .generation import Answer
    from .hookspecs import hookimpl
    from .objectives.sft import SFT
    from .pipeline import RunResult, run
    from .planning.planned import Plan
    from .planning.stage import plan
    from .protocols import (
        AdapterTarget,
        Evaluator,
        Exporter,
        Figure,
        Given,
        LayerwiseQuantizer,
        Options,
        Quantizer,
        Task,
    )
    from .records import Adapter, Backend, Evaluation, Export, Objective
    from .spec import Spec
    from .stages import attach, evaluate, generate, quantize, train

_HOME = {
    "pipeline": ("RunResult", "run"),
    "comparing.stage": ("ComparisonResult", "compare"),
    "stages": ("attach", "evaluate", "generate", "quantize", "train"),
    "generation.answers": ("Answer",),
    "exporting.saving": ("save",),
    "exporting.loading": ("load",),
    "exporting.same_base": ("BaseMismatchWarning",),
    "exporting.stage": ("merge",),
    "exporting.onto": ("merge_onto",),
    "planning": ("Plan", "plan"),
    "spec": ("Spec",),
    "errors": ("DataWarning", "QuantadaptError"),
    "capabilities": ("Merge", "Rule"),
    "records": ("Adapter", "Backend", "Evaluation", "Export", "Objective"),
    "protocols": ("AdapterTarget", "Evaluator", "Exporter", "Figure", "Given",
                  "LayerwiseQuantizer", "Options", "Quantizer", "Task"),
    "objectives.sft": ("SFT",),
    "hookspecs": ("hookimpl",),
}  # fmt: skip
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "SFT",
    "Adapter",
    "AdapterTarget",
    "Answer",
    "Backend",
    "BaseMismatchWarning",
    "ComparisonResult",
    "DataWarning",
    "Evaluation",
    "Evaluator",
    "Export",
    "Exporter",
    "Figure",
    "Given",
    "LayerwiseQuantizer",
    "Merge",
    "Objective",
    "Options",
    "Plan",
    "QuantadaptError",
    "Quantizer",
    "Rule",
    "RunResult",
    "Spec",
    "Task",
    "attach",
    "compare",
    "evaluate",
    "generate",
    "hookimpl",
    "load",
    "merge",
    "merge_onto",
    "plan",
    "quantize",
    "run",
    "save",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE[name]}", __name__), name)
    globals()[name] = value
    return value
