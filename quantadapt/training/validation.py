"""Validation while training: the loss on held-out examples, the best step, and when to stop.

What was measured stands in the trainer's `log_history`, and so in each checkpoint; the weights of
the best step lie beside it. So a resumed run goes on as if it had not been interrupted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapting.adalora import tuner_of
from ..distributed.talking import reduced
from ..distributed.world import world
from ..errors import TrainingError
from ..planning.schedules import follows_loss
from .figures import adapter_device

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor, nn

    from ..spec import TrainSpec
    from .progress import OnLog

BEST_FILE = "best.pt"
_FULL = (
    "the GPU has run out of memory in validation, in a pass that the processes of this run make"
    " together, so that none can begin it again"
)
_FULL_FIX = (
    "lower train.per_device_train_batch_size, whose batches it has, or data.max_length, use a base"
    " with fewer bits, or leave train.eval_steps and train.eval_strategy out"
)
KEY = "eval_loss"
"""What transformers calls the loss on held-out data."""


def curve(log_history: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
    """Return (step, loss on held-out data) of all validations, the last of each step."""
    return list({entry["step"]: (entry["step"], entry[KEY]) for entry in log_history
                 if KEY in entry}.values())  # fmt: skip


def best_of(measured: Sequence[tuple[int, float]]) -> int | None:
    """Return the step with the lowest loss, the first of equals; None where none is a number."""
    finite = [(loss, step) for step, loss in measured if math.isfinite(loss)]
    return min(finite)[1] if finite else None


def waited(measured: Sequence[tuple[int, float]], threshold: float) -> int:
    """Return how many validations have passed since the loss last fell by more than `threshold`
    below the lowest before, as transformers' EarlyStoppingCallback counts them."""
    best, count = math.inf, 0
    for _, loss in measured:
        count = 0 if best - loss > threshold else count + 1
        best = min(best, loss) if math.isfinite(loss) else best
    return count


def has_stopped(measured: Sequence[tuple[int, float]], spec: TrainSpec) -> bool:
    """Say whether early stopping ends a run that has measured this."""
    patience = spec.early_stopping_patience
    return patience is not None and waited(measured, spec.early_stopping_threshold) >= patience


@dataclass
class Kept:
    """The adapter as it was at one step: trained weights, buffers beside them, AdaLoRA's ranks."""

    step: int
    tensors: dict[str, Tensor]
    ranks: Any = None

    @classmethod
    def of(cls, model: Any, step: int) -> Kept:
        """Copy it to the CPU."""
        found = {name: tensor.detach().cpu().clone() for name, tensor in _adapter(model)}
        return cls(step, found, _config(model).rank_pattern if tuner_of(model) else None)

    def restore(self, model: Any) -> None:
        """Make it the model's adapter again."""
        import torch

        with torch.no_grad():
            for name, tensor in _adapter(model):
                tensor.copy_(self.tensors[name])
        if tuner_of(model):
            _config(model).rank_pattern = self.ranks


