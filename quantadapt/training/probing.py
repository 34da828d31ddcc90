"""Single passes over the longest examples, before the first step: what a setting of a step needs of
memory, and how long it takes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ..adapting.fused import free
from ..distributed.talking import reduced
from ..distributed.world import world
from ..errors import TrainingError
from ..memory import rules
from ..memory.cards import OOM_FIX
from ..memory.setting import Setting
from .random_state import RandomState
from .setting_search import Probe

if TYPE_CHECKING:
    from .memory_fit import MemoryFit


class Prober:
    """Runs single passes over the longest examples and measures them."""

    def __init__(self, memory_fit: MemoryFit) -> None:
        self.fit, self.trainer, self.device = memory_fit, memory_fit.trainer, memory_fit.device
        sizes = memory_fit.lengths
        self.longest = sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)
        self.warm: set[int] = set()

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Give back gradients, random states and memory afterwards."""
        state = RandomState.of(self.device)
        try:
            yield
        finally:
            for weight in self.fit.weights:
                weight.grad = None
            free(self.trainer.model)
            torch.cuda.reset_peak_memory_stats(self.device)
            state.put_back()

    def measure(self, setting: Setting) -> Probe | None:
        """Return what a pass under `setting` takes, on the process where it takes most; None where
        it does not fit on one. Raises TrainingError if that is so, and others wait for it within
        the pass."""
        if setting.offload and setting.attention and not self._has_host_room(setting):
            return None
        self.fit.apply(setting := self.fit.hosted(setting))
        batch, found = self._batch(setting.micro_batch), None
        try:
            if setting.micro_batch not in self.warm:  # the first pass compiles and loads kernels
                self._pass(setting, batch)
                self.warm.add(setting.micro_batch)
            locked = self.fit.recomputer.inputs.nbytes
            found = self._pass(setting, batch)
            if self.fit.recomputer.inputs.nbytes > locked:  # which takes long, once
                found = self._pass(setting, batch)
        except torch.OutOfMemoryError as error:
            if self.fit.together and world().size > 1:
                what = "the GPU has run out of memory before the first step"
                raise TrainingError(what, fix=OOM_FIX, where="train") from error
        if found is None:
            free(self.trainer.model)
        return self._agreed(found)

    def _has_host_room(self, setting: Setting) -> bool:
        """Say whether CPU memory has room for inputs of layers, and for what attention returned,
        which is about as large."""
        needed = 2 * setting.recomputed_layers * self.fit.input_bytes(setting)
        return rules.has_host_room(needed, self.fit.host_room)

    def _agreed(self, found: Probe | None) -> Probe | None:
        """Return what all processes have to come to the same choice by."""
        if reduced(float(found is None), self.device, "max") or found is None:
            return None
        return Probe(
            found.setting,
            peak=int(reduced(found.peak, self.device, "max")),
            held=int(reduced(found.held, self.device, "max")),
            seconds=reduced(found.seconds, self.device, "max"),
        )

    def _pass(self, setting: Setting, batch: dict[str, Any]) -> Probe:
        trainer, device = self.trainer, self.device
        self._set_gradients(setting)
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        trainer.model_wrapped.train()
        count = trainer.counted([batch])
        loss = trainer.compute_loss(trainer.model_wrapped, dict(batch), num_items_in_batch=count)
        held = torch.cuda.memory_allocated(device)
        trainer.accelerator.backward(loss)
        torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
        return Probe(setting, torch.cuda.max_memory_allocated(device), held, seconds)

    def _set_gradients(self, setting: Setting) -> None:
        """Let gradients be there as they are in a step: where it has several passes, those of the
        passes before; else none, they come as backward goes."""
        fit = self.fit
        several = fit.spec.gradient_accumulation_steps > 1 or setting.micro_batch < fit.batch
        for weight in fit.weights:
            weight.grad = torch.zeros_like(weight) if several else None

    def _batch(self, size: int) -> dict[str, Any]:
        rows = [self.trainer.train_dataset[i] for i in self.longest[:size]]
        batch: dict[str, Any] = self.trainer._prepare_inputs(self.trainer.data_collator(rows))
        return batch
