"""Several processes, one device each: who is who, and what they tell each other.

`torchrun`, `accelerate launch` and `quantadapt run --gpus N` (`launching`) all say in the
environment who is who. torch is imported only when processes have to talk.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from ..errors import TrainingError
from .world import World, world

if TYPE_CHECKING:
    import torch


PATIENCE = timedelta(hours=2)
"""How long a process waits for the others, e.g. while the first one calibrates."""

BUCKET = 2**24
"""Gradients sent at a time: 64 MiB in float32."""

_ENDED, _NOTES = "quantadapt-ended", "quantadapt-notes"
_PEER_LOST = re.compile(r"gloo|nccl|connection (was )?(closed|reset)|broken pipe", re.IGNORECASE)


class PeerLost(TrainingError):
    """Another process of the run has stopped; its own error says why."""

    exit_code = 3


def start(device: str) -> World:
    """Join the other processes, once, and wait until all are there. One process needs nothing.

    Args:
        device: this process's; with NCCL between GPUs, gloo elsewhere.
    """
    mine = world()
    if mine.size == 1:
        return mine
    import torch
    from torch import distributed

    if device.startswith("cuda"):
        torch.cuda.set_device(torch.device(device))
    if not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        distributed.init_process_group(backend, timeout=PATIENCE)
    return mine


def stop() -> None:
    """Leave the other processes, when all is done."""
    from torch import distributed

    if world().size > 1 and distributed.is_initialized():
        distributed.destroy_process_group()


@contextmanager
def peers_in_words() -> Iterator[None]:
    """Turn what collectives raise when another process is gone into `PeerLost`."""
    try:
        yield
    except RuntimeError as error:
        if world().size == 1 or not _PEER_LOST.search(f"{type(error).__name__} {error}"):
            raise
        what = f"another process of this run has stopped; this is process {world().rank}"
        raise PeerLost(what, fix="look for the error of that process") from error


def tell_end(code: int) -> None:
    """Let the others know that this process was told to end early, before they miss it."""
    if (store := _store()) is not None:
        store.set(_ENDED, str(code))


def told_end() -> int:
    """Return the exit code with which another process said that it ends early, or 0."""
    store = _store()
    return int(store.get(_ENDED)) if store is not None and store.check([_ENDED]) else 0


def tell_main(text: str) -> None:
    """Leave a sentence for the main process, which alone is heard; see `told_main`."""
    if not world().is_main and (store := _store()) is not None:
        store.set(f"{_NOTES}-{store.add(_NOTES, 1)}", text)


def told_main() -> list[str]:
    """Return the sentences that others have left since this was called before; none, but in the
    main process."""
    if not world().is_main or (store := _store()) is None:
        return []
    last, heard = store.add(_NOTES, 0), store.add(f"{_NOTES}-heard", 0)
    store.add(f"{_NOTES}-heard", last - heard)
    return [store.get(f"{_NOTES}-{number}").decode() for number in range(heard + 1, last + 1)]


def _store() -> Any:
    """Return where the processes have met, or None for one alone."""
    from torch import distributed

    if world().size == 1 or not distributed.is_initialized():
        return None
    return distributed.distributed_c10d._get_default_store()


def reduced(value: float, device: torch.device, how: Literal["sum", "max"]) -> float:
    """Return the "sum" or "max" of `value` over all processes."""
    if world().size == 1:
        return value
    import torch
    from torch import distributed

    tensor = torch.tensor(float(value), dtype=torch.float64, device=device)
    operation = distributed.ReduceOp.MAX if how == "max" else distributed.ReduceOp.SUM
    distributed.all_reduce(tensor, operation)
    return float(tensor)


def summed(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the sum of a tensor over all processes, on the CPU; on `device` they talk."""
    if world().size == 1:
        return tensor
    from torch import distributed

    there = tensor.to(device)
    distributed.all_reduce(there)
    return there.cpu()


def share(tensors: Iterable[torch.Tensor]) -> None:
    """Give every process the main process's values, in place."""
    if world().size > 1:
        from torch import distributed

        for tensor in tensors:
            distributed.broadcast(tensor.detach(), src=0)


def average_gradients(parameters: Iterable[torch.Tensor]) -> None:
    """Replace each gradient by its mean over all processes.

    A parameter that got none here counts as zero; one that got none anywhere keeps none.
    """
    if world().size == 1:
        return
    for bucket in _buckets([parameter for parameter in parameters if parameter.requires_grad]):
        _average(bucket)


def _buckets(parameters: list[Any]) -> Iterator[list[Any]]:
    """Yield runs of parameters of one dtype, each of about `BUCKET` elements."""
    bucket: list[Any] = []
    for parameter in parameters:
        full = sum(p.numel() for p in bucket) >= BUCKET
        if bucket and (full or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def _average(bucket: list[Any]) -> None:
    """Average one bucket's gradients, and with them who got one: a process that has them all need
    not wait for the GPU to know that all are used."""
    import torch
    from torch import distributed

    given = [parameter.grad is not None for parameter in bucket]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
    here = bucket[0].new_ones(len(bucket)) if all(given) else bucket[0].new_tensor(given)
    flat = torch.cat([*(grad.reshape(-1) for grad in grads), here])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    *parts, anywhere = torch.split(flat, [*(p.numel() for p in bucket), len(bucket)])  # type: ignore[no-untyped-call]
    used = given if all(given) else anywhere.tolist()
    for parameter, part, is_used in zip(bucket, parts, used, strict=True):
        parameter.grad = part.view_as(parameter) if is_used else None
