"""What a base is known by: its config, and the first numbers of each of its tensors.

The same for a hub id and a copy of its folder, for one file and many shards, and for float16 or
bfloat16 weights and the same numbers in float32 or float64. Reads a few KiB a tensor and imports
nothing heavy.
"""

from __future__ import annotations

import json
import math
import struct
from array import array
from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ..errors import ModelError
from ..paths import MANIFEST, local_file, path_problem
from .documents import read_object
from .weights import check_weights, file_in, read_header

COUNT = 512
"""How many numbers of a tensor are looked at."""

_BESIDE = (
    *("architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "id2label"),
    *("initializer_range", "label2id", "pad_token_id", "pretraining_tp", "torch_dtype"),
    *("transformers_version", "use_cache"),
)
"""Of config.json, what says nothing of what a base computes."""
_ROPE = ("rope_parameters", "rope_scaling", "rope_theta")
"""What differs by the version of transformers that wrote a config."""


class Fingerprint(BaseModel):
    """What one base is known by.

    Attributes:
        kind: "files" of a checkpoint; "module" that was made in memory.
        config, weights: digests of both.
        quantized: it is a checkpoint, or was a module, that is quantized already.
        original: the digest of the weights that such a checkpoint was made from, if known.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    kind: Literal["files", "module"]
    config: str
    weights: str
    quantized: bool = False
    original: str = ""

    @property
    def origin(self) -> str:
        """The digest of the unquantized weights, as far as that is known."""
        return self.original or self.weights


def fingerprint_of(source: str) -> Fingerprint | None:
    """Return that of a checkpoint folder, or of a hub id in the local cache; None where its files
    are not here, or are no whole checkpoint."""
    if not source or path_problem(source) or (file := local_file(source, "config.json")) is None:
        return None
    folder = file.parent
    try:
        config, files = read_object(file_in(folder, "config.json")), check_weights(folder)
        digests = {
            key: digest
            for name in sorted(set(files.values()))
            for key, digest in _digests(folder / name)
        }
        quantized = "quantization_config" in config
        original = _original(folder) if quantized else ""
    except (ModelError, OSError):
        return None
    return Fingerprint(
        kind="files",
        config=_of_config(config),
        weights=_of_weights(digests),
        quantized=quantized,
        original=original,
    )


def fingerprint_of_module(
    config: Mapping[str, Any],
    digests: Mapping[str, str],
    layers: Iterable[str],
    *,
    quantized: bool,
) -> Fingerprint:
    """Return that of a live module: of the weights of its `layers`, by name, as `digests_of` gave
    them before they were quantized, or as they came if they were `quantized` already. What is
    dense, such as a new head, may start at random."""
    places = tuple(f"{name}." for name in layers)
    kept = {name: digest for name, digest in digests.items() if f"{name}.".startswith(places)}
    weights = _of_weights(kept)
    return Fingerprint(
        kind="module", config=_of_config(config), weights=weights, quantized=quantized
    )


def digests_of(named: Iterable[tuple[str, Any]]) -> dict[str, str]:
    """Return a digest for each tensor of a live module."""
    return {name: _digest(list(t.shape), _first_numbers(t)) for name, t in named}


def difference(then: Fingerprint, now: Fingerprint) -> str | None:
    """Say what differs between the base that an adapter was trained on and another one; empty where
    nothing does, None where they cannot be compared."""
    if then.kind != now.kind:
        return None
    if now.kind == "module" and (then.quantized or now.quantized):
        # Codes do not tell the dense weights, and tensors of a vendor's class hide their numbers.
        both = then.quantized and now.quantized
        return "other weights" if both and then.weights != now.weights else None
    if then.weights != now.weights and then.origin != now.origin:
        return "other weights"
    same_files = then.weights == now.weights
    return (
        "the same weights, but another config" if same_files and then.config != now.config else ""
    )


def difference_of_original(then: Fingerprint, now: Fingerprint) -> str | None:
    """Say what differs between the unquantized base of an adapter and another unquantized one, as
    `difference` does."""
    if then.kind != now.kind or (then.quantized and not then.original):
        return None
    return "other weights" if then.origin != now.origin else ""


def _original(folder: Path) -> str:
    """Return what a quantized checkpoint of ours notes of the weights that it was made from."""
    values = read_object(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    noted = values.get("fingerprint")
    if values.get("adapter") is not None or not isinstance(noted, Mapping):
        return ""  # what an adapter is merged into are other weights
    found = noted.get("original") or noted.get("weights")
    return found if isinstance(found, str) and noted.get("kind") == "files" else ""


def _of_config(config: Mapping[str, Any]) -> str:
    """Return the digest of what a config says of the computation. What is false, empty or zero is
    left out: another version of transformers may write it, or not."""
    kept = {key: value for key, value in config.items() if key not in (*_BESIDE, *_ROPE) and value}
    rope: dict[str, Any] = {}
    for key in _ROPE:
        value = config.get(key)
        rope |= value if isinstance(value, Mapping) else {key: value} if value else {}
    rope = {("rope_type" if key == "type" else key): value for key, value in rope.items()}
    if rope.get("rope_type") == "default":
        del rope["rope_type"]
    public = {key: value for key, value in kept.items() if not key.startswith("_")}
    text = json.dumps([public, rope], sort_keys=True, default=str)
    return _hex(text.encode("utf-8", "surrogatepass"))


def _of_weights(digests: Mapping[str, str]) -> str:
    return _hex(json.dumps(sorted(digests.items())).encode("utf-8", "surrogatepass"))


def _hex(data: bytes) -> str:
    return sha256(data).hexdigest()[:32]


def _digest(shape: list[int], numbers: bytes) -> str:
    return _hex(json.dumps(shape).encode() + numbers)


def _first_numbers(tensor: Any) -> bytes:
    """Return the first numbers of a live tensor. One of a class of a vendor's tells its shape."""
    if type(tensor).__name__ not in ("Tensor", "Parameter") or tensor.is_meta:
        return b""
    first = tensor.detach().reshape(-1)[:COUNT].cpu()
    found = first.float() if first.is_floating_point() else first
    return bytes(found.numpy().tobytes())


def _digests(file: Path) -> Iterable[tuple[str, str]]:
    header = read_header(file)
    with file.open("rb") as opened:
        begin = 8 + struct.unpack("<Q", opened.read(8))[0]
        for name, tensor in header.items():
            start, end = tensor["data_offsets"]
            count = math.prod(tensor["shape"])
            opened.seek(begin + start)
            first = opened.read((end - start) * min(count, COUNT) // max(count, 1))
            numbers = _FLOATS.get(tensor["dtype"], bytes)(first)
            yield name, _digest(tensor["shape"], numbers)


def _from_bfloat16(data: bytes) -> bytes:
    """Return bfloat16 numbers as float32, which is exact: they are its upper halves."""
    wide = bytearray(2 * len(data))
    wide[2::4], wide[3::4] = data[0::2], data[1::2]
    return bytes(wide)


def _from_float16(data: bytes) -> bytes:
    numbers = struct.unpack(f"<{len(data) // 2}e", data)
    return struct.pack(f"<{len(numbers)}f", *numbers)


def _from_float64(data: bytes) -> bytes:
    """Return float64 numbers as float32: those that were widened are what they were."""
    return array("f", array("d", data)).tobytes()


_FLOATS: Mapping[str, Callable[[bytes], bytes]] = {
    "BF16": _from_bfloat16,
    "F16": _from_float16,
    "F64": _from_float64,
}
