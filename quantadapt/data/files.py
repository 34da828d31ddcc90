"""Reading data files: JSONL, JSON, CSV, Parquet and text become rows that know file and line."""

from __future__ import annotations

import codecs
import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ..errors import DataError
from .mistakes import each_made

FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "oasst": ("message_id", "parent_id", "role", "text"),
    "self-instruct": ("instruction", "instances"),
    "alpaca": ("instruction", "output"),
    "dolly": ("instruction", "response"),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
}
"""Format -> the columns that it needs; with `format: auto` the first that fits is taken."""
RECOGNIZED = "recognized columns are: " + "; ".join(
    " + ".join(columns) for columns in FORMATS.values()
)

_AS_TEXT = "save the file as UTF-8 text"
_BATCH = 256
"""Rows of a Parquet file that are read at a time."""


@dataclass(frozen=True)
class Row:
    """One row as it was read; `where` is its file and line."""

    values: dict[str, Any]
    where: str

    @property
    def file(self) -> str:
        """The file, or the hub id and split."""
        return self.where.rpartition(":")[0]


def _raw_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (place, line). Raises DataError where it is no text at all."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            where = f"{path}:{number}"
            if b"\0" in raw:
                raise DataError("this is binary data, not text", fix=_AS_TEXT, where=where)
            yield where, raw if number > 1 else raw.removeprefix(codecs.BOM_UTF8)


def _decoded(raw: bytes, where: str) -> str:
    """Return a line without its end. Raises DataError where it is no UTF-8 text."""
    try:
        return raw.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        what = f"not UTF-8 text: byte 0x{raw[error.start]:02x} at column {error.start + 1}"
        raise DataError(what, fix=_AS_TEXT, where=where) from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, line without its end). Raises DataError where it is no UTF-8 text."""
    yield from enumerate(each_made(_raw_lines(path), _decoded), 1)


def _read_jsonl(path: Path) -> Iterator[Row]:
    yield from (row for row in each_made(_raw_lines(path), _json_row) if row is not None)


def _json_row(raw: bytes, where: str) -> Row | None:
    line = _decoded(raw, where)
    return _row(_parse_json(line, where), where) if line.strip() else None


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        what = f"not valid JSON: {error.msg} (column {error.colno})"
        fix = "write one JSON object per line, strings in double quotes"
        raise DataError(what, fix=fix, where=where) from None
    except (RecursionError, ValueError) as error:
        raise DataError(f"not readable as JSON: {error}", where=where) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object whose keys are all different; of two that are alike JSON keeps the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return found


def _read_json(path: Path) -> Iterator[Row]:
    lines = list(_lines(path))
    try:
        values = json.loads("\n".join(line for _, line in lines), object_pairs_hook=_object)
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
    items = ((f"{path}:item {number}", value) for number, value in enumerate(values, 1))
    yield from each_made(items, _row)


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        what = f"expected an object with named columns, found {kind_of(value)}"
        raise DataError(what, fix='write e.g. {"text": "..."}', where=where)
    return Row(value, where)


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.DictReader((f"{line}\n" for _, line in _lines(path)), strict=True)
    try:
        names = list(reader.fieldnames or ())
        if twice := sorted({name for name in names if names.count(name) > 1}):
            what = f"the column {twice[0]!r} is there twice"
            raise DataError(what, fix="give every column a name of its own", where=f"{path}:1")
    except csv.Error as error:
        raise _no_csv(error, reader, path) from None

    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        try:
            for row in reader:
                yield f"{path}:{reader.line_num}", dict(row)
        except csv.Error as error:
            raise _no_csv(error, reader, path) from None

    def made(row: dict[Any, Any], where: str) -> Row:
        if None in row or None in row.values():
            fix = "put text with commas or line breaks into double quotes"
            what = f"the row does not have the {len(names)} columns of the first line"
            raise DataError(what, fix=fix, where=where)
        return Row(row, where)

    yield from each_made(rows(), made)


def _no_csv(error: csv.Error, reader: Any, path: Path) -> DataError:
    return DataError(f"not valid CSV: {error}", where=f"{path}:{reader.reader.line_num}")


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches(_BATCH))
            yield from arrow_rows(chain.from_iterable(batches), str(path))
    except pyarrow.ArrowException as error:
        what = f"not a readable Parquet file: {first_line(error)}"
        raise DataError(what, fix="write or download the file again", where=str(path)) from None


def arrow_rows(rows: Iterable[dict[str, Any]], name: str) -> Iterator[Row]:
    """Yield rows of an Arrow table. Its objects all have the same keys, so that one which an
    object lacks comes as null; inside of lists and objects those are taken out again."""
    for number, row in enumerate(rows, 1):
        values = {key: _without_null(value) for key, value in row.items()}
        yield Row(values, f"{name}:row {number}")


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value


def _read_text(path: Path) -> Iterator[Row]:
    """Blank lines separate the examples; in a file without blank lines every line is one."""
    by_paragraph = _has_paragraphs(path)
    start, block = 0, list[str]()
    for number, line in chain(_lines(path), [(0, "")]):
        if line.strip():
            start = start if block else number
            block.append(line)
        if block and (not line.strip() or not by_paragraph):
            yield Row({"text": "\n".join(block)}, f"{path}:{start}")
            block = []


def _has_paragraphs(path: Path) -> bool:
    """Say whether text follows a blank line."""
    blank = False
    for _, line in _lines(path):
        if blank and line.strip():
            return True
        blank = blank or not line.strip()
    return False


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
SUFFIXES = ", ".join(READERS)


def kind_of(value: Any) -> str:
    """Name a value's type as people do."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, float) and value != value:
        return "NaN, an empty cell"
    for types, word in (((int, float), "a number"), (str, "text"), (dict, "an object")):
        if isinstance(value, types):
            return word
    return "a list" if isinstance(value, list) else f"a {type(value).__name__}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
