"""How a trainer is set up: the arguments that follow from the spec, one device, no output.

A task chooses the class, of TRL or transformers; `loop.TrainingLoop` holds what all of them do
otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..adapting.adalora import tuner_of
from ..dependencies import moved
from ..distributed.world import unlaunched, world
from ..errors import TrainingError
from ..folders.checkpoints import CHECKPOINTS
from ..memory import LENGTH_MULTIPLE
from ..memory.cards import OOM_FIX
from ..planning.schedules import follows_loss
from .context_parallel import Part, in_parts
from .fewer import Fewer
from .figures import adapter_device, compute_dtype
from .lent_to_trainers import clip_what_is_trained
from .loop import TrainingLoop
from .progress import OnLog, Progress, Watcher
from .shared_rows import share_rows, shares_evenly
from .trackers import PROJECT, run_name

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from ..protocols import Task
    from ..spec import TrainSpec


_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Setup:
    """What a task makes a trainer of.

    Attributes:
        model: a PeftModel.
        tokenizer: the model's.
        dataset: the training data, as the task has read them.
        spec: what the spec says on training.
        output: the run folder.
        seed: for shuffling and dropout.
        on_note: told in a sentence what somebody should know.
        fewer: how many examples memory holds at a time, where it ran out before.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    dataset: Dataset
    spec: TrainSpec
    output: Path
    seed: int
    on_note: Callable[[str], None] = lambda _: None
    fewer: Fewer | None = None

    def at_once(self, work: Callable[[int], _Made], size: int, kind: str, what: str) -> _Made:
        """Return what `work` makes beside the steps of training, given how many examples go through
        the model at a time; see `Fewer.of`. Where memory runs out, fewer do."""
        fewer = self.fewer or Fewer(self.spec, self.on_note)
        return fewer.of(self.model, work, size, kind, what)

    def of(self, held_out: Dataset) -> Setup:
        """Return the setup for batches of held-out examples: nothing is packed."""
        spec = self.spec.model_copy(update={"packing": False})
        return replace(self, dataset=held_out, spec=spec)

    @property
    def pad_token_id(self) -> int:
        """A token to pad with; padding is masked, so which one does not matter."""
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(int(token) for token in candidates if token is not None)

    @property
    def length_multiple(self) -> int | None:
        """What the length of a batch is padded to a multiple of, if anything."""
        parts = self.spec.context_parallel_size
        if adapter_device(self.model).type == "cuda":
            return LENGTH_MULTIPLE * parts
        return parts if parts > 1 else None

    def trainer(
        self,
        kind: type[Any],
        config: type[Any],
        collator: Callable[[list[dict[str, Any]]], dict[str, Any]],
        *,
        options: Mapping[str, Any] | None = None,
        **given: Any,
    ) -> Any:
        """Return a trainer that asks the task at each step.

        Args:
            kind: transformers' Trainer, or a subclass of it. One that has `TrainingLoop` among its
                own bases may override that: compute its loss by itself, for one.
            config: the class of its arguments.
            options: values of `config` beside those that follow from the spec.
            given: more arguments for `kind`.
        """
        device = adapter_device(self.model)
        arguments = _arguments(self.model, self.spec, self.output, self.seed)
        args = _pinned(config(**arguments, **(options or {})), device)
        args.lr_scheduler_type = type(args.lr_scheduler_type)(self.spec.lr_scheduler_type)
        looped = issubclass(kind, TrainingLoop)
        cls = kind if looped else type(kind.__name__, (TrainingLoop, kind), {})
        return cls(
            model=self.model,
            args=args,
            train_dataset=self.dataset,
            data_collator=in_parts(collator, self.spec),
            **given,
        )


