"""A small data file: reading and tokenizing all of the demo's takes a second, each time."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from quantadapt.demo import TRAIN_FILE

_FOLDER = tempfile.TemporaryDirectory(prefix="quantadapt-few-")


@cache
def few_rows() -> str:
    """Return the path of a file with the first 100 of the demo's examples."""
    file = Path(_FOLDER.name) / "few.jsonl"
    lines = TRAIN_FILE.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[:100]), encoding="utf-8")
    return str(file)
