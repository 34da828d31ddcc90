"""Values become a spec, or all that is wrong with them: what a plan would find, too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

from ..errors import PlanRefused, Problem, SpecError
from ..spec import Spec
from .stage import plan


def spec_of(values: Mapping[str, Any]) -> Spec:
    """Return the spec. Raises SpecError with every mistake."""
    try:
        return Spec(**values)
    except SpecError as error:
        raise SpecError([*error.problems, *_of_the_rest(values, error.problems)]) from None


def _of_the_rest(values: Mapping[str, Any], known: Iterable[Problem]) -> list[Problem]:
    """Return what a plan finds wrong with backend, adapter, model and data, beside what is known.

    Rules are left out: what they look at may be what is missing.
    """
    try:
        plan(Spec(**_without(values, [problem.where for problem in known])), check_output=False)
    except SpecError:
        return []
    except PlanRefused as error:
        parts = ("backend", "adapter", "model", "data")
        return [p for p in error.problems if p.where.partition(".")[0] in parts and not p.rule]
    return []


def _without(values: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """Return `values` without the dotted `keys`."""
    rest: dict[str, Any] = deepcopy(dict(values))
    for key in keys:
        *parents, last = key.split(".")
        node: Any = rest
        for name in parents:
            node = node.get(name) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node.pop(last, None)
    return rest
