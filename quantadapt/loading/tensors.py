"""A safetensors checkpoint, read tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from ..paths import INDEX
from .reading import local_folder


class Checkpoint:
    """The tensors of a checkpoint folder, by name, read one at a time."""

    def __init__(self, source: str) -> None:
        self.folder = local_folder(source)
        self.files = _weight_map(self.folder)

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
        """Return one tensor, on the CPU, as it is stored."""
        from safetensors import safe_open

        with safe_open(self.folder / self.files[key], framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(key)
        return tensor


def _weight_map(folder: Path) -> dict[str, str]:
    """Return tensor name -> file name, in the order of the files."""
    from safetensors import safe_open

    index = folder / INDEX
    if index.exists():
        found: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return dict(sorted(found.items(), key=lambda item: item[1]))
    names: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            names |= dict.fromkeys(opened.keys(), file.name)
    return names
