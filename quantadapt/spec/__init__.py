"""The spec: everything that a run is told, in one strict, typed record."""

from __future__ import annotations

from .chosen import AdapterSpec, BackendSpec, EvaluationSpec, FormatSpec, Named, ObjectiveSpec
from .data import Column, DataFormat, DataSpec, SourceSpec
from .mistakes import wrong_value
from .overrides import SHORTHAND, apply_overrides, named, put
from .train import Streaming, TrainSpec
from .whole import Dtype, EvaluateSpec, ExportSpec, MergeChoice, MinGain, Rounding, Spec, Tower

__all__ = [
    "SHORTHAND",
    "AdapterSpec",
    "BackendSpec",
    "Column",
    "DataFormat",
    "DataSpec",
    "Dtype",
    "EvaluateSpec",
    "EvaluationSpec",
    "ExportSpec",
    "FormatSpec",
    "MergeChoice",
    "MinGain",
    "Named",
    "ObjectiveSpec",
    "Rounding",
    "SourceSpec",
    "Spec",
    "Streaming",
    "Tower",
    "TrainSpec",
    "apply_overrides",
    "named",
    "put",
    "wrong_value",
]
