"""CPU memory that a GPU copies from by itself."""

from __future__ import annotations

import mmap
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..memory.cards import size_words


def page_locked(nbytes: int) -> Tensor:
    """Return uint8 [nbytes] in CPU memory that CUDA copies from by itself. PyTorch's own allocator
    rounds sizes up to powers of two.

    Raises:
        ModelError: there is not so much, or it cannot be locked.
    """
    try:
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise _no_memory(nbytes, str(error)) from error
    row = torch.frombuffer(pages, dtype=torch.uint8)
    code = _cuda_runtime().cudaHostRegister(row.data_ptr(), nbytes, 1)  # for all GPUs
    if int(code) != 0:
        raise _no_memory(nbytes, f"CUDA error {int(code)}")
    return row


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def unlock(row: Tensor) -> None:
    """Let pages of `page_locked` be ordinary ones again."""
    _cuda_runtime().cudaHostUnregister(row.data_ptr())


def _no_memory(nbytes: int, why: str) -> ModelError:
    what = f"no {size_words(nbytes)} of CPU memory can be locked for a block: {why}"
    fix = (
        "free memory, keep the base on a fast disk (train.stream_folder), use a backend with fewer"
        " bits, or train.stream: experts, or none"
    )
    return ModelError(what, fix=fix, where="train.stream")
