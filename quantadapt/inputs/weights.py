"""safetensors files and their index: headers that add up, and names that stay in the folder."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ..errors import ModelError
from ..paths import INDEX, PICKLES
from .documents import problems_in, read_object, reason, shown

_LONGEST_HEADER = 10**8  # the limit of the safetensors library
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64,
         "I64": 64, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64, "F8_E4M3": 8,
         "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6,
         "F6_E3M2": 6}  # fmt: skip
_FLOATS = ("F", "BF")
"""How the names of such dtypes begin: F32, BF16, F8_E4M3."""
_AGAIN = "download the model again"
WEIGHTS = "model.safetensors"


class _Tensor(BaseModel):
    model_config = ConfigDict(strict=True)
    dtype: str
    shape: list[int]
    data_offsets: list[int] = Field(min_length=2, max_length=2)


def file_in(folder: Path, name: Any) -> Path:
    """Return the file that something in `folder` calls `name`.

    Whatever an index, a config or an archive names is looked up here, so that a name in a
    downloaded file never leads out of its folder.

    Raises:
        ModelError: it is no plain name, or a link that leads elsewhere. The hub's cache keeps its
            files in `blobs`, beside the snapshots; that is no elsewhere.
    """
    where = str(folder)
    plain = isinstance(name, str) and name.strip(". ") and name.isprintable()
    if not plain or any(sign in name for sign in '/\\:"') or len(os.fsencode(name)) > 255:
        what = f"it names a file {shown(name)}, which is no plain file name"
        raise ModelError(what, fix="do not use it: no model needs that", where=where)
    file: Path = folder / name
    refuse_link_out(file, folder)
    return file


def refuse_link_out(file: Path, folder: Path) -> None:
    """Raise ModelError where a file below `folder` is a link that leads out of that, see `file_in`;
    what it leads to would be read, written or handed on in its place."""
    try:
        real, root = file.resolve(), folder.resolve()
    except (OSError, RuntimeError):
        what = f"{file.name} is a link that leads nowhere"
        raise ModelError(what, fix=_AGAIN, where=str(folder)) from None
    if not real.is_relative_to(root) and not _in_cache(real, root):
        what = f"{file.name} is a link that leads out of the folder, to {real}"
        fix = "copy the file there, or pass the folder that holds it"
        raise ModelError(what, fix=fix, where=str(folder))


def _in_cache(real: Path, root: Path) -> bool:
    snapshots = next((p for p in (root, *root.parents) if p.name == "snapshots"), None)
    return snapshots is not None and real.is_relative_to(snapshots.parent / "blobs")


def check_weights(folder: Path) -> Mapping[str, str]:
    """Return tensor name -> file name of a checkpoint folder, in the order of the files. All names
    are plain, each file is a whole safetensors file, and each tensor is in one of them.

    The files are those that transformers reads, and of these it reads every tensor, whether the
    index names it or not.

    Raises:
        ModelError: that is not so, or all weights are pickles.
    """
    refuse_pickles(folder, "*.safetensors")
    indexed = _index(folder)
    names = sorted(set(indexed.values())) or _without_index(folder)
    headers = {name: read_header(file_in(folder, name)) for name in names}
    for file in sorted(folder.glob("*.safetensors")):  # some loaders read those beside, too
        read_header(file_in(folder, file.name))
    found: dict[str, str] = {}
    for name in names:
        for key in headers[name]:
            if key in found:
                what = f"{found[key]} and {name} both hold {shown(key)}: which is meant?"
                fix = f"{_AGAIN}, into an empty folder"
                raise ModelError(what, fix=fix, where=str(folder))
            found[key] = name
    for key, name in indexed.items():
        if key not in headers[name]:
            raise ModelError(f"{name} holds no {shown(key)}", fix=_AGAIN, where=str(folder))
    _refuse_no_floats(folder, {k: headers[name][k]["dtype"] for k, name in found.items()})
    return found


def _refuse_no_floats(folder: Path, dtypes: Mapping[str, str]) -> None:
    """Raise ModelError where a dense weight is of integers: read as floats they would be others. Of
    a layer that is packed there is more than a weight and a bias."""
    parts = ("weight", "bias")
    split = {key: key.rpartition(".") for key in dtypes}
    packed = {layer for layer, _, part in split.values() if part not in parts}
    packed |= {layer.rpartition(".")[0] for layer in packed}  # as in `weight.absmax`
    for key, (layer, _, part) in split.items():
        if part in parts and layer not in packed and not dtypes[key].startswith(_FLOATS):
            what = f"{shown(key)} is of {dtypes[key]}, and weights are floating point numbers"
            raise ModelError(what, fix=_AGAIN, where=str(folder))


def _index(folder: Path) -> dict[str, str]:
    """Return tensor name -> file name as the index says; empty if there is none."""
    index = folder / INDEX
    if not index.exists() and not index.is_symlink():
        return {}
    values = read_object(file_in(folder, INDEX), fix=_AGAIN).get("weight_map")
    if not isinstance(values, dict) or not values:
        raise ModelError("it has no weight_map", fix=_AGAIN, where=str(index))
    names = {shown(name): name for name in values.values()}
    for name in names.values():
        if not file_in(folder, name).is_file():
            raise ModelError(f"the shard {name} is missing", fix=_AGAIN, where=str(folder))
    if os.path.lexists(folder / WEIGHTS) and set(values.values()) != {WEIGHTS}:
        what = f"it holds {WEIGHTS}, and an index of other files: which is meant?"
        fix = f"remove {WEIGHTS}, or {INDEX} and its files"
        raise ModelError(what, fix=fix, where=str(folder))
    return values


def _without_index(folder: Path) -> list[str]:
    """Return the one file that transformers reads, or all of them, as in an adapter's folder."""
    if os.path.lexists(folder / WEIGHTS):
        return [WEIGHTS]
    return sorted(file.name for file in folder.glob("*.safetensors"))


