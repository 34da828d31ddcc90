"""CPU memory that a GPU copies from, and to, by itself."""

from __future__ import annotations

import mmap
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..machine import host_memory
from ..memory.cards import size_words

SPARE = 2**30
"""Bytes of CPU memory that are left to others: the system ends processes that take the last."""


def page_locked(nbytes: int, of: str, fix: str, where: str) -> Tensor:
    """Return uint8 [nbytes] in CPU memory that CUDA copies from, and to, by itself. PyTorch's own
    allocator rounds sizes up to powers of two.

    Args:
        of: what is to be kept there, in words.
        fix: what the user can do where it cannot.
        where: the field of the spec that asks for it.

    Raises:
        ModelError: there is not so much, or it cannot be locked.
    """

    def refused(why: str) -> ModelError:
        what = f"no {size_words(nbytes)} of CPU memory can be locked for {of}: {why}"
        return ModelError(what, fix=fix, where=where)

    free = host_memory()
    if free is not None and nbytes + SPARE > free:
        raise refused(f"{size_words(free)} are free, and {size_words(SPARE)} stays so")
    try:
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise refused(str(error)) from error
    row = torch.frombuffer(pages, dtype=torch.uint8)
    code = _cuda_runtime().cudaHostRegister(row.data_ptr(), nbytes, 1)  # for all GPUs
    if int(code) != 0:
        raise refused(f"CUDA error {int(code)}")
    return row


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def unlock(row: Tensor) -> None:
    """Let pages of `page_locked` be ordinary ones again."""
    _cuda_runtime().cudaHostUnregister(row.data_ptr())
