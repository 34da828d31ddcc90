"""The module paths of before 0.1: importing one warns, and gives what has moved elsewhere.

They go with the next version. Names that the README, the reference or the tutorial use are not
here: those modules are where they were.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_PACKAGE = __name__.rpartition(".")[0]

MOVED = {
    "adalora": "adapting.adalora",
    "adapters": "registry.adapters",
    "atomic": "folders.atomic",
    "attaching": "adapting.stage",
    "calibration_blocks": "calibration.blocks",
    "calibration_data": "quantizing.examples",
    "calibration_recording": "calibration.recording",
    "checkpoint": "planning.on_disk paths",
    "checkpointing": "training.recomputing",
    "collators": "data.batches",
    "cuda_graphs": "training.cuda_graphs",
    "data_files": "data.files",
    "data_segments": "data.segments",
    "data_sources": "data.sources",
    "data_tokens": "data.tokens",
    "doctor": "registry.doctor",
    "drafting": "planning.parts",
    "environment": "folders.environment",
    "fitting": "training.memory_fit",
    "fused": "adapting.fused",
    "fused_dora": "adapting.fused_dora",
    "fused_lora": "adapting.fused_lora",
    "gradient_check": "training.loop",
    "kernels": "training.lent training.lent_to_trainers model.patches",
    "launching": "distributed.launching",
    "loftq": "adapting.loftq",
    "losses": "model.head",
    "matrix_results": "matrix.results",
    "matrix_tables": "matrix.tables",
    "memory_plan": "planning.memory planning.workload",
    "merging": "exporting.merging",
    "merging_onto": "exporting.onto",
    "metrics": "folders.metrics",
    "model_shape": "memory.shape",
    "packing": "training.packing",
    "parallel": "planning.processes",
    "peft_options": "planning.peft_options",
    "plugin_checks": "registry.checks",
    "predictions": "evaluation.predictions data.batches",
    "probing": "training.setting_search",
    "progress": "training.progress",
    "read_ahead": "loading.read_ahead",
    "report": "reporting.page reporting.measured reporting.training",
    "report_charts": "reporting.charts",
    "report_headline": "reporting.words",
    "report_html": "reporting.html",
    "report_run": "reporting.run",
    "report_sections": "reporting.page reporting.measured reporting.training",
    "report_words": "reporting.words",
    "run_folder": "folders.run_folder",
    "saving": "exporting.saving exporting.loading exporting.same_base exporting.stage "
    "exporting.manifest evaluation.sizes",
    "state": "quantizing.state",
    "stored": "exporting.stored loading.tensors",
    "trainers": "training.trainer training.figures",
    "training_loop": "training.loop",
    "triton_losses": "model.triton_head",
    "verify": "matrix.verify",
    "verify_process": "matrix.process",
}
"""Old module -> the modules that hold its names now."""

RENAMED = {
    "Checkpointer": "Recomputer",
    "Fitting": "MemoryFit",
    "RECORD": "MANIFEST",
    "Record": "Row",
    "checkpointed": "recomputed",
    "read_record": "read_manifest",
}
"""Old name -> the name that the same thing has now."""


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        if package != _PACKAGE or name not in MOVED:
            return None
        return ModuleSpec(fullname, _Alias([f"{_PACKAGE}.{home}" for home in MOVED[name].split()]))


class _Alias(Loader):
    def __init__(self, homes: list[str]) -> None:
        self.homes = homes

    def create_module(self, spec: ModuleSpec) -> None:
        """Leave it to the import system."""

    def exec_module(self, module: ModuleType) -> None:
        text = f"{module.__name__} has moved to {' and '.join(self.homes)}"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        for home in reversed(self.homes):
            found = vars(import_module(home))
            vars(module).update({k: v for k, v in found.items() if not k.startswith("__")})
        names = vars(module)
        names.update({old: names[new] for old, new in RENAMED.items() if new in names})


def install() -> None:
    """Let the old paths be imported; asked only where no module of that name is there."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
