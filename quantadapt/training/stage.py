"""`train`: what happens in a training run, from the first look at the folder to the figures.

Nothing of the model is left changed but the adapter's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapting.merge_aware import make_merge_aware, tell_it_stays
from ..data.batches import SEQUENCES
from ..data.positions import beyond, check_lengths
from ..data.vocabulary import check_tokens
from ..distributed.talking import average_gradients, reduced, share, start
from ..distributed.world import world
from ..errors import DataError, ModelError, TrainingError
from ..folders.checkpoints import STATE, Checkpoint, finished, too_few_steps
from ..folders.metrics import many
from ..memory.cards import GIB, OOM_FIX, size_words
from ..memory.setting import Setting
from ..records import Objective
from ..registry.discovery import registry
from .checking import check, check_held_out, config_of, embedding_rows
from .checkpoints import checkpoint_to_resume, refuse_other_data, refuse_unshared
from .context_parallel import in_parts
from .expected_calls import expect_calls
from .fewer import Fewer
from .figures import (
    Streamed,
    adapter_device,
    base_parameters,
    dequantize_share,
    peak_memory_gib,
    rounding_share,
    streamed,
)
from .lent import lent
from .lent_to_trainers import quiet
from .loop import TrainingLoop
from .memory_fit import MemoryFit
from .next_tokens import refuse_foresight
from .packing import Filling, filling
from .prepared import Prepared
from .progress import OnLog, Watcher
from .rescue import save_what_is_done
from .shared_rows import repeated_rows
from .stopping import Stop
from .trackers import spare
from .trainer import Setup, make_trainer
from .validation import Validation, best_of, curve, has_stopped

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from ..protocols import Task
    from ..spec import TrainSpec


def train(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    spec: TrainSpec,
    *,
    task: Task | None = None,
    output: Path,
    seed: int,
    held_out: Dataset | None = None,
    on_log: OnLog | None = None,
    on_note: Callable[[str], None] | None = None,
    stop: Stop | None = None,
    keeps: bool = True,
) -> TrainResult:
    """Train the adapter of `model`, in place.

    Args:
        model: a PeftModel over a causal or an encoder-decoder language model.
        dataset: the columns that the task reads; for sft `input_ids` and `completion_mask`.
        task: the options of the objective; those of sft by default.
        output: run folder; checkpoints go to `output / "checkpoints"`.
        held_out: examples that `spec` may have measured while training; the columns of `dataset`.
        on_log: called at the first, the last and every `logging_steps`-th step with step,
            max_steps, loss, learning_rate, grad_norm, seconds, seconds_left, tokens and
            peak_memory_gib (of this process); and after each validation with step, max_steps,
            eval_loss in nats per token, whether that is the `best`, and the seconds that it took.
        on_note: told in a sentence how memory is used, where that was chosen or had to change.
        stop: may end it early; by default when `spec.max_time` is over, from now on.
        keeps: whether `output` outlives this call, so that where a step fails for good what was
            learnt before it is saved there.

    Raises:
        PlanRefused: the task does not go with the adapter or with `spec`.
        TrainingError: a setting cannot be used, the loss is no number, or memory runs out.
        OutputError: there are checkpoints of another run, or writing one failed.
        Interrupted: it ended early, as `stop` said, and left a checkpoint.
        KeyboardInterrupt: as it came; earlier checkpoints are whole, none is half written.
    """
    note = (lambda _: None) if on_note is None else on_note
    task = task or registry().record(Objective, "sft").task()
    check(model, spec, task)
    check_held_out(spec, held_out)
    if spec.merge_aware:
        make_merge_aware(model)  # and it stays so: it is what is evaluated, saved and merged
    else:
        tell_it_stays(model)
    _check_examples(model, tokenizer, (dataset, held_out), note)
    checkpoint = checkpoint_to_resume(Path(output), spec, note)
    start(str(adapter_device(model)))  # torch.distributed, where there are several processes
    refuse_unshared(Path(output), spec, adapter_device(model))
    share(p for p in model.parameters() if p.requires_grad)  # all begin with the same weights
    fewer = Fewer(spec, note)
    setup = Setup(model, tokenizer, dataset, spec, Path(output), seed, note, fewer)
    begun = checkpoint.path if checkpoint else None
    measured = None if spec.validates == "no" else held_out
    prepared = Prepared.by(task, setup, measured, begun, note)  # a reference's words, for one
    setup, measured = prepared.setup, prepared.held_out
    # kernels, casts and the like; taken back at the end
    with task.holding(setup, note), lent(model, spec, task, note) as loans:
        if task.wants_lm:
            refuse_foresight(model, note, getattr(dataset, "column_names", None) or ())
        trainer = make_trainer(task, setup, on_log)  # task.trainer: trl's SFTTrainer, for one
        trainer.packed = _packed(trainer, setup, note)
        trainer.prepared = prepared
        trainer.fused = loans.fused
        trainer.memory_fit = fewer.fit = MemoryFit(trainer, loans.recomputer, spec, on_note)
        trainer.memory_fit.graphs, trainer.memory_fit.dense = loans.graphs, loans.dense
        _tell_of_repeated_rows(trainer, note)
        if measured is not None:
            collator = in_parts(task.collator(setup.of(measured)), spec)
            trainer.validation = Validation(
                trainer, measured, collator, spec, on_log or (lambda _: None), note
            )
            trainer.validation.checkpoint = begun
        trainer.stop = stop or Stop(spec.max_time)
        trainer.calls = expect_calls(trainer, note)
        spare(trainer, note)
        _run(trainer, checkpoint, note, keeps)  # Trainer.train, see below
        if trainer.validation is not None:
            trainer.validation.end()  # may put the best weights back
        return _result(trainer, checkpoint)


def _check_examples(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    parts: Sequence[Dataset | None],
    note: Callable[[str], None],
) -> None:
    """Raise DataError where the model has no embedding for a token, or no positions for a length;
    say what else of the lengths somebody should know, once."""
    for part in parts:
        check_tokens(part, embedding_rows(model), tokenizer)
        check_lengths(part, config_of(model))
    for words in dict.fromkeys(beyond(part, config_of(model)) for part in parts):
        if words:
            note(f"data: {words}")


def _packed(trainer: Any, setup: Setup, note: Callable[[str], None]) -> Filling | None:
    """Return how packed rows are filled, and say it; None where examples are not packed."""
    if not setup.spec.packing:
        return None
    in_rows = SEQUENCES in setup.dataset.column_names
    found = filling(trainer.train_dataset, in_rows=in_rows)
    if found:
        note(f"packing: {found.words}")
    return found


def _tell_of_repeated_rows(trainer: Any, note: Callable[[str], None]) -> None:
    if again := repeated_rows(trainer):
        note(
            f"data: {len(trainer.train_dataset):,} rows do not divide evenly among"
            f" {world().size} processes: at the end of an epoch {again} of them count again"
        )


# What transformers' Trainer.train calls of ours, in this order; `expected_calls` sees that it does.
BEFORE = (
    TrainingLoop._load_from_checkpoint,  # only where a run is resumed
    TrainingLoop._load_optimizer_and_scheduler,  # likewise
    Watcher.on_train_begin,
    MemoryFit.start,  # chooses what is recomputed, on a GPU by passes over the longest examples
)
EACH_STEP = (
    TrainingLoop._get_num_items_in_batch,  # task.before_step; task.count, to divide the loss by
    Watcher.on_step_begin,  # the adapter's casts follow what the optimizer has changed
    TrainingLoop.training_step,  # once for each batch that accumulates; task.tokens
    MemoryFit.step,  # in parts if need be (task.parts), and again where memory runs out
    TrainingLoop.compute_loss,  # task.loss; Trainer.training_step then calls accelerator.backward
    average_gradients,  # over the processes, in place of accelerator.clip_grad_norm_, which clips
    TrainingLoop._get_grad_norm,  # stops at a number that is none, before the optimizer steps
    Watcher.on_optimizer_step,  # AdaLoRA allocates its ranks while the gradients are there
    Watcher.on_step_end,  # the first and the last step are logged
    TrainingLoop._maybe_log_save_evaluate,  # with `train.eval_steps`, at some: Validation.run
    Watcher.on_log,  # at some steps: the caller's on_log
    TrainingLoop._save_checkpoint,  # at some steps: beside its place, and moved there when whole
    TrainingLoop._save,  # the adapter alone
)
AFTER = (Watcher.on_train_end,)


@dataclass(frozen=True, repr=False)
class TrainResult:
    """What a training run did.

    Attributes:
        steps: optimizer steps done in all, those before a resume included.
        losses: (step, mean loss since the entry before) of all logged steps, in nats per token.
        validation: (step, mean loss on held-out data) of all validations, in nats per token.
        best_step: the step where that was lowest; None without validations.
        kept_step: the step whose weights the model has; the last one, or the best.
        stopped_early: whether patience ended the training.
        seconds: wall-clock time of the training loop of this call, without validations.
        tokens: tokens without padding that went through the model in this call, over all processes.
        peak_memory_gib: of the GPU during this call, or of the process where there is none; the
            highest of all processes.
        resumed_from: the step of the checkpoint that this call went on from, or None.
        trainable_parameters: number of weights that were trained.
        base_parameters: number of frozen weights, as if they were dense.
        setting: how the last step traded time for memory.
        layers: how many layers that setting speaks of.
        longest: tokens of the longest example.
        dequantize_share: share of `seconds` that went into dequantizing the base; None for a
            sharded or streamed one.
        rounding_share: what rounding took more than that, where adapted layers compute with rounded
            weights (`merge_aware`); else None.
        streamed: what streaming the base took; None where it was not.
        packed: how packed rows were filled; None where examples were not packed.
    """

    steps: int
    losses: list[tuple[int, float]]
    validation: list[tuple[int, float]]
    best_step: int | None
    kept_step: int
    stopped_early: bool
    seconds: float
    tokens: int
    peak_memory_gib: float
    resumed_from: int | None
    trainable_parameters: int
    base_parameters: int
    setting: Setting
    layers: int
    longest: int
    dequantize_share: float | None
    rounding_share: float | None = None
    streamed: Streamed | None = None
    packed: Filling | None = None

    def __repr__(self) -> str:
        words = [f"{many(self.steps, 'step')} in {self.seconds:.1f} s, {self.tokens:,} tokens"]
        for name, found in (("loss", self.losses), ("held-out loss", self.validation)):
            if found:
                words.append(f"{name} {found[0][1]:.4g} to {found[-1][1]:.4g}")
        if self.kept_step != self.steps:
            words.append(f"the adapter of step {self.kept_step} is kept")
        words.append(f"peak memory {size_words(self.peak_memory_gib * GIB)}")
        if self.streamed:
            words.append(self.streamed.words)
        return f"<TrainResult {', '.join(words)}>"


def _result(trainer: Any, checkpoint: Checkpoint | None) -> TrainResult:
    model, device, fit = trainer.model, trainer.memory_fit.device, trainer.memory_fit
    steps, measured = trainer.state.global_step, curve(trainer.state.log_history)
    return TrainResult(
        steps=steps,
        validation=measured,
        best_step=best_of(measured),
        kept_step=trainer.validation.kept_step if trainer.validation else steps,
        stopped_early=has_stopped(measured, fit.spec) and steps < trainer.state.max_steps,
        losses=[(e["step"], e["loss"]) for e in trainer.state.log_history if "loss" in e],
        seconds=trainer.progress.seconds,
        tokens=int(reduced(float(trainer.progress.tokens), device, "sum")),
        peak_memory_gib=reduced(peak_memory_gib(device), device, "max"),
        resumed_from=checkpoint.step if checkpoint else None,
        trainable_parameters=sum(weight.numel() for weight in fit.weights),
        base_parameters=base_parameters(model),
        setting=fit.setting,
        layers=fit.recomputer.count,
        longest=max(fit.lengths),
        dequantize_share=dequantize_share(trainer, fit.spec),
        rounding_share=rounding_share(trainer, fit.spec),
        streamed=streamed(trainer),
        packed=trainer.packed,
    )


def _run(
    trainer: Any, checkpoint: Checkpoint | None, tell: Callable[[str], None], keeps: bool
) -> None:
    """Train, or go on from `checkpoint`; turn what may go wrong into words."""
    import torch

    if checkpoint is not None:
        refuse_other_data(trainer, checkpoint)
        if _is_finished(trainer, checkpoint, tell):
            return
        trainer.resumed = checkpoint
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.stop.hold()
    try:
        with quiet():
            path = str(checkpoint.path) if checkpoint else None
            trainer.train(resume_from_checkpoint=path)
        trainer.calls.end()
    except (ModelError, DataError, torch.OutOfMemoryError) as error:
        if keeps:
            save_what_is_done(trainer, error, tell)
        if not isinstance(error, torch.OutOfMemoryError):  # a streamed base, a picture that is gone
            raise
        words = trainer.memory_fit.describe(trainer.memory_fit.setting)
        what = f"the GPU has run out of memory, with {words}"
        raise TrainingError(what, fix=OOM_FIX, where="train") from error
    finally:
        if trainer.exact is not None:
            trainer.exact.put_back()
    if trainer.interrupted:
        raise trainer.stop.error(trainer.state.global_step, trainer.state.max_steps)


def _is_finished(trainer: Any, checkpoint: Checkpoint, tell: Callable[[str], None]) -> bool:
    """Load a checkpoint if it was the last one, and say so, or where training goes on."""
    from transformers import TrainerState

    spec = trainer.memory_fit.spec
    if problem := too_few_steps(checkpoint, spec):
        raise TrainingError(problem.what, fix=problem.fix, where=problem.where)
    state = TrainerState.load_from_json(str(checkpoint.path / STATE))
    if not finished(checkpoint, spec) and not has_stopped(curve(state.log_history), spec):
        tell(f"training goes on after step {checkpoint.step}")
        return False
    tell(f"all {checkpoint.step} steps had been done: nothing was trained")
    trainer._load_from_checkpoint(str(checkpoint.path))
    trainer.state = state
    if trainer.validation is not None:
        trainer.validation.load(checkpoint.path)
    return True
