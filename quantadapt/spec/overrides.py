"""Assignments to dotted keys of a spec, before it is one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import Problem, SpecError
from ..inputs.plain_yaml import YAMLError, parse

SHORTHAND = {"backend": "name", "adapter": "name", "objective": "name", "data": "path"}
"""The key that a bare string stands for, e.g. `backend: hqq`."""


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return `values` with `a.b=c` assignments applied; values are read as YAML."""
    result = _copy(values)
    problems = [problem for item in overrides if (problem := _override(result, item))]
    if problems:
        raise SpecError(problems)
    return result


def _override(values: dict[str, Any], item: str) -> Problem | None:
    """Apply one `a.b=c` to `values`, or return why it cannot be applied."""
    key, equals, text = item.partition("=")
    if not equals or not key.strip():
        fix = "write it as key=value, e.g. --set train.max_steps=100"
        return Problem(f"{item!r} is no assignment", fix, where="--set")
    *parents, last = key.strip().split(".")
    node = values
    for name in parents:
        child = node.get(name)
        if isinstance(child, str) and name in SHORTHAND:
            child = {SHORTHAND[name]: child}
        elif child is not None and not isinstance(child, dict):
            return Problem(f"{name!r} is {child!r}, which has no {last!r}", where=f"--set {key}")
        child = child or {}
        node[name] = child
        node = child
    node[last] = _yaml_value(text)
    return None


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key. What is no mapping stays, for the spec to complain about."""
    *parents, last = key.split(".")
    for name in parents:
        child = values.get(name)
        if isinstance(child, str) and name in SHORTHAND:
            child = {SHORTHAND[name]: child}
        elif child is not None and not isinstance(child, dict):
            return
        values[name] = child = child or {}
        values = child
    values[last] = value


def named(before: Any, name: str) -> dict[str, Any]:
    """Return the thing called `name`, with the options that `before` gives to that very thing."""
    same = isinstance(before, dict) and before.get("name", name) == name
    return {**before, "name": name} if same else {"name": name}


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, Mapping) else v for k, v in values.items()}


def _yaml_value(text: str) -> Any:
    try:
        return parse(text)
    except YAMLError:
        return text
