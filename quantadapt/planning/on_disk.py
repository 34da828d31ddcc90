"""Looks at a checkpoint on disk without loading it: is it a model, is it whole, is it quantized?"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import ModelError, Problem
from ..folders.run_folder import MARKER
from ..inputs.documents import as_problem, read_object, shown
from ..inputs.model_config import config_problems, too_large
from ..inputs.weights import check_weights, file_in
from ..paths import ADAPTER_CONFIG, PICKLES, is_local_path, local_file, path_problem
from ..remote_code import code_problems


def config_of(source: str) -> dict[str, Any] | None:
    """Return a checkpoint's config.json, or None where it is not to be had or cannot be.

    That of a hub id is known once it is in the local cache; nothing is downloaded.
    """
    if path_problem(source):
        return None
    file = local_file(source, "config.json")
    found = _read_json(file) if file else None
    return None if found is None or config_problems(found) else found


def quantization_of(source: str) -> dict[str, Any] | None:
    """Return `quantization_config` of a checkpoint's config.json, or None."""
    return quantization_in(config_of(source) or {})


def quantization_in(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return `quantization_config` of the contents of a config.json, or None."""
    found = config.get("quantization_config")
    return found if isinstance(found, dict) else None


def check_model(source: str) -> list[Problem]:
    """Return what is wrong with a local checkpoint folder; of a hub id only what the cache knows.
    Code that it brings along is a problem where that is not trusted."""
    if problem := path_problem(source):
        return [Problem(f"{shown(source)} is no path: {problem}", "check the path", where="model")]
    folder = Path(source).expanduser()
    if not folder.exists():
        if is_local_path(source):
            fix = "check the path; a hub id has the form owner/name"
            return [Problem(f"{source} does not exist", fix, where="model")]
        return code_problems(source)
    if not folder.is_dir():
        fix = "pass the folder that holds config.json and *.safetensors"
        return [Problem(f"{source} is a file, not a checkpoint folder", fix, where="model")]
    if not any(folder.iterdir()):
        return [Problem(f"{source} is empty", "download the model again", where="model")]
    if found := _check_config(folder):
        return found
    if os.path.lexists(folder / ADAPTER_CONFIG):
        what = f"{folder} holds an adapter beside the model, which transformers would put into it"
        fix = f"move {ADAPTER_CONFIG} and its weights to a folder of their own"
        return [Problem(what, fix, where="model")]
    return [*code_problems(source), *(_check_links(folder) or _check_weights(folder))]


def has_config_alone(source: str) -> bool:
    """Say whether a local folder holds the config of a model but no weights at all."""
    if path_problem(source):
        return False
    folder = Path(source).expanduser()
    if not folder.is_dir() or _check_config(folder):
        return False
    return not any(True for pattern in ("*.safetensors", *PICKLES) for _ in folder.glob(pattern))


def _check_config(folder: Path) -> list[Problem]:
    fix = "pass the folder of a transformers checkpoint"
    try:
        config = read_object(file_in(folder, "config.json"), fix=fix)
    except ModelError as error:
        if (folder / MARKER).is_file():
            what = f"{folder} is a run that has written no model yet"
            fix = "let it end; if it was interrupted, give its command again with --resume"
            return [Problem(what, fix, where="model")]
        what = f"{folder} is no model: it has no readable config.json: {error.problems[0].what}"
        return [Problem(what, fix, where="model")]
    if "model_type" not in config:
        what = f"{folder}/config.json has no model_type, so it is no transformers model"
        return [Problem(what, fix, where="model")]
    return _of_config(folder, config_problems(config))


def _of_config(folder: Path, found: Iterable[str]) -> list[Problem]:
    fix = "restore it from where the model comes from"
    return [Problem(f"{folder}/config.json: {text}", fix, where="model") for text in found]


def _check_links(folder: Path) -> list[Problem]:
    """Look at all that is read of the folder: no link may lead out of it."""
    found = []
    for file in sorted(file for file in folder.iterdir() if file.is_symlink()):
        try:
            file_in(folder, file.name)
        except ModelError as error:
            found.append(as_problem(error, "model"))
    return found


def _check_weights(folder: Path) -> list[Problem]:
    try:
        tensors = check_weights(folder)
    except ModelError as error:
        return [as_problem(error, "model")]
    size = sum((folder / name).stat().st_size for name in set(tensors.values()))
    return _of_config(folder, too_large(config_of(str(folder)) or {}, len(tensors), size))


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        return read_object(file)
    except ModelError:
        return None
