"""What the report is made of: a run folder's files, any of which may lack anything."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..folders.metrics import MODELS, label
from ..folders.run_folder import RunFolder


@dataclass(frozen=True)
class Run:
    """All that the page is made of: the contents of a run folder's files."""

    marker: Mapping[str, Any]
    plan: Mapping[str, Any]
    metrics: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]
    environment: Mapping[str, Any]
    spec: str

    @classmethod
    def read(cls, folder: RunFolder) -> Run:
        """Read a run folder; what is missing is empty."""
        spec = folder.path / "spec.yaml"
        return cls(
            marker=folder.marker,
            plan=folder.read_json("plan.json"),
            metrics=folder.read_json("metrics.json"),
            log=folder.read_metrics(),
            environment=folder.read_json("environment.json"),
            spec=spec.read_text(encoding="utf-8", errors="replace") if spec.is_file() else "",
        )


def part(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return the mapping under `key`; empty where there is none."""
    found = values.get(key)
    return found if isinstance(found, Mapping) else {}


def items(values: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """Return the mappings in the list under `key`; none where there is no list."""
    found = values.get(key)
    return [item for item in found if isinstance(item, Mapping)] if isinstance(found, list) else []


def text(values: Mapping[str, Any], key: str) -> str:
    """Return the value under `key` as text; empty where there is none."""
    value = values.get(key)
    return str(value) if value is not None else ""


def number(values: Mapping[str, Any], *path: str) -> float | None:
    """Return the finite number that the keys `path` lead to, or None."""
    for key in path[:-1]:
        values = part(values, key)
    value = values.get(path[-1])
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Measured:
    """One figure of an evaluation.

    Attributes:
        name: the first one's names its evaluation, too.
        unit: empty where it has none.
        better: "lower", "higher", or empty.
        values: finite numbers by model, in the order of `MODELS`.
        errors: their standard errors, where those are known.
        changes: (model that it is the change from, change, its standard error or None), by model.
    """

    name: str
    unit: str
    better: str
    values: Mapping[str, float]
    errors: Mapping[str, float] = field(default_factory=dict)
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def measured(run: Run) -> Iterator[tuple[str, list[Measured]]]:
    """Yield each evaluation with its figures, the first of which matters most."""
    evaluations = part(run.metrics, "evaluations")
    for evaluation in evaluations:
        figures = part(evaluations, evaluation)
        first, *others = [*figures] or [""]
        named = {first: label(evaluation, first), **{name: name for name in others}}
        found = [_measured(named[name], part(figures, name)) for name in figures]
        if any(figure.values for figure in found):
            yield evaluation, found


def _measured(name: str, figure: Mapping[str, Any]) -> Measured:
    values, errors = _by_model(figure, "values"), _by_model(figure, "errors")
    changes = {
        model: {
            "since": text(part(part(figure, "changes"), model), "since"),
            "value": change,
            "error": number(figure, "changes", model, "error"),
        }
        for model in MODELS
        if (change := number(figure, "changes", model, "value")) is not None
    }
    return Measured(name, text(figure, "unit"), text(figure, "better"), values, errors, changes)


def _by_model(figure: Mapping[str, Any], key: str) -> dict[str, float]:
    numbers = {model: number(figure, key, model) for model in MODELS}
    return {model: value for model, value in numbers.items() if value is not None}
