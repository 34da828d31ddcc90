"""A safetensors checkpoint, read tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from torch import Tensor

from ..inputs.weights import check_weights, read_header
from ..model.numbers import refuse_not_numbers


class Checkpoint:
    """The tensors of a checkpoint folder, by name, read one at a time."""

    def __init__(self, source: str) -> None:
        self.folder = local_folder(source)
        self.files = dict(check_weights(self.folder))

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor."""
        headers = (read_header(self.folder / file) for file in set(self.files.values()))
        return {key: tuple(facts["shape"]) for header in headers for key, facts in header.items()}

    @property
    def size(self) -> int:
        """Bytes of all its weights' files."""
        return sum((self.folder / file).stat().st_size for file in set(self.files.values()))

    def __contains__(self, key: str) -> bool:
        return key in self.files

    def shards(self) -> Iterator[tuple[str, list[str]]]:
        """Yield (file name, keys in it), file by file."""
        for file in dict.fromkeys(self.files.values()):
            yield file, [key for key, name in self.files.items() if name == file]

    def read(self, key: str) -> Tensor:
        """Return one tensor, on the CPU, as it is stored. Raises NumbersError where it holds NaN or
        infinity."""
        from safetensors import safe_open

        with safe_open(self.folder / self.files[key], framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(key)
        refuse_not_numbers([(key, tensor)], where=str(self.folder))
        return tensor


def local_folder(path: str) -> Path:
    """Return the folder of a checkpoint; that of a hub id is downloaded if it has to be."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.json"]))
