"""The tensors of vendors' layers, laid out as one row of bytes, which have no dtype to agree on."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .held import held_tensors

ALIGNMENT = 16
"""Bytes; what vectorized loads of any dtype want."""

SMALLEST = 2048
"""Bytes; smaller tensors stay where they are. Code tables that all layers share are that small."""


@dataclass
class Leaf:
    """A vendor's tensor, and where its bytes lie in the row."""

    tensor: Tensor
    offset: int
    size: torch.Size
    stride: tuple[int, ...]

    def view(self, row: Tensor) -> Tensor:
        """Return the tensor as a view of `row`, the bytes of all."""
        width = self.tensor.element_size()
        part = row.view(torch.uint8)[self.offset : self.offset + self.size.numel() * width]
        with torch._C.DisableTorchFunctionSubclass():
            return part.view(self.tensor.dtype).as_strided(self.size, self.stride)

    def become(self, view: Tensor) -> None:
        """Let the vendor's tensor have the memory of `view`, perhaps on another device."""
        with torch._C.DisableTorchFunctionSubclass():
            self.tensor.data = view

    def point_to(self, row: Tensor) -> None:
        """Make the vendor's tensor a view of `row`."""
        self.become(self.view(row))


def laid_out(vendors: Iterable[nn.Module], without: Container[str] = ()) -> tuple[list[Leaf], int]:
    """Return the tensors of `vendors` that are not tiny, laid out, and their bytes in all.

    Args:
        without: names of tensors that are left out.
    """
    leaves: list[Leaf] = []
    offsets: dict[Any, int] = {}
    end = 0
    for name, tensor in held_tensors(list(vendors)):
        size = tensor.numel() * tensor.element_size()
        if size < SMALLEST or not _is_dense(tensor) or name.rpartition(".")[2] in without:
            continue
        # some vendors hold a tensor under two names
        key = tensor.data_ptr(), tensor.dtype, tensor.size(), tensor.stride()
        if key not in offsets:
            offsets[key] = end
            end += -(-size // ALIGNMENT) * ALIGNMENT
        leaves.append(Leaf(tensor, offsets[key], tensor.size(), tensor.stride()))
    return leaves, end


def write_into(row: Tensor, leaves: Iterable[Leaf]) -> None:
    """Copy the bytes of all leaves to their places in `row`, uint8."""
    for leaf in leaves:
        data = _as_bytes(leaf.tensor)
        row[leaf.offset : leaf.offset + len(data)].copy_(data)


def _is_dense(tensor: Tensor) -> bool:
    """Say whether the elements lie side by side in memory, in whatever order."""
    steps = zip(tensor.size(), tensor.stride(), strict=True)
    return sum((size - 1) * stride for size, stride in steps) + 1 == tensor.numel()


def _as_bytes(tensor: Tensor) -> Tensor:
    """Return the memory of a dense tensor as uint8 [bytes]."""
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8)
