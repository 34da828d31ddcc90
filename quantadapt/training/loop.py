"""What our trainers do otherwise than those of TRL and transformers: they ask a task.

Whole checkpoints, an exact resume, a stop at the first gradient that is no number, AdaLoRA's rank
allocation, and no telemetry, model cards, token statistics or console output.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..adapting.adalora import load_ranks, save_ranks
from ..adapting.several import kept_apart, weights_to_save
from ..adapting.vblora import refuse_cut_short, saved_whole
from ..distributed.world import world
from ..errors import QuantadaptError, TrainingError
from ..folders.atomic import in_words
from ..folders.checkpoints import PARTIAL, PREFIX, seal
from ..inputs.documents import reason
from ..model.patches import patched
from ..protocols import Task
from ..quantizing.state import note_learnt
from .checkpoints import facts_of, set_rates
from .exact_weights import ExactWeights
from .lent_to_trainers import adds_to_loss
from .losses import checked_loss
from .progress import Progress
from .rescue import AfterStep

if TYPE_CHECKING:
    from ..adapting.fused import FusedLayers
    from ..folders.checkpoints import Checkpoint
    from .expected_calls import ExpectedCalls
    from .memory_fit import MemoryFit
    from .packing import Filling
    from .prepared import Prepared
    from .stopping import Stop
    from .validation import Validation


class TrainingLoop:
    """Mixed into a class of trainer, see `trainer.Setup`."""

    _tag_names: ClassVar[list[str]] = []
    task: Task
    progress: Progress
    # what the trainers below bring along
    model: Any
    args: Any
    state: Any
    control: Any
    optimizer: Any
    accelerator: Any
    is_world_process_zero: Callable[[], bool]
    model_accepts_loss_kwargs: bool
    checkpoints: Path
    saving_to: Path | None = None
    resumed: Checkpoint | None = None
    stop: Stop | None = None
    interrupted: bool = False
    loss_since_log: Any = None
    after_step: AfterStep | None = None
    gradient_check: GradientCheck | None = None
    memory_fit: MemoryFit | None = None
    fused: FusedLayers | None = None
    calls: ExpectedCalls | None = None
    validation: Validation | None = None
    prepared: Prepared | None = None
    packed: Filling | None = None
    exact: ExactWeights | None = None
    passes: int = 1
    """Of the step that goes on; one in validation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.told: list[Mapping[str, Tensor]] = []  # by the passes of the step that goes on
        super().__init__(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: the run folder has its own report."""

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Skip the count, which walks through all parameters at every step."""
        return 0

    def _get_num_items_in_batch(self, batches: list[Any], *_: Any, **__: Any) -> Any:
        """Return the mean count of the processes: gradients are averaged, so that each token of the
        whole batch weighs the same, and what PEFT adds to the loss (AdaLoRA does) counts once."""
        self.begin_step(batches)
        count = self.counted(batches)
        if count is None or self.accelerator.num_processes == 1:
            return count
        return self.accelerator.reduce(count, "mean")

    def begin_step(self, batches: list[Any]) -> None:
        """Let the task look at the batches of a step, with the adapter as it is now."""
        if not batches or self.prepared is None or type(self.task).before_step is Task.before_step:
            return
        if self.fused is not None:
            self.fused.refresh()  # the optimizer has changed what was cast
        before, setup = [dict(batch) for batch in batches], self.prepared.setup
        step = self.state.global_step + 1

        def begin() -> None:
            for batch, was in zip(batches, before, strict=True):
                batch.clear()  # the task may have begun to change it
                batch.update(was)
            self.task.before_step(setup, batches, step)

        if self.memory_fit is None:
            begin()
        else:
            what, waits = f"what comes before step {step}", world().size > 1
            self.memory_fit.with_room(begin, what, waits=waits)

    def counted(self, batches: list[Any]) -> Tensor | None:
        """Return what the task counts in batches, a float32 scalar on the device; None where the
        loss is a mean, as some models take no count."""
        if not self.model_accepts_loss_kwargs:
            return None
        count = float(sum(self.task.count(batch) for batch in batches))
        return torch.tensor(count, device=self.args.device)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Count the tokens, and run the step as memory allows."""
        self.progress.tokens += self.task.tokens(self.model, inputs)
        self.told.clear()
        step = super().training_step  # type: ignore[misc]
        if self.memory_fit is not None:
            step = partial(self.memory_fit.step, step)
        self.passes = getattr(self, "current_gradient_accumulation_steps", 1)
        try:
            loss = step(model, inputs, *args, **kwargs)
        finally:
            self.passes = 1
        self.progress.figures.add(self.told)
        return loss

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Ask the task, which makes no statistics of entropy and accuracy at every step.

        What a PEFT method adds to the model's loss (AdaLoRA does) stays in, as in Trainer;
        SFTTrainer would lose it. So does what the model adds. That counts once a step, as the mean
        of its passes, whatever `gradient_accumulation_steps` is.
        """
        passes, count = self.passes, num_items_in_batch
        if passes > 1 and count is not None and self.task.logits == "model" and adds_to_loss(model):
            found = _shared(self.task.loss(model, inputs, count / passes), passes)
        else:
            found = self.task.loss(model, inputs, count)
        loss, told = checked_loss(self.task, found)
        self.told.append(told)
        return (loss, None) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the task's figures beside the loss."""
        if self.memory_fit is not None:
            self.memory_fit.hear()
        if "loss" in logs:
            logs |= self.progress.figures.taken(self.args.device)
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Stop before the optimizer puts a number that is none into the weights."""
        grad_norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[misc]
        if self.gradient_check is not None:
            self.gradient_check.see(grad_norm, self.state.global_step + 1, self.optimizer)
        return grad_norm

    def _maybe_log_save_evaluate(self, tr_loss: Any, *args: Any, **kwargs: Any) -> None:
        """Show, measure and save no step that turns out to be a bad one."""
        self.loss_since_log = tr_loss
        self.after_step = AfterStep.of(self, tr_loss)  # a validation may fail, too
        control = self.control
        wanted = control.should_log or control.should_save or control.should_evaluate
        if self.gradient_check is not None and wanted:
            self.gradient_check.settle()
        if self.validation is not None and self.control.should_evaluate:
            self.validation.run()  # first, so that a checkpoint of this step knows of it
        self.control.should_evaluate = False
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)  # type: ignore[misc]
        self.after_step = AfterStep.of(self, tr_loss)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.saving_to or self.checkpoints)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the adapter alone: no tokenizer, no pickled arguments, no model card."""
        assert output_dir is not None
        no_card = patched(self.model, create_or_update_model_card=_nothing)
        with kept_apart(self.model), saved_whole(self.model), no_card:
            self.model.save_pretrained(
                output_dir,
                state_dict=state_dict or weights_to_save(self.model),
                save_embedding_layers=False,
                is_main_process=self.args.should_save,
            )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write the checkpoint beside its place and move it there when it is whole."""
        name = f"{PREFIX}{self.state.global_step}"
        partial = self.checkpoints / PARTIAL
        if self.is_world_process_zero():
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.saving_to = partial
        try:
            with in_words(self.checkpoints / name):
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
                if self.calls is not None:
                    self.calls.checkpoint_written()
                if self.is_world_process_zero():
                    save_ranks(self.model, partial / name)
                    if self.validation is not None:
                        self.validation.save(partial / name)
                    if self.prepared is not None:
                        self.prepared.save(partial / name)
                    self.keep_exact().save(partial / name)
                facts = facts_of(self)
                self.accelerator.wait_for_everyone()
                if self.is_world_process_zero():
                    seal(partial / name, self.checkpoints / name, facts)
                # Who ends before it is in its place has others ended by their launcher.
                self.accelerator.wait_for_everyone()
        finally:
            self.saving_to = None
            if self.is_world_process_zero():
                shutil.rmtree(partial, ignore_errors=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with _taking_up(resume_from_checkpoint):
            note_learnt(self.model, self.task)
            if load_ranks(self.model, Path(resume_from_checkpoint)):
                return
            refuse_cut_short(self.model, Path(resume_from_checkpoint))
            with saved_whole(self.model):
                super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Let the next step have the learning rate of the schedule as it is now."""
        if checkpoint is None:
            return
        with _taking_up(checkpoint):
            self.keep_exact().load(Path(checkpoint))
            with self.keep_exact().in_place():
                super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        set_rates(self)

    def keep_exact(self) -> ExactWeights:
        """Return the weights that the optimizer sees in float32, and the model in 16 bits."""
        if self.exact is None:
            self.exact = ExactWeights.of(self.model, self.optimizer)
        return self.exact

    def _load_scaler(self, checkpoint: str | None) -> None:
        with _taking_up(checkpoint):
            super()._load_scaler(checkpoint)  # type: ignore[misc]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _taking_up(checkpoint):
            super()._load_rng_state(checkpoint)  # type: ignore[misc]


def _shared(found: Any, passes: int) -> Any:
    """Return a loss, with what is told beside it, as one of so many that are summed up."""
    return (found[0] / passes, *found[1:]) if isinstance(found, tuple) else found / passes


def _nothing(*_: Any) -> None:
    """In the place of a call that makes what nobody asked for."""


@contextmanager
def _taking_up(checkpoint: str | None) -> Iterator[None]:
    """Turn what is raised about the files of a checkpoint into words: whole they are, but who knows
    who wrote them. Pickles among them are read as torch reads weights, which runs nothing."""
    try:
        yield
    except (QuantadaptError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if checkpoint is None:
            raise
        what = f"the checkpoint cannot be taken up: {reason(error)}"
        fix = "delete it to go on from the one before, or start anew in another --output"
        raise TrainingError(what, fix=fix, where=checkpoint) from error


_FIX = "lower train.learning_rate, use dtype bfloat16 instead of float16, or check the data"


class GradientCheck:
    """Looks at the norm of the gradients of each step.

    Waiting for a GPU at each step would leave it idle while the next one is prepared. So a fused
    optimizer is told on the GPU to skip a bad step (`found_inf`, as a GradScaler tells it), and
    the error comes one step later. Other optimizers have to wait.
    """

    def __init__(self) -> None:
        self._pending: tuple[int, Tensor, Any] | None = None

    def see(self, norm: Any, step: int, optimizer: Any) -> None:
        """Check the norm, a tensor or float, of the gradients that step number `step` is to take.

        Raises:
            TrainingError: it is no number, or that of the step before was none.
        """
        self.settle()
        finite = torch.isfinite(torch.as_tensor(norm)).all()
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        if finite.is_cuda and getattr(inner, "_step_supports_amp_scaling", False):
            inner.found_inf = (~finite).float()
            answer = torch.empty((), dtype=torch.bool, pin_memory=True)
            answer.copy_(finite, non_blocking=True)
            self._pending = step, answer, torch.cuda.current_stream().record_event()
        elif not finite:
            raise _error(step)

    def settle(self) -> None:
        """Wait for the answer about the step seen last. Raises TrainingError if it is bad."""
        if self._pending is None:
            return
        (step, finite, event), self._pending = self._pending, None
        event.synchronize()
        if not finite:
            raise _error(step)


def _error(step: int) -> TrainingError:
    what = f"the loss or its gradient is no number any more at step {step}"
    return TrainingError(what, fix=_FIX, where="train")
