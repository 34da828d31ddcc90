"""Fits a training run to the card: probes before the first step, gives way when memory runs out.

A trainer hands each training step to `MemoryFit.step`, which splits the batch into micro-batches;
the trainer's own batch, its accumulation and its losses stay what they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ..adapting.adalora import bytes_to_come
from ..adapting.fused import free
from ..distributed.talking import reduced, tell_main, told_main
from ..distributed.world import world
from ..errors import TrainingError
from ..facade.dense_weights import DenseWeights
from ..machine import host_memory
from ..memory import rules
from ..memory.cards import FRAGMENTATION, LONG_ROWS, OOM_FIX, size_words, usable
from ..memory.optimizers import between_passes
from ..memory.setting import Setting, halves
from ..sharding import is_sharded
from ..streaming import streamer_of
from .figures import compute_dtype
from .lent_to_trainers import adds_to_loss
from .probing import Prober
from .random_state import RandomState
from .recomputing import Recomputer
from .setting_search import Probe, choose, lowered

if TYPE_CHECKING:
    from ..spec import TrainSpec
    from .cuda_graphs import Graphs

_Made = TypeVar("_Made")
_Gradients = list[tuple[Tensor, Tensor | None]]


class MemoryFit:
    """The setting of one training run.

    Args:
        trainer: as `make_trainer` returns it; has not begun yet.
        recomputer: applies settings to its model.
        on_note: told in a sentence what was chosen, and each change.
    """

    def __init__(
        self,
        trainer: Any,
        recomputer: Recomputer,
        spec: TrainSpec,
        on_note: Callable[[str], None] | None = None,
    ) -> None:
        self.trainer, self.recomputer, self.spec = trainer, recomputer, spec
        self.on_note = (lambda _: None) if on_note is None else on_note
        self.weights = [p for p in trainer.model.parameters() if p.requires_grad]
        self.device = self.weights[0].device
        self.batch = spec.per_device_train_batch_size
        self.splits = self._splits(spec)
        self.setting = Setting(0, False, self.batch)
        self.graphs: Graphs | None = None
        self.dense = DenseWeights(nn.Module())
        self.streamer = streamer_of(trainer.model)
        self.host_room = 0
        """Bytes of CPU memory that each process may have; 0 where that is not known."""
        self.streamed_bytes = 0
        """Moved to the device in the steps so far."""

    # --- before the first step ---------------------------------------------------------------

    def start(self) -> None:
        """Choose the setting and apply it. Raises TrainingError if none fits."""
        there = (host_memory() or 0) // world().local_size
        self.host_room = -int(reduced(-float(there), self.device, "max"))
        given = self._given()
        if given is None:
            given = self._probed() if self._probes else self.setting
        self.apply(given)
        if self.setting.input_every > 1:
            size = size_words(self.setting.recomputed_layers * self.input_bytes(self.setting))
            self.on_note(rules.input_every_words(size, size_words(self.host_room)))
        if self.streamer is not None:
            self.streamer.traffic.restart()
        if self.graphs is not None and not self.setting.offload:
            self.graphs.start(self.budget())

    def apply(self, setting: Setting) -> None:
        """Train with `setting` from here on."""
        try:
            self.recomputer.apply(setting := self.hosted(setting))
        except ValueError as error:
            fix = "leave train.gradient_checkpointing and train.memory as they are by default"
            raise TrainingError(str(error), fix=fix, where="train") from error
        self.setting = setting

    @property
    def splits_held_out(self) -> bool:
        """Whether a batch of held-out examples, which are never packed, may go in parts."""
        return self._splits(self.spec.model_copy(update={"packing": False}))

    def _splits(self, spec: TrainSpec) -> bool:
        trainer = self.trainer
        return rules.splits(
            *(trainer.task, spec),
            adds_to_loss=adds_to_loss(trainer.model),
            divides=trainer.model_accepts_loss_kwargs,
        )

    def hosted(self, setting: Setting) -> Setting:
        """Return `setting` with as many inputs in CPU memory as that has room for."""
        if not setting.offload or setting.attention:
            return setting
        needed = setting.recomputed_layers * self.input_bytes(setting)
        return replace(setting, input_every=rules.input_every(needed, self.host_room))

    def input_bytes(self, setting: Setting) -> int:
        """Return the size of the input of a layer, of the longest examples."""
        tokens = setting.micro_batch * max(self.lengths, default=0)
        tokens //= self.spec.context_parallel_size
        return tokens * self.recomputer.hidden * compute_dtype(self.trainer.model).itemsize

    @property
    def _keeps_attention(self) -> bool:
        """Whether recomputed layers may keep what attention returned."""
        alone = not self.spec.packing and self.spec.context_parallel_size == 1
        long = rules.keeps_attention(max(self.lengths, default=0))
        return self.recomputer.keeps_attention and alone and long

    @property
    def _probes(self) -> bool:
        return bool(self.device.type == "cuda")

    def _given(self) -> Setting | None:
        """Return what the spec asks for; None where it is left to the card."""
        on_gpu = self.device.type == "cuda"
        return rules.given(self.spec, self.recomputer.count, self.recomputer.most, offloads=on_gpu)

    def _probed(self) -> Setting:
        """Return the fastest setting that fits. Raises TrainingError if none does."""
        started = time.perf_counter()
        budget, least = self.budget(), self.budget(LONG_ROWS)
        sizes = halves(self.batch) if self.splits else [self.batch]
        prober = Prober(self)
        with prober.undone():
            most, layers = self.recomputer.most, self.recomputer.count
            rooms = (budget, least, self._keeps_attention)
            found = choose(prober.measure, most, layers, sizes, *rooms)
        if found is None:
            what = f"no setting fits {size_words(least)}, the part of the GPU that is free"
            raise TrainingError(what, fix=OOM_FIX, where="train.memory")
        if not found.setting.offload:
            self.recomputer.inputs.release()
        seconds, room = time.perf_counter() - started, least if found.setting.offload else budget
        self.on_note(
            f"memory: {self.describe(found.setting)}; needs {size_words(found.peak)} of"
            f" {size_words(room)} (found in {seconds:.1f} s)"
        )
        self._keep_dense(found, budget)
        return found.setting

    def _keep_dense(self, found: Probe, budget: int) -> None:
        """Have dequantized weights stay where there is room beside what was found."""
        model, needs = self.trainer.model, found.peak
        if not rules.may_keep_dense(self.spec) or is_sharded(model) or self.streamer is not None:
            return
        twice = 2 * found.peak - torch.cuda.memory_allocated(self.device)
        if self.graphs is not None and twice <= budget:  # see `Graphs`
            needs = twice
        if not rules.stays_dense(self.dense.nbytes, budget - needs):
            return
        try:
            self.dense.make()
        except torch.OutOfMemoryError:  # somebody else wanted the room, and training goes without
            self.dense.drop()
        else:
            self.on_note(rules.stays_dense_words(self.dense.nbytes))

    def give_back(self) -> list[str]:
        """Give back the memory that makes training faster alone; say in words what was there."""
        graphs = self.graphs is not None and self.graphs.stop()  # they read dense weights
        found = {"without CUDA graphs": graphs, "without dense weights": self.dense.drop()}
        return [words for words, was_there in found.items() if was_there]

    def with_room(self, work: Callable[[], _Made], what: str, *, waits: bool) -> _Made:
        """Do what is done between steps and takes memory of its own, which was not probed: where it
        runs out, again without what makes training faster alone.

        Args:
            work: may be begun again.
            what: it in words.
            waits: other processes may wait for this one within it, so it is not begun again.
        """
        state = RandomState.of(self.device)
        try:
            return work()
        except torch.OutOfMemoryError:
            without = [] if waits else self.give_back()
            if not without:
                raise
        # Out here, where the error and with it the frames of the work are gone.
        free(self.trainer.model)
        state.put_back()
        self.note(f"out of memory in {what}: from here on {' and '.join(without)}")
        return work()

    def budget(self, lost: float = FRAGMENTATION) -> int:
        """Return how many bytes a step may allocate: what is free, and what the spec allows, less
        the optimizer's states, which come with its first step, and AdaLoRA's importances.

        Args:
            lost: share of it that the allocator may lose.
        """
        free_bytes, total = torch.cuda.mem_get_info(self.device)
        ours = free_bytes + torch.cuda.memory_reserved(self.device)
        allowed = min(ours, int(total * _allowed_share(self.device)))
        there = usable(allowed, context=0, limit=rules.limit(self.spec), lost=lost)
        still_to_come = between_passes(
            sum(weight.numel() for weight in self.weights),
            self.spec.optim,
            accumulates=self.spec.gradient_accumulation_steps > 1,
            begun=bool(self.trainer.optimizer.state),
        )
        still_to_come += bytes_to_come(self.trainer.model)
        return -int(reduced(still_to_come - there, self.device, "max"))

    @cached_property
    def lengths(self) -> list[int]:
        """The length of each training example, in tokens."""
        found: list[int] = self.trainer.task.lengths(self.trainer.train_dataset)
        return found

    @cached_property
    def known_by(self) -> list[int]:
        """What a resumed run knows its data by."""
        found: list[int] = self.trainer.task.known_by(self.trainer.train_dataset)
        return found

    def describe(self, setting: Setting) -> str:
        """Return the setting in words."""
        return setting.describe(self.recomputer.count, self.batch)

    # --- each step ---------------------------------------------------------------------------

    def step(
        self, run: Callable[..., Tensor], model: Any, inputs: dict[str, Any], count: Any = None
    ) -> Tensor:
        """Run one training step, see `_step`, and count what is streamed for it."""
        before = self._moved()
        try:
            return self._step(run, model, inputs, count)
        finally:
            self.streamed_bytes += self._moved() - before

    def _moved(self) -> int:
        return 0 if self.streamer is None else self.streamer.traffic.nbytes

    def _step(
        self, run: Callable[..., Tensor], model: Any, inputs: dict[str, Any], count: Any
    ) -> Tensor:
        """Run one training step, in parts; where memory runs out, again with a lower setting.

        On a CPU a step that was the first to see which layers get the same input is done again, now
        that it is known: else the first step of a resumed run would round otherwise than the same
        step of one that was not interrupted.

        Args:
            run: the trainer's own step: forward, backward, returns the loss.
            inputs: the batch. count: the tokens that its loss is divided by.
        """
        before = self._gradients()
        state = RandomState.of(self.device)
        again = self.device.type == "cpu"
        while True:
            try:
                loss = self._in_parts(run, model, inputs, count)
                if not (again and self._has_learnt()):
                    return loss
                again = False
                self._undo(before, state)
                continue
            except torch.OutOfMemoryError:
                # Others would wait for the rest of this pass, and not begin it again.
                without = [] if self.together else self.give_back()
                lower = self.setting if without else self._lowered()
                if lower is None:
                    raise
            # Out here, where the error and with it the frames of the step are gone.
            self._undo(before, state)
            self.apply(lower)
            step = self.trainer.state.global_step + 1
            words = " and ".join(without) or self.describe(self.setting)
            self.note(f"out of memory at step {step}: from here on {words}")

    def _has_learnt(self) -> bool:
        """Say whether this step was the first to see which layers get the same input: here, or in
        any process where they wait for each other within a pass."""
        learnt = self.trainer.fused.has_learnt()
        return reduced(learnt, self.device, "max") > 0 if self.together else learnt

    def note(self, text: str) -> None:
        """Tell what became of this process alone; the main one tells it of the others, see
        `hear`."""
        self.on_note(text)
        tell_main(f"{text} (process {world().rank})")

    def hear(self) -> None:
        """Tell what the other processes have noted, where this is the main one."""
        for text in told_main():
            self.on_note(text)

    def _in_parts(
        self, run: Callable[..., Tensor], model: Any, inputs: dict[str, Any], count: Any
    ) -> Tensor:
        size = self.setting.micro_batch
        if not self.splits or count is None or size >= self.batch:
            return run(model, inputs, count)
        parts = [*self.trainer.task.parts(inputs, size)]
        losses = [run(model, part, count) for part in parts]
        if is_sharded(self.trainer.model):
            beside = -(-self.batch // size) - len(parts)
            losses += [self._for_the_others(run, model, parts[-1], count) for _ in range(beside)]
        return torch.stack(losses).sum() if len(losses) > 1 else losses[0]

    def _for_the_others(
        self, run: Callable[..., Tensor], model: Any, part: dict[str, Any], count: Tensor
    ) -> Tensor:
        """Run a pass that adds nothing: of an epoch's last rows another process may have one more,
        and so a part more, for which it waits for this one's share of the base."""
        told = len(self.trainer.told)
        loss = run(model, part, torch.full_like(count, torch.inf))
        del self.trainer.told[told:]
        return loss

    def _lowered(self) -> Setting | None:
        if self.together:  # the others go on as before, and wait for this one
            return None
        return lowered(self.setting, self.recomputer.most, self.recomputer.count, self.splits)

    @property
    def together(self) -> bool:
        """Whether other processes wait for this one within a pass."""
        meets = self.trainer.task.meets and world().size > 1
        return meets or self.spec.context_parallel_size > 1 or is_sharded(self.trainer.model)

    def _gradients(self) -> _Gradients:
        """Return the gradients that were accumulated before this step."""
        return [(w, None if w.grad is None else w.grad.clone()) for w in self.weights]

    def _undo(self, before: _Gradients, state: Any) -> None:
        for weight, gradient in before:
            weight.grad = None if gradient is None else gradient.clone()
        self.trainer.told.clear()
        free(self.trainer.model)
        state.put_back()


def _allowed_share(device: torch.device) -> float:
    """Return the share of the card that this process may use (`set_per_process_memory_fraction`);
    PyTorch can tell it from 2.8 on."""
    tell = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    return float(tell(device)) if tell else 1.0
