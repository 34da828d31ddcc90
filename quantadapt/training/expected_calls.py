"""What the libraries have to call of ours while a model trains, and a look whether they do.

Trainers are told to do things our way through methods that they call by name, many of them private.
A release that renames one would go on in silence and do the thing its own way. So the calls are
counted, and looked at before the first optimizer step, at each checkpoint and at the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from math import isclose, isfinite
from typing import Any

from ..dependencies import in_words, moved
from ..distributed.world import world


@dataclass(frozen=True)
class Expected:
    """A call that libraries have to make.

    Attributes:
        name: of what is called.
        otherwise: what happens without the call.
        libraries: whose release might leave it out.
        alone: whether it matters in a run of one process, or only costs time there.
        slower: whether it costs time and nothing else.
    """

    name: str
    otherwise: str
    libraries: tuple[str, ...] = ("transformers",)
    alone: bool = True
    slower: bool = False


_TRAINER = ("transformers", "trl")

RESUMING = (
    Expected("_load_from_checkpoint", "the run would go on with an untrained adapter"),
    Expected("_load_optimizer_and_scheduler", "the first step would have an earlier learning rate"),
)
STEP = (
    Expected("_get_num_items_in_batch", "not all tokens of a step would weigh the same"),
    Expected("on_step_begin", "the adapter would compute with weights of an earlier step"),
    Expected("training_step", "a step would not be fitted to the memory there is", _TRAINER),
    Expected("compute_loss", "the loss would be another one", _TRAINER),
    Expected("num_items_in_batch", "the loss would not be divided by the tokens of the step"),
    Expected(
        "clip_grad_norm_",
        "clipping walks through all layers, and does not average over the processes",
        ("transformers", "accelerate"),
        alone=False,
    ),
    Expected("_get_grad_norm", "gradients that are no numbers would get into the weights"),
    Expected("floating_point_ops", "each step counts its operations", slower=True),
)
AFTER_STEP = (
    Expected("on_pre_optimizer_step", "nobody would see that other calls are missing"),
    Expected("on_optimizer_step", "AdaLoRA would never allocate its ranks"),
    Expected("_maybe_log_save_evaluate", "a bad step would be logged and saved"),
)
CHECKPOINT = (
    Expected("_get_output_dir", "the checkpoint would lie in another folder", _TRAINER),
    Expected("_save", "the checkpoint would hold more than the adapter", _TRAINER),
)
SAVING = (Expected("_save_checkpoint", "checkpoints could be left half written", _TRAINER),)


_LOSSES = ("compute_loss", "training_step")


class ExpectedCalls:
    """Counts the calls during one training run; becomes the trainer's last callback.

    Args:
        trainer: as `make_trainer` returns it; has its `memory_fit`.
        on_note: told in a sentence of a missing call that costs time alone.
    """

    def __init__(self, trainer: Any, on_note: Callable[[str], None]) -> None:
        self.trainer, self.on_note = trainer, on_note
        self.made: Counter[str] = Counter()
        self.begun_at = 0
        self._has_count = False
        self._losses: dict[str, Any] = {}
        for expected in (*RESUMING, *STEP, *AFTER_STEP, *CHECKPOINT, *SAVING):
            name = expected.name
            for owner in (trainer, trainer.accelerator):
                if hasattr(owner, name):
                    setattr(owner, name, self._counted(name, getattr(owner, name)))

    def _counted(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.made[name] += 1
            if name == "compute_loss":
                given = kwargs.get("num_items_in_batch", args[3] if args[3:] else None)
                self.made["num_items_in_batch"] += (given is not None) == self._has_count
            result = method(*args, **kwargs)
            if name == "_get_num_items_in_batch":
                self._has_count = result is not None
            if name in _LOSSES and self.made["compute_loss"] == 1:  # the first batch, in one part
                self._losses[name] = result.detach()
            return result

        return call

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """See that a resumed run has its weights, and begin to count; probes do not count."""
        if state.global_step:
            self._check(RESUMING, 1, "to resume")
        trainer = self.trainer
        if trainer.model_wrapped is not trainer.model:
            wrapper = type(trainer.model_wrapped).__name__
            what = f"puts the model into {wrapper}, past Accelerator.prepare_model"
            raise moved(
                ("transformers", "accelerate"), what, "gradients would be averaged by both of us"
            )
        self.made.clear()
        self._losses.clear()
        self.begun_at, trainer.memory_fit.recomputer.calls = state.global_step, 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count; `Watcher` refreshes the adapter's casts then."""
        self.made["on_step_begin"] += 1

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look at what the first step has called, before it changes a weight."""
        self.made["on_pre_optimizer_step"] += 1
        if self.made["on_pre_optimizer_step"] == 1:
            self._check(STEP, 1, "in the first step")
            self._check_recomputing()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count; `Watcher` drives AdaLoRA then."""
        self.made["on_optimizer_step"] += 1

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """See that the first loss was ours; it has been waited for already."""
        losses = [float(loss) for loss in self._losses.values()]
        self._losses.clear()
        asked = (
            getattr(self.trainer, "loss_is_scaled_for_ga", None) is False
        )  # of a task's own class
        known = self._has_count and len(losses) == len(_LOSSES) and all(map(isfinite, losses))
        if known and not asked and not isclose(*losses, rel_tol=1e-3):
            what = "divides the loss, which is one of the whole step, by the number of its batches"
            raise moved(_TRAINER, what, "gradients would be too small")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """See that it was our way of saving."""
        self._check(SAVING, 1, "to save")

    def checkpoint_written(self) -> None:
        """Look at what has been called to write a checkpoint, before it is moved to its place."""
        saves = self.trainer.args.should_save  # one process of all
        self._check(CHECKPOINT if saves else CHECKPOINT[:1], 1, "to save")

    def end(self) -> None:
        """Look at all of the run. Raises TrainingError."""
        args, steps = self.trainer.args, self.trainer.state.global_step - self.begun_at
        self._check([e for e in (*STEP, *AFTER_STEP) if not e.slower], steps, "at each step")
        if args.save_strategy != "no" and args.save_steps <= steps:
            self._check(SAVING, 1, "to save")
        self._check_recomputing()

    def _check(self, expected: Any, times: int, when: str) -> None:
        """Tell of what was called less than `times`. Raises TrainingError where that matters."""
        for call in expected:
            if self.made[call.name] >= times:
                continue
            what = f"does not call {call.name} {when}"
            if not call.slower and (call.alone or world().size > 1):
                raise moved(call.libraries, what, call.otherwise)
            if times == 1:
                self.on_note(f"slower: {in_words(*call.libraries)} {what}: {call.otherwise}")

    def _check_recomputing(self) -> None:
        fit = self.trainer.memory_fit
        if fit.setting.recomputed_layers and not fit.recomputer.calls:
            what = "does not call _gradient_checkpointing_func of layers that are to be recomputed"
            raise moved(("transformers",), what, "training would take more memory than it may")


def expect_calls(trainer: Any, on_note: Callable[[str], None]) -> ExpectedCalls:
    """Count what `trainer` calls from now on; see `ExpectedCalls`."""
    from transformers import TrainerCallback

    calls: ExpectedCalls = type("Calls", (ExpectedCalls, TrainerCallback), {})(trainer, on_note)
    trainer.add_callback(calls)
    return calls
