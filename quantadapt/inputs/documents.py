"""JSON files: read within bounds, and validated by a pydantic model; mistakes are sentences."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ..errors import ModelError, Problem, QuantadaptError

LIMIT = 2**28
"""Bytes. The largest JSON files are tokenizers, of some 30 MB."""

S = TypeVar("S", bound=BaseModel)


def read_text(file: Path, error: type[QuantadaptError] = ModelError, *, fix: str = "") -> str:
    """Return the text of a file. Raises `error` where it is no UTF-8 text of a sane size."""
    what = ""
    try:
        if not file.exists() and not file.is_symlink():
            what = "cannot read it: No such file or directory"
        elif not file.is_file():  # reading a pipe or a device may never end
            what = "it is no file"
        elif file.stat().st_size > LIMIT:
            what = f"it is larger than {LIMIT >> 20} MiB"
        else:
            return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        what = "it is no UTF-8 text"
    except (OSError, ValueError) as failure:
        what = f"cannot read it: {getattr(failure, 'strerror', None) or failure}"
    raise error(what, fix=fix, where=str(file))


def parsed(text: str | bytes) -> Any:
    """Return what JSON holds. Raises ValueError where it is none, or is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_object(
    file: Path, error: type[QuantadaptError] = ModelError, *, fix: str = ""
) -> dict[str, Any]:
    """Return the object in a JSON file. Raises `error` where there is none."""
    text = read_text(file, error, fix=fix)
    try:
        value = parsed(text)
    except ValueError as failure:
        raise error(f"not valid JSON: {failure}", fix=fix, where=str(file)) from None
    if not isinstance(value, dict):
        what = f"it holds {_kind(value)}, not an object"
        raise error(what, fix=fix, where=str(file))
    return value


def problems_in(schema: type[BaseModel], values: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the values of an object, a phrase for each key."""
    try:
        schema.model_validate(values)
    except ValidationError as error:
        return _phrases(error)
    return []


def validated(
    schema: type[S],
    values: Mapping[str, Any],
    error: type[QuantadaptError] = ModelError,
    *,
    fix: str = "",
    where: str = "",
) -> S:
    """Return `values` as `schema` has them. Raises `error`, naming all that is wrong."""
    try:
        return schema.model_validate(values)
    except ValidationError as failure:
        what = f"it cannot be used: {'; '.join(_phrases(failure))}"
        raise error(what, fix=fix, where=where) from None


def _phrases(error: ValidationError) -> list[str]:
    found: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        key = str(detail["loc"][0]) if detail["loc"] else ""
        message = detail["msg"].removeprefix("Value error, ")
        given = "" if detail["type"] == "missing" else f", not {shown(detail['input'])}"
        text = f"{message[0].lower()}{message[1:]}".removeprefix("input ")
        if key not in found:
            found[key] = f"{key} {'is missing' if detail['type'] == 'missing' else text}{given}"
    return list(found.values())


def odd_numbers(value: Any, place: str = "", *, finite: bool = False) -> Iterator[str]:
    """Yield the keys in a document under which NaN stands or, if `finite`, infinity."""
    if isinstance(value, float):
        if math.isnan(value) or (finite and math.isinf(value)):
            yield place
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from odd_numbers(item, f"{place}.{key}".lstrip("."), finite=finite)
    elif isinstance(value, list):
        for item in value:
            yield from odd_numbers(item, place, finite=finite)


def shown(value: Any) -> str:
    """Return a value as it may stand in a sentence: shortened, without control characters."""
    try:
        text = json.dumps(value, default=str)
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:50]}..."


def reason(error: BaseException) -> str:
    """Return why a library failed, on one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    text = " ".join(str(error).split())[:300]
    return text or type(error).__name__


def as_problem(error: QuantadaptError, where: str) -> Problem:
    """Return what an error says as a problem of `where`, with the file in the sentence."""
    first = error.problems[0]
    return Problem(f"{first.where}: {first.what}" if first.where else first.what, first.fix, where)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    words = {str: "a text", list: "a list", int: "a number", float: "a number"}
    return words.get(type(value), "something else")
