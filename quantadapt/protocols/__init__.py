"""What a plugin implements: the options class of a record, whose methods do the work.

A backend has a `Quantizer`, and the `AdapterTarget` that it produces; an objective has a `Task`, an
evaluation an `Evaluator`, an export an `Exporter`. Nothing here imports torch: plugins are imported
to list them, and only asked to work later.
"""

from __future__ import annotations

from .backends import (
    AdapterTarget,
    LayerwiseQuantizer,
    LayerwiseTarget,
    Quantizer,
    rows_of_units,
    twin,
)
from .byte_codes import ByteCodes
from .evaluations import Evaluator, Given
from .exports import Exporter
from .grids import CodebookGrid, Grid, UniformGrid, float8_levels
from .objectives import Task
from .options import Figure, Options
from .word_codes import WordCodes

__all__ = [
    "AdapterTarget",
    "ByteCodes",
    "CodebookGrid",
    "Evaluator",
    "Exporter",
    "Figure",
    "Given",
    "Grid",
    "LayerwiseQuantizer",
    "LayerwiseTarget",
    "Options",
    "Quantizer",
    "Task",
    "UniformGrid",
    "WordCodes",
    "float8_levels",
    "rows_of_units",
    "twin",
]
