"""Looks at a checkpoint on disk without loading it: is it a model, is it whole, is it quantized?"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import Problem
from ..paths import INDEX, PICKLES, is_local_path


def config_of(source: str) -> dict[str, Any] | None:
    """Return a checkpoint's config.json, or None where it is not to be had.

    That of a hub id is known once it is in the local cache; nothing is downloaded.
    """
    file = Path(source).expanduser() / "config.json"
    return _read_json(file if file.exists() else _cached_config(source) or file)


def quantization_of(source: str) -> dict[str, Any] | None:
    """Return `quantization_config` of a checkpoint's config.json, or None."""
    return quantization_in(config_of(source) or {})


def quantization_in(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return `quantization_config` of the contents of a config.json, or None."""
    found = config.get("quantization_config")
    return found if isinstance(found, dict) else None


def _cached_config(source: str) -> Path | None:
    """Return the cached config.json of a hub id, if there is one."""
    if source.count("/") != 1 or is_local_path(source):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source, "config.json")
    return Path(found) if isinstance(found, str) else None


def check_model(source: str) -> list[Problem]:
    """Return what is wrong with a local checkpoint folder; a hub id cannot be checked here."""
    folder = Path(source).expanduser()
    if not folder.exists():
        if is_local_path(source):
            fix = "check the path; a hub id has the form owner/name"
            return [Problem(f"{source} does not exist", fix, where="model")]
        return []
    if not folder.is_dir():
        fix = "pass the folder that holds config.json and *.safetensors"
        return [Problem(f"{source} is a file, not a checkpoint folder", fix, where="model")]
    if not any(folder.iterdir()):
        return [Problem(f"{source} is empty", "download the model again", where="model")]
    return _check_config(folder) or _check_weights(folder)


def has_config_alone(source: str) -> bool:
    """Say whether a local folder holds the config of a model but no weights at all."""
    folder = Path(source).expanduser()
    if not folder.is_dir() or _check_config(folder):
        return False
    return not any(True for pattern in ("*.safetensors", *PICKLES) for _ in folder.glob(pattern))


def _check_config(folder: Path) -> list[Problem]:
    config = _read_json(folder / "config.json")
    if config is None:
        what = f"{folder} is no model: it has no readable config.json"
        return [Problem(what, "pass the folder of a transformers checkpoint", where="model")]
    if "model_type" not in config:
        what = f"{folder}/config.json has no model_type, so it is no transformers model"
        return [Problem(what, "pass the folder of a transformers checkpoint", where="model")]
    return []


def _check_weights(folder: Path) -> list[Problem]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = [p.name for pattern in PICKLES for p in sorted(folder.glob(pattern))]
        if pickles:
            what = f"its weights are pickles ({', '.join(pickles)}), which can run code when read"
            fix = "load it with transformers where you trust it, and save_pretrained it again"
            return [Problem(what, fix, where="model")]
        fix = "download the model again, with its *.safetensors"
        return [Problem(f"{folder} holds no *.safetensors", fix, where="model")]
    return [problem for file in files if (problem := _check_safetensors(file))] + _shards(folder)


def _shards(folder: Path) -> list[Problem]:
    index = _read_json(folder / INDEX) or {}
    wanted = sorted(set(index.get("weight_map", {}).values()))
    gone = [name for name in wanted if not (folder / name).exists()]
    fix = "download the model again"
    return [Problem(f"the shard {name} is missing", fix, where="model") for name in gone]


def _check_safetensors(file: Path) -> Problem | None:
    """Compare the file's size with what its header announces."""
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > size:
                raise ValueError("header longer than the file")
            header = json.loads(opened.read(length))
        ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
    except (struct.error, ValueError, KeyError, TypeError):
        what = f"{file.name} is not a safetensors file, or is damaged"
        return Problem(what, "download it again", where="model")
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        what = f"{file.name} is cut short: {size} bytes, its header announces {expected}"
        return Problem(what, "download it again", where="model")
    return None


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
