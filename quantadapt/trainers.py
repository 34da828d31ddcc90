"""The trainers: TRL's SFTTrainer (causal) or transformers' Seq2SeqTrainer, made quiet.

`_Loop` holds everything that differs from what those trainers do by themselves: whole checkpoints,
an exact resume, a stop at the first gradient that is no number, AdaLoRA's rank allocation, and no
telemetry, model cards, token statistics or console output. Nothing of the model is left
changed but the adapter's weights.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from .adalora import load_ranks, save_ranks, tuner_of
from .collators import CausalCollator, EncoderDecoderCollator
from .distributed import average_gradients
from .errors import OutputError, TrainingError
from .progress import OnLog, Progress, Watcher

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from .fitting import Fitting
    from .fused import FusedTraining
    from .gradient_check import GradientCheck
    from .spec import TrainSpec

CHECKPOINTS = "checkpoints"
PREFIX = "checkpoint-"
STATE = "trainer_state.json"


class _Loop:
    """Mixed into SFTTrainer and Seq2SeqTrainer."""

    _tag_names: ClassVar[list[str]] = []
    progress: Progress
    # what the trainers below bring along
    model: Any
    args: Any
    state: Any
    control: Any
    optimizer: Any
    accelerator: Any
    is_world_process_zero: Callable[[], bool]
    checkpoints: Path
    saving_to: Path | None = None
    fused_head: Literal["ours", "trl"] | None = None
    pads_right: bool = False
    gradient_check: GradientCheck | None = None
    fitting: Fitting | None = None
    fused: FusedTraining | None = None

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: the run folder has its own report."""

    def _send_telemetry(self) -> None:
        """Send none."""

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Skip the count, which walks through all parameters at every step."""
        return 0

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        seen = inputs.get("attention_mask")
        self.progress.tokens += inputs["input_ids"].numel() if seen is None else seen.sum()
        if "labels" in inputs and seen is not None and self.model.config.is_encoder_decoder:
            self.progress.tokens += (inputs["labels"] != -100).sum()
        step = super().training_step  # type: ignore[misc]
        if self.fitting is not None:
            return self.fitting.step(step, model, inputs, *args, **kwargs)
        return step(model, inputs, *args, **kwargs)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Leave out the entropy and accuracy that SFTTrainer computes at every step.

        What a PEFT method adds to the model's loss (AdaLoRA does) stays in, as in Trainer;
        SFTTrainer would lose it.
        """
        inputs["use_cache"] = False
        if self.pads_right:
            inputs.pop("attention_mask", None)
        counted = inputs.pop("counted", None)
        if self.fused_head == "ours":
            inputs["counted"] = counted
        if not self.fused_head:
            from transformers import Trainer

            return Trainer.compute_loss(
                self, model, inputs, return_outputs, num_items_in_batch=num_items_in_batch
            )
        outputs = model(**inputs, fused_lm_head=True, num_items_in_batch=num_items_in_batch)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _get_num_items_in_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Return the mean count of the processes: gradients are averaged, so that each token of the
        whole batch weighs the same, and what PEFT adds to the loss (AdaLoRA does) counts once."""
        count = super()._get_num_items_in_batch(*args, **kwargs)  # type: ignore[misc]
        if count is None or self.accelerator.num_processes == 1:
            return count
        return self.accelerator.reduce(count.to(self.args.device).float(), "mean")

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Stop before the optimizer puts a number that is none into the weights."""
        grad_norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[misc]
        if self.gradient_check is not None:
            self.gradient_check.see(grad_norm, self.state.global_step + 1, self.optimizer)
        return grad_norm

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Show and save no step that turns out to be a bad one."""
        wanted = self.control.should_log or self.control.should_save
        if self.gradient_check is not None and wanted:
            self.gradient_check.settle()
        super()._maybe_log_save_evaluate(*args, **kwargs)  # type: ignore[misc]

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.saving_to or self.checkpoints)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the adapter alone: no tokenizer, no pickled arguments, no model card."""
        assert output_dir is not None
        self.model.save_pretrained(
            output_dir,
            state_dict=state_dict,
            save_embedding_layers=False,
            is_main_process=self.args.should_save,
        )
        (Path(output_dir) / "README.md").unlink(missing_ok=True)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write the checkpoint beside its place and move it there when it is whole."""
        name = f"{PREFIX}{self.state.global_step}"
        partial = self.checkpoints / ".partial"
        if self.is_world_process_zero():
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.saving_to = partial
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            if self.is_world_process_zero():
                save_ranks(self.model, partial / name)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                shutil.rmtree(self.checkpoints / name, ignore_errors=True)
                os.replace(partial / name, self.checkpoints / name)
        except OSError as error:
            fix = "free some space, or write elsewhere with output"
            what = f"the checkpoint cannot be written: {error.strerror or error}"
            raise OutputError(what, fix=fix, where=str(self.checkpoints / name)) from error
        finally:
            self.saving_to = None
            if self.is_world_process_zero():
                shutil.rmtree(partial, ignore_errors=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not load_ranks(self.model, Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]


def make_trainer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    spec: TrainSpec,
    output: Path,
    seed: int,
    on_log: OnLog | None,
) -> Any:
    """Return SFTTrainer or Seq2SeqTrainer over `model`. Raises TrainingError, MissingDependency."""
    from transformers import PrinterCallback, TrainerCallback

    from .gradient_check import GradientCheck

    progress = Progress()
    watcher = type("Watcher", (Watcher, TrainerCallback), {})(
        progress, on_log or (lambda _: None), tuner_of(model)
    )
    make = _seq2seq_trainer if model.config.is_encoder_decoder else _causal_trainer
    try:
        trainer = make(model, tokenizer, dataset, spec, _arguments(model, spec, output, seed))
        trainer.add_callback(watcher)
    except (ValueError, ImportError, RuntimeError) as error:
        fix = "check the keys under train:"
        raise TrainingError(f"the trainer cannot be set up: {error}", fix=fix) from error
    trainer.remove_callback(PrinterCallback)
    _clip_what_is_trained(trainer.accelerator, [p for p in model.parameters() if p.requires_grad])
    watcher.trainer, trainer.progress = trainer, progress
    trainer.checkpoints = output / CHECKPOINTS
    trainer.gradient_check = None if trainer.args.fp16 else GradientCheck()
    return trainer


def _causal_trainer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    spec: TrainSpec,
    arguments: dict[str, Any],
) -> Any:
    with quiet(), _without_statistics(model):
        from trl import SFTConfig, SFTTrainer

        if spec.packing:
            dataset = _packed(dataset)
        cls = type("CausalTrainer", (_Loop, SFTTrainer), {})
        # the data are tokenized already; max_length and packing have been dealt with
        skip = {"skip_prepare_dataset": True}
        args = _pinned(
            SFTConfig(**arguments, max_length=None, dataset_kwargs=skip), adapter_device(model)
        )
        trainer = cls(
            model=model,
            args=args,
            train_dataset=dataset,
            processing_class=tokenizer,
            data_collator=CausalCollator(
                _pad_token_id(tokenizer), spec.packing, _length_multiple(adapter_device(model))
            ),
        )
    trainer.fused_head = _fuse_head(model)
    # Padding at the end is seen by no token that counts, and attention without a mask is faster.
    # Only routers look at all tokens.
    text = model.config.get_text_config()
    trainer.pads_right = not getattr(text, "output_router_logits", False)
    return trainer


def _seq2seq_trainer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    spec: TrainSpec,
    arguments: dict[str, Any],
) -> Any:
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    if spec.packing:
        raise ValueError("packing is for causal models, this is an encoder-decoder model")
    if all(dataset[0]["completion_mask"]):
        raise ValueError("an encoder-decoder model needs prompts, but the data are plain text")
    cls = type("EncoderDecoderTrainer", (_Loop, Seq2SeqTrainer), {})
    eos = model.config.eos_token_id
    return cls(
        model=model,
        args=_pinned(Seq2SeqTrainingArguments(**arguments), adapter_device(model)),
        train_dataset=dataset,
        data_collator=EncoderDecoderCollator(_pad_token_id(tokenizer), eos),
    )


def _arguments(model: Any, spec: TrainSpec, output: Path, seed: int) -> dict[str, Any]:
    """Return the arguments that both kinds of trainer take."""
    import torch

    device = adapter_device(model)
    return {
        "output_dir": str(output),
        "max_steps": spec.max_steps if spec.max_steps > 0 else -1,
        "num_train_epochs": spec.num_train_epochs,
        "learning_rate": spec.learning_rate,
        "per_device_train_batch_size": spec.per_device_train_batch_size,
        "gradient_accumulation_steps": spec.gradient_accumulation_steps,
        "lr_scheduler_type": spec.lr_scheduler_type,
        "warmup_steps": spec.warmup_ratio,  # transformers 5 reads a value below 1 as a share
        "weight_decay": spec.weight_decay,
        "max_grad_norm": spec.max_grad_norm,
        "optim": spec.optim,
        "gradient_checkpointing": False,  # done by `fitting`, layer by layer
        "logging_steps": spec.logging_steps,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if spec.save_steps else "no",
        "save_steps": spec.save_steps or 1,
        "report_to": spec.report_to or "none",
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
        "average_tokens_across_devices": False,  # see _get_num_items_in_batch
    }


def _pinned(args: Any, device: torch.device) -> Any:
    """Keep a process on the device where the model is: a single one without DataParallel on other
    GPUs; one of several would otherwise copy its model from "cpu" to "cpu:1"."""
    args.distributed_state.device = device
    args.__dict__["_setup_devices"] = device
    if device.type == "cuda" and args.world_size == 1:
        import torch

        args._n_gpu = 1
        torch.cuda.set_device(device)
    return args


def _clip_what_is_trained(accelerator: Any, trained: list[nn.Parameter]) -> None:
    """Clip the adapter's gradients without a walk through all modules; several processes average
    them first, once a step.

    That is in place of DistributedDataParallel, so that the model stays what it is: adapters are
    whole on every process, and a base that is sharded gathers itself.
    """
    prepare, clip = accelerator.prepare_model, accelerator.clip_grad_norm_

    def prepared(model: Any, *_: Any, **__: Any) -> Any:
        return prepare(model, device_placement=False, evaluation_mode=True)

    def clipped(_: Any, *args: Any, **kwargs: Any) -> Any:
        average_gradients(trained)
        return clip(trained, *args, **kwargs)

    accelerator.clip_grad_norm_ = clipped
    if accelerator.use_distributed:
        accelerator.prepare_model = prepared


def _packed(dataset: Dataset) -> Dataset:
    """Put several examples into one row, as long as the longest example."""
    from trl import pack_dataset

    longest = max(map(len, dataset["input_ids"]))
    packed: Dataset = pack_dataset(dataset, seq_length=longest, strategy="bfd")
    return packed


@contextmanager
def _without_statistics(model: Any) -> Iterator[None]:
    """Take out again the head that SFTTrainer patches in: it makes statistics at every step."""
    base = model.get_base_model()
    before = base.__dict__.get("forward")
    yield
    base.__dict__.pop("forward", None)
    if before is not None:
        base.__dict__["forward"] = before


def _length_multiple(device: torch.device) -> int | None:
    """On CUDA, batches are padded to few different lengths: cuDNN plans attention for each."""
    return 64 if device.type == "cuda" else None


def _fuse_head(model: Any) -> Literal["ours", "trl"] | None:
    """Compute the loss without ever holding all logits, where that can be; say whose way it is.

    A forward that somebody has patched stays in use.
    """
    from .losses import add_head_loss

    base = model.get_base_model()
    if "forward" in base.__dict__ or base.base_model is base:
        return None
    if add_head_loss(base):
        return "ours"
    if adapter_device(model).type == "cpu":  # TRL's way is no faster there than the model's own
        return None
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(base)
    return "trl"


@contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars and advice of the libraries off the screen; errors still come through."""
    import datasets
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()


def adapter_device(model: Any) -> torch.device:
    """Return where the trainable weights are."""
    device: torch.device = next(p.device for p in model.parameters() if p.requires_grad)
    return device


def compute_dtype(model: Any) -> torch.dtype:
    """Return the dtype of the base's embedding: that of everything which is not quantized."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    dtype: torch.dtype = base.get_input_embeddings().weight.dtype
    return dtype


def _pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return a token to pad with; padding is masked, so which one does not matter."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(token) for token in candidates if token is not None)
