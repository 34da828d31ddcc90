"""A conformance suite that any backend joins, with one command or in two lines.

    pytest --pyargs quantadapt.testing --backend absmax

    from quantadapt.testing import BackendSuite

    class TestAbsMax(BackendSuite):
        backend = "absmax"

`pytest` then proves what the backend declares: layers, numbers, gradients, checkpoints, every
adapter, mixtures of experts, merging, and every refusal in both directions (a refusal of something
that works is a failure too, unless `strict = False` or QUANTADAPT_STRICT=0). The last section of
the output lists what was not verified, and why. Class attributes narrow it down, or options of the
command:

    options = {"bits": 3}                     # --backend-options bits=3
    device, dtype = "cuda", "bfloat16"        # --device cuda --dtype bfloat16
    adapters = ("lora", "ia3")                # --adapter lora,ia3, or --all-adapters
    bits = 4          # for the tolerance table, where neither option nor size tells

`TargetSuite`, `ExpertsSuite`, `AdapterSuite` and `RefusalSuite` are its parts. With
QUANTADAPT_RESULTS=FILE the figures of every cell are written as JSON; `quantadapt matrix --verify`
runs the suite over many backends, each in a process of its own. The model is the bundled demo, cut
to two layers; QUANTADAPT_TESTING_MODEL names another checkpoint folder.

Needs pytest; torch and the vendors are imported when the first test runs, everything else when a
name is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest

for _name in (
    "adapter_suite",
    "experts_suite",
    "layer_suite",
    "refusal_suite",
    "target_suite",
    "tensors",
):
    pytest.register_assert_rewrite(f"{__name__}.{_name}")

if TYPE_CHECKING:
    from .adapter_suite import AdapterSuite
    from .backend_suite import BackendSuite
    from .bench import Bench
    from .experts_suite import ExpertsSuite
    from .refusal_suite import RefusalSuite
    from .suite import Suite
    from .target_suite import TargetSuite
    from .tolerances import Tolerance, tolerance

_HOME = {
    "AdapterSuite": "adapter_suite",
    "BackendSuite": "backend_suite",
    "Bench": "bench",
    "ExpertsSuite": "experts_suite",
    "RefusalSuite": "refusal_suite",
    "Suite": "suite",
    "TargetSuite": "target_suite",
    "Tolerance": "tolerances",
    "tolerance": "tolerances",
}

__all__ = [
    "AdapterSuite",
    "BackendSuite",
    "Bench",
    "ExpertsSuite",
    "RefusalSuite",
    "Suite",
    "TargetSuite",
    "Tolerance",
    "tolerance",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
