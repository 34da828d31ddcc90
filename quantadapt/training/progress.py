"""What a trainer tells as it goes, and what has to happen at its steps: a callback of Trainer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..adapting.adalora import allocate_ranks, set_schedule
from ..distributed.talking import reduced, summed
from ..quantizing.state import note_learnt
from .checkpoints import take_up
from .figures import peak_memory_gib

OnLog = Callable[[dict[str, Any]], None]


@dataclass
class Figures:
    """The means over examples of what a task tells, since the last log; sums stay on the device.

    Attributes:
        sums: name -> [sum, count], float64.
        last: the means that were logged last.
    """

    sums: dict[str, Any] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)

    def add(self, told: Iterable[Mapping[str, Tensor]]) -> None:
        """Add what passes told, a number for each example."""
        for name, numbers in ((n, v) for figures in told for n, v in figures.items()):
            values = numbers.detach().double()
            both = torch.stack([values.sum(), values.new_tensor(len(values))])
            self.sums[name] = both if name not in self.sums else self.sums[name] + both

    def totals(self, device: torch.device) -> dict[str, list[float]]:
        """Return the sums and counts of all processes."""
        return {name: summed(both, device).tolist() for name, both in self.sums.items()}

    def taken(self, device: torch.device) -> dict[str, float]:
        """Return the means over all processes, of what there was any, and begin anew."""
        self.last = {name: total / n for name, (total, n) in self.totals(device).items() if n}
        self.sums = {}
        return self.last


@dataclass
class Progress:
    """What one call has done so far; tokens stay on the device, reading them would wait for it."""

    started: float = 0.0
    first_step: int = 0
    seconds: float = 0.0
    tokens: Any = 0
    figures: Figures = field(default_factory=Figures)
    first_log: tuple[int, float] | None = None

    def seconds_left(self, step: int, most: int) -> float:
        """Return how long the steps after `step` take, by those since the first log: what comes
        before that is compiled and tried out once."""
        if self.first_log is None:
            self.first_log = (step, self.seconds)
            return self.seconds / (step - self.first_step + 1) * (most - step)
        begun, seconds = self.first_log
        return (self.seconds - seconds) / max(step - begun, 1) * (most - step)


@dataclass
class Watcher:
    """Reports progress, forces the first and last log, and drives AdaLoRA and the memory setting.

    Becomes a TrainerCallback where a trainer is made.
    """

    progress: Progress
    on_log_: OnLog
    adalora: Any
    trainer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Choose how memory is used, and start the clock."""
        self._refresh()
        self.trainer.keep_exact().stay = self.adalora is not None
        if self.trainer.memory_fit is not None:
            self.trainer.memory_fit.start()
        if self.trainer.validation is not None:
            self.trainer.validation.start()
        self.progress.started = time.perf_counter()
        self.progress.first_step = state.global_step + 1
        if self.trainer.resumed is not None:
            take_up(self.trainer, self.trainer.resumed)
        if self.adalora is not None:
            set_schedule(self.adalora, state.max_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Cast the adapter, which the optimizer has changed."""
        self._refresh()

    def _refresh(self) -> None:
        if self.trainer.fused is not None:
            self.trainer.fused.refresh()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Until the step ends, its weights are neither the old nor the new ones; from now on they
        have learnt, whatever ends the training."""
        self.trainer.after_step = None
        note_learnt(self.trainer.model, self.trainer.task)

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        """Let AdaLoRA allocate its ranks, while the gradients are there."""
        if self.adalora is None:
            return
        if not getattr(optimizer, "step_was_skipped", False):
            allocate_ranks(self.adalora, state.global_step + 1)
        self.trainer.keep_exact().make_room()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Have the first and the last step logged, and validate where that is due, at the end of an
        epoch, too: before a checkpoint of its last step is written, from which a resumed run begins
        the next one. A resumed run logs what it would have anyway."""
        if state.global_step in (1, state.max_steps):
            control.should_log = True
        self._stop_if_due(args, state, control)
        validation = self.trainer.validation
        if validation is not None and validation.due(
            state.global_step, state.max_steps, ends_epoch=float(state.epoch).is_integer()
        ):
            control.should_evaluate = True

    def _stop_if_due(self, args: Any, state: Any, control: Any) -> None:
        """Save a checkpoint and end, where that is due before the last step."""
        stop, step = self.trainer.stop, state.global_step
        if stop is not None and stop.due(step, args.logging_steps, args.device):
            self.trainer.interrupted = step < state.max_steps
            control.should_save = control.should_training_stop = True

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Hand on what a step was like."""
        if not logs or "loss" not in logs:
            return
        self.progress.seconds = time.perf_counter() - self.progress.started
        tokens = reduced(float(self.progress.tokens), args.device, "sum")
        self.on_log_(
            {
                "step": state.global_step,
                "max_steps": state.max_steps,
                "loss": float(logs["loss"]),
                "learning_rate": float(logs["learning_rate"]),
                "grad_norm": float(logs["grad_norm"]),
                "seconds": self.progress.seconds,
                "seconds_left": self.progress.seconds_left(state.global_step, state.max_steps),
                "tokens": int(tokens),
                "peak_memory_gib": peak_memory_gib(args.device),
                **self.progress.figures.last,
            }
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock."""
        self.progress.seconds = time.perf_counter() - self.progress.started