def refuse_pickles(folder: Path, pattern: str) -> None:
    """Raise ModelError where nothing fits `pattern` and the weights are pickles, or missing."""
    if next(folder.glob(pattern), None) is not None:
        return
    pickles = [file.name for kind in PICKLES for file in sorted(folder.glob(kind))]
    if pickles:
        what = f"its weights are pickles ({', '.join(pickles)}), which can run code when read"
        fix = "load it with transformers where you trust it, and save_pretrained it again"
        raise ModelError(what, fix=fix, where=str(folder))
    what = f"it holds no {pattern}"
    raise ModelError(what, fix="download it again, with its weights", where=str(folder))


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Return tensor name -> dtype, shape and data_offsets of a whole safetensors file.

    Raises:
        ModelError: the file is none, is cut short, or its header does not add up.
    """
    try:
        if not file.is_file():
            raise _wrong(file, "is no file")
        size = file.stat().st_size
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > min(size, _LONGEST_HEADER):
                raise _damaged(file)
            header = json.loads(opened.read(length))
    except OSError as error:
        raise _wrong(file, f"cannot be read: {reason(error)}") from None
    except (struct.error, ValueError, RecursionError):
        raise _damaged(file) from None
    if not isinstance(header, dict):
        raise _damaged(file)
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not isinstance(metadata, dict):
        raise _damaged(file)
    end = 0
    for name, tensor in sorted(header.items(), key=_place):
        end = _end(file, name, tensor, end)
    if size != 8 + length + end:
        raise _wrong(file, f"is cut short: {size} bytes, its header announces {8 + length + end}")
    return header


def _place(item: tuple[str, Any]) -> tuple[int, ...]:
    """Return where a tensor lies; the checks come later."""
    offsets = item[1].get("data_offsets") if isinstance(item[1], dict) else None
    whole = isinstance(offsets, list) and all(type(offset) is int for offset in offsets)
    return tuple(offsets) if whole else (-1,)  # type: ignore[arg-type]


def _end(file: Path, name: str, tensor: Any, begin: int) -> int:
    """Return where the data of a tensor end that begin at `begin`."""
    if not isinstance(tensor, dict) or problems_in(_Tensor, tensor):
        raise _damaged(file)
    dtype, shape, (start, end) = tensor["dtype"], tensor["shape"], tensor["data_offsets"]
    bits = _BITS.get(dtype)
    wrong = bits is not None and (end - start) * 8 != bits * math.prod(shape)
    if start != begin or end < start or any(size < 0 for size in shape) or wrong:
        raise _wrong(file, f"is damaged: {shown(name)} does not lie where its header says")
    return int(end)


def _damaged(file: Path) -> ModelError:
    return _wrong(file, "is not a safetensors file, or is damaged")


def _wrong(file: Path, what: str) -> ModelError:
    return ModelError(f"{file.name} {what}", fix="download it again", where=str(file.parent))
