"""What a loss has to know of the batches of all processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from ..distributed.world import world


def of_all_processes(tensor: Tensor) -> Tensor:
    """Return the tensors [n, ...] of all processes, one after the other, [processes * n, ...].

    All have to call it, with as many rows each. Of what they make of it, the gradients that reach
    each process's own rows are summed; `average_gradients` then gives those of the loss of all.
    """
    if world().size == 1:
        return tensor
    found: Tensor = _Gathered.apply(tensor)  # type: ignore[no-untyped-call]
    return found


def mean_of_processes(count: Tensor) -> Tensor:
    """Return the mean of a count over all processes, which all have to ask for; float32."""
    found = count.float()
    if world().size > 1:
        distributed.all_reduce(found)
        found = found / world().size
    return found


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        found = tensor.new_empty(world().size * len(tensor), *tensor.shape[1:])
        distributed.all_gather_into_tensor(found, tensor.contiguous())
        return found

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        summed = grads[0].contiguous()
        distributed.all_reduce(summed)
        return summed.chunk(world().size)[world().rank]