def make_trainer(task: Task, setup: Setup, on_log: OnLog | None) -> Any:
    """Return the task's trainer, made quiet. Raises TrainingError, MissingDependency."""
    from transformers import PrinterCallback, TrainerCallback

    from .loop import GradientCheck

    model = setup.model
    progress = Progress()
    watcher = type("Watcher", (Watcher, TrainerCallback), {})(
        progress, on_log or (lambda _: None), tuner_of(model)
    )
    with _in_words(), unlaunched():
        trainer = task.trainer(setup)
        trainer.add_callback(watcher)
    trainer.remove_callback(PrinterCallback)
    clip_what_is_trained(trainer.accelerator, [p for p in model.parameters() if p.requires_grad])
    watcher.trainer, trainer.progress = trainer, progress
    trainer.task = task
    part, evenly = Part.of(setup.spec), shares_evenly(trainer)
    if part.size > 1 or (world().size > 1 and evenly):
        share_rows(trainer, part, evenly=evenly)
    if task.streams:
        trainer.args.train_sampling_strategy = "sequential"
    if task.logits != "model" and type(trainer).compute_loss is TrainingLoop.compute_loss:
        # It is divided by the task's own count, whatever the model or the class of trainer does.
        trainer.model_accepts_loss_kwargs = trainer.loss_is_scaled_for_ga = True
    trainer.checkpoints = setup.output / CHECKPOINTS
    trainer.gradient_check = None if trainer.args.fp16 else GradientCheck()
    return trainer


@contextmanager
def _in_words() -> Iterator[None]:
    """Turn what libraries raise while a trainer is set up into TrainingError."""
    try:
        yield
    except (ValueError, ImportError, RuntimeError) as error:
        fix = "check the keys under train:"
        if isinstance(error, ImportError):
            fix = "install what is missing, or use another train.optim or train.report_to"
        elif type(error).__name__ == "OutOfMemoryError":
            fix = OOM_FIX
        raise TrainingError(f"the trainer cannot be set up: {error}", fix=fix) from error


def _arguments(model: Any, spec: TrainSpec, output: Path, seed: int) -> dict[str, Any]:
    """Return the arguments that every kind of trainer takes."""
    import torch

    device = adapter_device(model)
    return {
        "output_dir": str(output),
        "max_steps": spec.max_steps if spec.max_steps > 0 else -1,
        "num_train_epochs": spec.num_train_epochs,
        "learning_rate": spec.learning_rate,
        "per_device_train_batch_size": spec.per_device_train_batch_size,
        "gradient_accumulation_steps": spec.gradient_accumulation_steps,
        # Where it follows validations, transformers wants to make them: it is told afterwards.
        "lr_scheduler_type": "constant" if follows_loss(spec) else spec.lr_scheduler_type,
        "lr_scheduler_kwargs": dict(spec.lr_scheduler_kwargs),
        "warmup_steps": spec.warmup_ratio,  # transformers 5 reads a value below 1 as a share
        "weight_decay": spec.weight_decay,
        "max_grad_norm": spec.max_grad_norm,
        "optim": spec.optim,
        "gradient_checkpointing": False,  # done by `memory_fit`, layer by layer
        "logging_steps": spec.logging_steps,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if spec.save_steps else "no",
        "save_steps": spec.save_steps or 1,
        "report_to": spec.report_to or "none",
        "run_name": run_name(output),
        "project": PROJECT,
        "seed": seed,
        "data_seed": seed,
        "use_cpu": device.type == "cpu",
        # No autocast: the base computes in its own dtype and the adapters in float32, in training
        # as in evaluation. Only float16 needs the scaler that comes with it.
        "bf16": False,
        "fp16": device.type == "cuda" and compute_dtype(model) == torch.float16,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "push_to_hub": False,
        "dataloader_pin_memory": device.type == "cuda",
        "accelerator_config": {"non_blocking": True},  # a batch sets out while the GPU works
        "average_tokens_across_devices": False,  # see TrainingLoop._get_num_items_in_batch
    }


def _pinned(args: Any, device: torch.device) -> Any:
    """Keep a process on the device where the model is: a single one without DataParallel on other
    GPUs; one of several would otherwise copy its model from "cpu" to "cpu:1"."""
    args.distributed_state.device = device
    args.__dict__["_setup_devices"] = device
    if args.device != device:
        what = f"puts the batches on {args.device}, whatever _setup_devices says"
        raise moved(("transformers",), what, f"the model is on {device}")
    if device.type == "cuda" and args.world_size == 1:
        import torch

        args._n_gpu = 1
        torch.cuda.set_device(device)
    return args