def _adapter(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield what training changes: weights that are trained, and the buffers of their modules."""
    for prefix, module in model.named_modules():
        own = [(n, p) for n, p in module.named_parameters(recurse=False) if p.requires_grad]
        beside = list(module.named_buffers(recurse=False)) if own else []
        yield from ((f"{prefix}.{name}", tensor) for name, tensor in (*own, *beside))


def _config(model: Any) -> Any:
    return model.peft_config[tuner_of(model).trainable_adapter_name]


class Validation:
    """What a run measures on held-out examples while it trains.

    Args:
        trainer: as `make_trainer` returns it; has its `memory_fit`.
        examples: held-out examples, with the columns of the training data that the loss reads.
        collator: makes batches of them; nothing is packed.
        on_log: called after each validation with step, max_steps, eval_loss, seconds, and whether
            that is the `best` so far.
        on_note: told in a sentence when training stops early.
    """

    def __init__(
        self,
        trainer: Any,
        examples: Dataset,
        collator: Callable[[list[dict[str, Any]]], dict[str, Any]],
        spec: TrainSpec,
        on_log: OnLog,
        on_note: Callable[[str], None],
    ) -> None:
        self.trainer, self.spec = trainer, spec
        self.on_log, self.on_note = on_log, on_note
        self.collator = collator
        lengths = trainer.task.lengths(examples)
        self.order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        self.examples = examples
        self.kept: Kept | None = None
        self.checkpoint: Path | None = None
        self.at_once: int | None = None
        """Most examples of a pass, in this process; None for all of a batch."""

    @property
    def measured(self) -> list[tuple[int, float]]:
        """(step, loss in nats per token) so far, what a resumed run had measured included."""
        return curve(self.trainer.state.log_history)

    def due(self, step: int, last: int, *, ends_epoch: bool) -> bool:
        """Say whether to measure after this step."""
        every = self.spec.eval_steps or self.spec.logging_steps
        at = ends_epoch if self.spec.validates == "epoch" else step % every == 0
        return self.spec.validates != "no" and (at or step == last)

    def start(self) -> None:
        """Take up the best weights of a run that is resumed, and measure one batch, to see that it
        can be done. Raises TrainingError where it cannot."""
        if self.checkpoint is not None:
            self.load(self.checkpoint)
        try:
            self._loss([self.order[: self._rows]] * world().size)  # none is larger
        except (KeyError, AttributeError, IndexError, TypeError, ValueError) as error:
            what = "the objective's loss cannot be computed on the held-out examples"
            reason = f"{type(error).__name__}: {error}"
            fix = "have its task hold out examples with the columns that it trains on, or leave"
            fix += " train.eval_steps and train.eval_strategy out"
            raise TrainingError(f"{what}: {reason}", fix=fix, where="train") from error

    def run(self) -> None:
        """Measure, tell, keep the best weights, and end training where patience is exhausted."""
        trainer, started = self.trainer, time.perf_counter()
        state, control = trainer.state, trainer.control
        logs = control.should_log  # which is off after any log
        size = self._rows
        batches = [self.order[at : at + size] for at in range(0, len(self.order), size)]
        loss = self._loss(batches)
        seconds = time.perf_counter() - started
        trainer.progress.started += seconds  # the clock is that of training
        trainer.log({KEY: loss, "eval_runtime": seconds})
        trainer.control = trainer.callback_handler.on_evaluate(
            trainer.args, state, control, {KEY: loss}
        )
        trainer.control.should_log = logs
        if follows_loss(self.spec):
            trainer.lr_scheduler.step(loss)
        step, best = state.global_step, best_of(self.measured)
        if best == step and self.spec.load_best_model_at_end:
            self.kept = Kept.of(trainer.model, step)
        told = {"step": step, "max_steps": state.max_steps, KEY: loss, "best": best == step}
        self.on_log({**told, "seconds": seconds})
        if has_stopped(self.measured, self.spec):
            trainer.control.should_training_stop = trainer.control.should_log = True

    def end(self) -> None:
        """Put the best weights into the model, where that is wanted, and say what was kept."""
        measured = dict(self.measured)
        best, last = best_of(self.measured), self.trainer.state.global_step
        if has_stopped(self.measured, self.spec) and last < self.trainer.state.max_steps:
            count, least = self.spec.early_stopping_patience, self.spec.early_stopping_threshold
            times = f"{count} validations" if count != 1 else "a validation"
            by = f" by more than {least:g}" if least else ""
            self.on_note(
                f"training stopped early, after step {last}: the loss on held-out data has not"
                f" fallen{by} for {times}"
            )
        if best is None or best == last or last not in measured:
            return
        what = f"the loss on held-out data was lowest at step {best}: {measured[best]:.4g},"
        if self.kept is None:
            advice = "train.load_best_model_at_end would keep that step's adapter"
            self.on_note(f"{what} and {measured[last]:.4g} at the last; {advice}")
            return
        self.kept.restore(self.trainer.model)
        self.on_note(f"{what} {measured[last]:.4g} at the last; the adapter of step {best} is kept")

    @property
    def kept_step(self) -> int:
        """The step whose weights the model has at the end."""
        return self.kept.step if self.kept else int(self.trainer.state.global_step)

    def save(self, folder: Path) -> None:
        """Write the best weights beside a checkpoint."""
        import torch

        if self.kept is not None:
            torch.save(vars(self.kept), folder / BEST_FILE)

    def load(self, folder: Path) -> None:
        """Take the best weights from a checkpoint. Raises TrainingError where it was written
        without `load_best_model_at_end`."""
        import torch

        if not self.spec.load_best_model_at_end:
            return
        if (folder / BEST_FILE).is_file():
            self.kept = Kept(**torch.load(folder / BEST_FILE, weights_only=True))
        elif self.measured:
            what = "the weights of the best step so far are not in this checkpoint"
            fix = "leave train.load_best_model_at_end as it was, or start anew"
            raise TrainingError(what, fix=fix, where=str(folder))

    @property
    def _rows(self) -> int:
        """Examples of a batch: one that all processes train with, who may train with others where
        one has run out of memory."""
        device = adapter_device(self.trainer.model)
        return -int(reduced(-float(self.trainer.memory_fit.setting.micro_batch), device, "max"))

    def _loss(self, batches: Sequence[Sequence[int]]) -> float:
        """Return the mean loss over all that counts in `batches` of indices; each process of a run,
        or each group that shares rows, takes its part, and all as many, as those of a sharded base
        have to."""
        share = self.spec.context_parallel_size
        rank, size = world().rank // share, world().size // share
        total = count = 0.0
        for at in range(0, len(batches), size):
            own = at + rank < len(batches)
            batch = batches[at + rank if own else at]
            rows = [self.examples[i] for i in batch]
            loss, counted = self._batch_loss(rows)
            total, count = total + own * loss * counted, count + own * counted
        device = adapter_device(self.trainer.model)
        return reduced(total, device, "sum") / reduced(count, device, "sum")

    def _batch_loss(self, rows: list[dict[str, Any]]) -> tuple[float, float]:
        """Return the mean loss of a batch, without dropout, and what it is the mean of. Where
        memory runs out, it is measured in parts."""
        trainer = self.trainer
        batch = trainer._prepare_inputs(self.collator(rows))
        trainer.begin_step([batch])
        count, divisor = float(trainer.task.count(batch)), trainer.counted([batch])
        if divisor is not None:
            divisor.clamp_(min=1)  # in a part of a row there may be none
        if trainer.fused is not None:
            trainer.fused.refresh()  # the optimizer has changed what was cast
        return self._fitting(batch, len(rows), divisor), count

    def _fitting(self, batch: dict[str, Any], count: int, divisor: Any) -> float:
        """Return the loss of a batch of so many examples, of as many at a time as memory holds.
        Raises TrainingError where it runs out and other processes wait for the rest of a pass."""
        import torch

        from ..adapting.fused import free

        fit = self.trainer.memory_fit
        while True:
            try:
                measure = partial(self._pass, batch, divisor)
                loss: float = fit.with_room(measure, "validation", waits=fit.together)
                return loss
            except torch.OutOfMemoryError as error:
                if fit.together and world().size > 1:
                    raise TrainingError(_FULL, fix=_FULL_FIX, where="train") from error
                most = min(self.at_once or count, count)
                if most == 1 or divisor is None or not fit.splits_held_out:
                    raise
            self.at_once = -(-most // 2)
            free(self.trainer.model)
            fit.note(f"out of memory in validation: from here on {self.at_once} examples at a time")

    def _pass(self, batch: dict[str, Any], divisor: Any) -> float:
        import torch

        from ..evaluation.predictions import evaluating

        trainer, device = self.trainer, adapter_device(self.trainer.model)
        parts = [batch] if self.at_once is None else trainer.task.parts(batch, self.at_once)
        devices = [device] if device.type == "cuda" else []
        with evaluating(trainer.model), torch.random.fork_rng(devices), torch.no_grad():
            # not the trainer's attribute: those calls are counted, see `expected_calls`
            compute = type(trainer).compute_loss
            losses = [
                compute(trainer, trainer.model, part, num_items_in_batch=divisor) for part in parts
            ]
        return float(torch.stack(losses).sum()) if len(losses) > 1 else float(losses[0])
