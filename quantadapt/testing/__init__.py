"""A conformance suite that any backend joins in two lines.

    from quantadapt.testing import BackendSuite

    class TestAbsMax(BackendSuite):
        backend = "absmax"

`pytest` then proves what the backend declares: layers, numbers, gradients, checkpoints, every
adapter, merging, and every refusal in both directions (a refusal of something that works is a
failure too, unless `strict = False` or QUANTADAPT_STRICT=0). Class attributes narrow it down:

    options = {"bits": 3}        # of the quantizer
    device, dtype = "cuda", "bfloat16"
    adapters = ("lora", "ia3")
    bits = 4                     # for the tolerance table, where neither option nor size tells

`TargetSuite`, `AdapterSuite` and `RefusalSuite` are its parts. With `-p quantadapt.testing.plugin`
and QUANTADAPT_RESULTS=FILE the figures of every cell are written as JSON. The model is the bundled
demo, cut to two layers; QUANTADAPT_TESTING_MODEL names another checkpoint folder.

Needs pytest; torch and the vendors are imported when the first test runs.
"""

import pytest

for _name in ("adapter_suite", "refusal_suite", "target_suite"):
    pytest.register_assert_rewrite(f"{__name__}.{_name}")

from .adapter_suite import AdapterSuite  # noqa: E402 (rewriting has to be asked for first)
from .bench import Bench, Suite  # noqa: E402
from .refusal_suite import RefusalSuite  # noqa: E402
from .target_suite import TargetSuite  # noqa: E402
from .tolerances import Tolerance, tolerance  # noqa: E402


class BackendSuite(TargetSuite, AdapterSuite, RefusalSuite):
    """Everything: subclass it, name the backend."""


__all__ = [
    "AdapterSuite",
    "BackendSuite",
    "Bench",
    "RefusalSuite",
    "Suite",
    "TargetSuite",
    "Tolerance",
    "tolerance",
]
