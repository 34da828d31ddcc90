"""Names of files, and what a name that a user gives can mean: a path or a hub id."""

from __future__ import annotations

from pathlib import Path

INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DATA_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".txt")
"""Of the files that training data are read from."""


def is_local_path(source: str) -> bool:
    """Say whether `source` can only mean a file or folder, not a hub id (`owner/name`)."""
    return (
        source.startswith((".", "/", "~"))
        or "\\" in source
        or source.count("/") > 1
        or Path(source).suffix.lower() in DATA_ENDINGS
    )
