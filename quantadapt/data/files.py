"""Reading data files: JSONL, JSON, CSV, Parquet and text become rows that know file and line."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError

FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
}
"""Format -> the columns that it needs; with `format: auto` the first that fits is taken."""


@dataclass(frozen=True)
class Row:
    """One example as it was read; `where` is its file and line."""

    values: dict[str, Any]
    where: str


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, line without its end). Raises DataError where it is no UTF-8 text."""
    fix = "save the file as UTF-8 text"
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            where = f"{path}:{number}"
            if b"\0" in raw:
                raise DataError("this is binary data, not text", fix=fix, where=where)
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                what = f"not UTF-8 text: byte 0x{raw[error.start]:02x} at column {error.start + 1}"
                raise DataError(what, fix=fix, where=where) from None
            yield number, line.rstrip("\r\n")


def _read_jsonl(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        if line.strip():
            where = f"{path}:{number}"
            yield _row(_parse_json(line, where), where)


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        what = f"not valid JSON: {error.msg} (column {error.colno})"
        fix = "write one JSON object per line, strings in double quotes"
        raise DataError(what, fix=fix, where=where) from None
    except (RecursionError, ValueError) as error:
        raise DataError(f"not readable as JSON: {error}", where=where) from None


def _read_json(path: Path) -> Iterator[Row]:
    lines = list(_lines(path))
    try:
        values = json.loads("\n".join(line for _, line in lines))
    except json.JSONDecodeError as error:
        if error.msg.startswith("Extra data"):  # JSON lines under the name of JSON
            yield from _read_jsonl(path)
            return
        if not any(line.strip() for _, line in lines):
            return
        what = f"not valid JSON: {error.msg} (column {error.colno})"
        raise DataError(what, where=f"{path}:{error.lineno}") from None
    except (RecursionError, ValueError) as error:
        raise DataError(f"not readable as JSON: {error}", where=str(path)) from None
    if isinstance(values, dict) and len(lines) == 1:
        values = [values]
    if not isinstance(values, list):
        what = f"the file holds {kind_of(values)}, expected a list of objects"
        raise DataError(what, fix="write [{...}, {...}], or JSON lines", where=str(path))
    for number, value in enumerate(values, 1):
        yield _row(value, f"{path}:item {number}")


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        what = f"expected an object with named columns, found {kind_of(value)}"
        raise DataError(what, fix='write e.g. {"text": "..."}', where=where)
    return Row(value, where)


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    text = "\n".join(line for _, line in _lines(path))
    reader = csv.DictReader(io.StringIO(text), strict=True)
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                columns = len(reader.fieldnames or ())
                fix = "put text with commas or line breaks into double quotes"
                what = f"the row does not have the {columns} columns of the first line"
                raise DataError(what, fix=fix, where=where)
            yield Row(dict(row), where)
    except csv.Error as error:
        raise DataError(
            f"not valid CSV: {error}", where=f"{path}:{reader.reader.line_num}"
        ) from None


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        what = f"not a readable Parquet file: {first_line(error)}"
        raise DataError(what, fix="write or download the file again", where=str(path)) from None
    for number, row in enumerate(rows, 1):
        yield Row(row, f"{path}:row {number}")


def _read_text(path: Path) -> Iterator[Row]:
    """Blank lines separate the examples; in a file without blank lines every line is one."""
    lines = list(_lines(path))
    while lines and not lines[-1][1].strip():
        lines.pop()
    by_paragraph = any(not line.strip() for _, line in lines)
    start, block = 0, list[str]()
    for number, line in [*lines, (0, "")]:
        if line.strip():
            start = start if block else number
            block.append(line)
        if block and (not line.strip() or not by_paragraph):
            yield Row({"text": "\n".join(block)}, f"{path}:{start}")
            block = []


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
SUFFIXES = ", ".join(READERS)
RECOGNIZED = "recognized columns are: " + "; ".join(
    " + ".join(columns) for columns in FORMATS.values()
)


def kind_of(value: Any) -> str:
    """Name a value's type as people do."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    for types, word in (((int, float), "a number"), (str, "text"), (dict, "an object")):
        if isinstance(value, types):
            return word
    return "a list" if isinstance(value, list) else f"a {type(value).__name__}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
