"""A GGUF file, written tensor by tensor and read again.

All through the `gguf` package; nothing here knows of models.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from torch import Tensor

from ...errors import ModelError, NumbersError
from ...model.half_precision import rounded_to

NumberFormat = Literal["f32", "f16", "bf16", "q8_0"]
_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
"""What a file says that most of its tensors are, as llama.cpp numbers them."""


class GGUFFile:
    """A GGUF file that is being written. Tensors are made one at a time, when they are written."""

    def __init__(self, path: Path, architecture: str, numbers: NumberFormat) -> None:
        import gguf

        self.path, self.numbers, self.architecture = path, numbers, architecture
        self.writer = gguf.GGUFWriter(path=None, arch=architecture)
        self.meant: dict[str, Callable[[], Tensor]] = {}

    def set(self, key: str, value: Any) -> None:
        """Set a key; ints are written as unsigned, lists by the type of what they hold."""
        if isinstance(value, bool):
            self.writer.add_bool(key, value)
        elif isinstance(value, int):
            self.writer.add_uint32(key, value)
        elif isinstance(value, float):
            self.writer.add_float32(key, value)
        elif isinstance(value, str):
            self.writer.add_string(key, value)
        else:
            self.writer.add_array(key, value)

    def set_file_type(self) -> None:
        """Say what most tensors are."""
        self.writer.add_file_type(_FILE_TYPES[self.numbers])
        self.writer.add_quantization_version(2)

    def add(self, name: str, shape: tuple[int, ...], make: Callable[[], Tensor]) -> None:
        """Add a tensor of `shape`, which `make` returns once it is written."""
        import gguf

        kind = self._kind(name, shape)
        size, per_block = _bytes(shape, kind), np.uint8 if kind.name in ("BF16", "Q8_0") else None
        dtype = np.dtype(
            np.uint8 if per_block else np.float16 if kind.name == "F16" else np.float32
        )
        stored = shape if not per_block else gguf.quant_shape_to_byte_shape(shape, kind)
        self.writer.add_tensor_info(name, stored, dtype, size, raw_dtype=kind)
        self.meant[name] = make

    def _kind(self, name: str, shape: tuple[int, ...]) -> Any:
        """Return how a tensor is stored: norms and biases, and what does not make whole blocks, in
        full, as llama.cpp wants them."""
        import gguf

        kinds = gguf.GGMLQuantizationType
        if len(shape) < 2:
            return kinds.F32
        if self.numbers == "q8_0" and shape[-1] % gguf.GGML_QUANT_SIZES[kinds.Q8_0][0]:
            return kinds.F16
        return kinds[self.numbers.upper()]

    def write(self) -> None:
        """Write the file. Raises NumbersError where a number does not fit."""
        import gguf

        self.writer.write_header_to_file(path=self.path)
        self.writer.write_kv_data_to_file()
        self.writer.write_ti_data_to_file()
        kinds = {name: info.dtype for infos in self.writer.tensors for name, info in infos.items()}
        for name, make in self.meant.items():
            exact = make().float().contiguous().cpu()
            self.writer.write_tensor_data(_stored(name, exact, kinds[name], gguf))
            for file in self.writer.fout or ():
                _refuse_short(file)
        self.writer.close()

    def refuse_other(self) -> int:
        """Read the file again, tensor by tensor, and return how many it holds. Raises ModelError
        where one is not what was meant, but for the rounding of its format."""
        import gguf

        found = {tensor.name: tensor for tensor in gguf.GGUFReader(self.path).tensors}
        wrong = sorted(set(found) ^ set(self.meant))
        for name in sorted(set(found) & set(self.meant)):
            meant = self.meant[name]().float().cpu().numpy()
            read = gguf.quants.dequantize(found[name].data, found[name].tensor_type)
            if read.shape != meant.shape or not _near(read, meant, found[name].tensor_type.name):
                wrong.append(name)
        if wrong:
            what = f"what was written is not what was meant: {', '.join(wrong[:3])}"
            raise ModelError(what, fix="tell the authors", where=str(self.path))
        return len(found)


def _refuse_short(file: IO[bytes]) -> None:
    """Raise OSError where numpy could not write all and told nobody: it does so of what is small
    enough to wait in a buffer."""
    file.flush()
    there, wanted = os.fstat(file.fileno()).st_size, file.tell()
    if there < wanted:
        raise OSError(f"{wanted} requested and {there} written")


def _stored(name: str, exact: Tensor, kind: Any, gguf: Any) -> Any:
    """Return a tensor as the file holds it. In 16 bits what was added to numbers of 16 bits is
    kept, see `rounded_to`; blocks have scales of their own, on which such numbers do not lie."""
    if kind.name == "F16" and exact.abs().max() > torch.finfo(torch.float16).max:
        what = f"{name} holds numbers that are too large for f16"
        raise NumbersError(what, fix="choose another dtype: --set dtype=bf16")
    if (dtype := _HALF.get(kind.name)) is not None:
        exact = rounded_to(dtype, exact).float()
    return gguf.quants.quantize(exact.numpy(), kind)


_HALF = {"F16": torch.float16, "BF16": torch.bfloat16}


def _bytes(shape: tuple[int, ...], kind: Any) -> int:
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(shape, dtype=np.int64)) // int(block) * int(size)


def _near(read: Any, meant: Any, kind: str) -> bool:
    """Say whether what was read is what was meant, rounded as the format rounds."""
    if kind == "F32":
        return bool(np.array_equal(read, meant))
    if kind == "Q8_0":  # steps of a 127th of the largest of 32, in float16
        blocks = meant.reshape(*meant.shape[:-1], -1, 32)
        step = np.abs(blocks).max(axis=-1, keepdims=True) / 127
        error = np.abs(read.reshape(blocks.shape) - blocks)
        return bool((error <= step * (0.501 + 127 * 2.0**-11) + 2.0**-24 * 127).all())
    # Either neighbour may be what it is rounded to.
    digits, smallest = (10, 2.0**-24) if kind == "F16" else (7, 2.0**-133)
    return bool((np.abs(read - meant) <= np.abs(meant) * 2.0**-digits + smallest).all())


def keys_of(path: Path) -> Mapping[str, Any]:
    """Return the keys of a GGUF file with their values."""
    import gguf

    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def tensors_of(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield name and numbers of each tensor of a GGUF file."""
    import gguf

    for tensor in gguf.GGUFReader(path).tensors:
        yield tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def set_all(file: GGUFFile, values: Iterable[tuple[str, Any]]) -> None:
    """Set keys of the architecture, e.g. `context_length`."""
    for key, value in values:
        file.set(f"{file.architecture}.{key}", value)
