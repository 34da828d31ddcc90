"""What is wrong with a spec, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from ..errors import Problem
from ..inputs.likely_names import did_you_mean, likely_name
from .overrides import SHORTHAND

_LORA = ["r", "lora_alpha", "lora_dropout", "target_modules"]
"""Options of adapters that people write elsewhere."""


def problems_of(error: ValidationError, spec: type[BaseModel]) -> list[Problem]:
    """Return what pydantic's `error` says of the values for `spec`, whose sections are records,
    too."""
    return [_problem(dict(detail), spec) for detail in error.errors()]


def _problem(detail: dict[str, Any], spec: type[BaseModel]) -> Problem:
    path = [str(part) for part in detail["loc"]]
    where = ".".join(path)
    if detail["type"] == "extra_forbidden":
        return Problem(f"unknown key {path[-1]!r}", _hint(path, spec), where=where)
    if detail["type"] == "model_type":
        return _no_mapping(where, detail["input"])
    return wrong_value(detail, where)


def _hint(path: list[str], spec: type[BaseModel]) -> str:
    """Say which key an unknown one may stand for, in its section or in another."""
    *section, name = path
    known = _known_keys(spec, section)
    if not likely_name(name, known):
        for other in ("", *_sections(spec), "adapter"):
            keys = _LORA if other == "adapter" else _known_keys(spec, [other] if other else [])
            if there := likely_name(name, keys):
                return f"did you mean {'.'.join(filter(None, (other, there)))!r}?"
    return did_you_mean(name, known)


def _sections(spec: type[BaseModel]) -> list[str]:
    return [key for key in spec.model_fields if _known_keys(spec, [key]) not in ([], ["name"])]


def _no_mapping(where: str, found: Any) -> Problem:
    what = "it is empty" if found is None else f"{found!r} is no mapping"
    key = SHORTHAND.get(where)
    fix = f"write a {key}, or {{{key}: ...}}" if key else "write keys and values"
    return Problem(what, f"leave it out, or {fix}" if found is None else fix, where)


def wrong_value(detail: Mapping[str, Any], where: str) -> Problem:
    """Return what pydantic's `detail` says about a value, and what may stand there instead."""
    if detail["type"] == "missing":
        return Problem("it has to be set, and is not", where=where)
    what, message = f"{detail['input']!r} is not possible", str(detail["msg"])
    if detail["type"] == "literal_error":
        return Problem(what, f"use one of {detail['ctx']['expected']}", where)
    if not message.startswith("Input should be "):
        message = message.removeprefix("Value error, ")
        return Problem(f"{message}, got {detail['input']!r}", where=where)
    wanted = message.removeprefix("Input should be ").partition(",")[0]
    bound = wanted.startswith(("greater", "less"))
    return Problem(what, f"use a value {wanted}" if bound else f"use {wanted}", where)


def _known_keys(model: type[BaseModel], path: list[str]) -> list[str]:
    for name in path:
        annotation = model.model_fields[name].annotation
        options = [annotation, *get_args(annotation)]
        nested = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if not nested:
            return []
        model = nested[0]
    return list(model.model_fields)
