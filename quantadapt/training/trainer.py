"""The trainers: TRL's SFTTrainer (causal) or transformers' Seq2SeqTrainer, made quiet.

`loop.TrainingLoop` holds what they do otherwise. Nothing of the model is left changed but
the adapter's weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..adapting.adalora import tuner_of
from ..data.batches import CausalCollator, EncoderDecoderCollator
from ..distributed.talking import average_gradients
from ..errors import TrainingError
from ..memory.workload import LENGTH_MULTIPLE
from .figures import adapter_device, compute_dtype
from .loop import CHECKPOINTS, TrainingLoop
from .packing import packed, refuse_leaks
from .progress import OnLog, Progress, Watcher

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from ..spec import TrainSpec


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

    from .loop import GradientCheck

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

        collator = CausalCollator(
            _pad_token_id(tokenizer), spec.packing, _length_multiple(adapter_device(model))
        )
        if spec.packing:
            refuse_leaks(model, collator)
            dataset = packed(dataset)
        cls = type("CausalTrainer", (TrainingLoop, SFTTrainer), {})
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
            data_collator=collator,
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
        what = "packing is for causal models, this is an encoder-decoder model"
        raise TrainingError(what, fix="leave train.packing out", where="train.packing")
    if all(dataset[0]["completion_mask"]):
        what = "an encoder-decoder model needs prompts, but the data are plain text"
        raise TrainingError(what, fix="use data with prompts and completions", where="data")
    cls = type("EncoderDecoderTrainer", (TrainingLoop, Seq2SeqTrainer), {})
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
        "gradient_checkpointing": False,  # done by `memory_fit`, layer by layer
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
    accelerator.prepare_model = prepared  # a launcher's single process would be wrapped as well


@contextmanager
def _without_statistics(model: Any) -> Iterator[None]:
    """Take out again the head that SFTTrainer patches in: it makes statistics at every step. And
    the loss on routers that it switches on: the model's config says whether there is one."""
    base = model.get_base_model()
    before = base.__dict__.get("forward")
    text = model.config.get_text_config()
    routers = getattr(text, "output_router_logits", None)
    yield
    if routers is not None:
        text.output_router_logits = routers
    base.__dict__.pop("forward", None)
    if before is not None:
        base.__dict__["forward"] = before


def _length_multiple(device: torch.device) -> int | None:
    """Return what the length of a batch is padded to a multiple of."""
    return LENGTH_MULTIPLE if device.type == "cuda" else None


def _fuse_head(model: Any) -> Literal["ours", "trl"] | None:
    """Compute the loss without ever holding all logits, where that can be; say whose way it is.

    A forward that somebody has patched stays in use.
    """
    from .lent import add_head_loss

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


def _pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return a token to pad with; padding is masked, so which one does not matter."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(token) for token in candidates if token is not None)
