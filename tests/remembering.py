"""What quantizers find out about a weight is found out once per process.

Most tests quantize the demo's weights, the same ones over and over; what for is another matter each
time. What is remembered goes by every byte that goes in, so a test sees no other numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

MOST = 2**28
"""Bytes of results that are kept; all are let go when there are more."""


class Memory:
    """Results by what they were made from."""

    def __init__(self) -> None:
        self._kept: dict[bytes, list[Tensor]] = {}
        self._size = 0

    def once(
        self, given: Iterable[Tensor], others: Any, make: Callable[[], list[Tensor]]
    ) -> list[Tensor]:
        """Return what `make` makes of tensors and other things that show all of themselves by
        repr, or copies of what it made of the same before."""
        found = blake2b(repr((others, torch.get_num_threads())).encode(), digest_size=16)
        for tensor in given:
            found.update(repr((tensor.dtype, tensor.shape, tensor.stride())).encode())
            found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
        key = found.digest()
        if key not in self._kept:
            made = make()
            self._size += sum(tensor.nbytes for tensor in made)
            if self._size > MOST:
                self._kept.clear()
                self._size = sum(tensor.nbytes for tensor in made)
            self._kept[key] = made
        return [tensor.clone() for tensor in self._kept[key]]


_MEMORY = Memory()


def hqq_once(monkeypatch: Any) -> None:
    """Let hqq's twenty steps to the zero points of a weight be taken once."""
    import quantadapt_hqq.quantize as module

    steps = module._optimized

    def optimized(chunks: list[Any], most: int, axis: int) -> list[Any]:
        tensors = [tensor for chunk in chunks for tensor in chunk]
        if any(tensor.device.type != "cpu" for tensor in tensors):
            return steps(chunks, most, axis)
        made = iter(_MEMORY.once(
            tensors,
            ("hqq", most, axis),
            lambda: [tensor for c in steps(list(chunks), most, axis) for tensor in c[1:]],
        ))  # fmt: skip
        return [chunk._replace(scale=next(made), zero=next(made)) for chunk in chunks]

    monkeypatch.setattr(module, "_optimized", optimized)
