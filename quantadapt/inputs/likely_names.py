"""Which name people mean by one that there is not: another tool's word for it, or a slip."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

_ELSEWHERE = (
    ("learning_rate", "lr"),
    ("per_device_train_batch_size", "batch_size", "bs", "batch", "batchsize", "train_batch_size",
     "micro_batch_size"),
    ("gradient_accumulation_steps", "grad_accum", "accumulation", "accumulate_grad_batches",
     "gradient_accumulation", "grad_accumulation_steps"),
    ("num_train_epochs", "epochs", "epoch", "num_epochs", "n_epochs", "max_epochs"),
    ("max_steps", "steps", "iters", "iterations", "num_steps", "max_iters", "train_steps"),
    ("max_length", "seq_len", "max_seq_len", "max_seq_length", "seq_length", "sequence_len",
     "sequence_length", "block_size", "context_length", "cutoff_len", "model_max_length"),
    ("lr_scheduler_type", "scheduler", "lr_scheduler", "schedule"),
    ("lr_scheduler_kwargs", "scheduler_kwargs", "lr_scheduler_args", "scheduler_args",
     "scheduler_specific_kwargs"),
    ("warmup_ratio", "warmup", "warmup_steps"),
    ("weight_decay", "wd", "decay"),
    ("max_grad_norm", "clip", "grad_clip", "gradient_clipping", "gradient_clip_val", "clip_norm"),
    ("optim", "optimizer", "optimiser"),
    ("gradient_checkpointing", "checkpointing", "activation_checkpointing"),
    ("save_steps", "save_every", "checkpoint_steps"),
    ("logging_steps", "log_steps", "log_every", "log_interval"),
    ("output", "output_dir", "out_dir", "out", "save_dir", "run_dir"),
    ("model", "model_name", "model_name_or_path", "base_model", "model_id", "checkpoint", "base"),
    ("data", "dataset", "dataset_name", "train_file", "train_data", "datasets"),
    ("path", "file", "train_path", "train_file", "dataset", "name"),
    ("eval_path", "eval_file", "validation", "validation_file", "val_path", "test_path"),
    ("eval_fraction", "val_fraction", "val_size", "val_set_size", "test_size", "split"),
    ("max_examples", "max_samples", "limit", "num_examples", "num_samples"),
    ("bits", "nbits", "n_bits", "w_bit", "num_bits", "load_in_4bit"),
    ("group_size", "groupsize", "blocksize", "q_group_size"),
    ("r", "rank", "lora_r", "lora_rank", "dim"),
    ("lora_alpha", "alpha"),
    ("lora_dropout", "dropout"),
    ("target_modules", "targets", "target", "lora_target_modules", "modules", "layers"),
    ("seed", "random_state", "random_seed"),
    ("dtype", "torch_dtype", "compute_dtype", "precision", "bf16", "fp16"),
    ("report_to", "loggers", "logger", "wandb", "tensorboard"),
    ("adapter", "peft", "lora", "adapter_type"),
    ("backend", "quantization", "quantizer", "quant"),
    ("evaluate", "eval", "evaluation"),
    ("export", "exports"),
    ("train", "training", "trainer", "training_args", "training_arguments"),
)  # fmt: skip
"""Names of options here, each with what other tools and people call it."""


def likely_name(word: str, known: Iterable[str]) -> str:
    """Return which of `known` people mean by `word`: what other tools call so, or the one that is
    spelt most like it; empty if none."""
    names = list(known)
    swapped = [name for name in names if sorted(name) == sorted(word)]
    close = [*swapped, *get_close_matches(word, names, n=1)]
    return _usual_name(word, names) or next(iter(close), "")


def _usual_name(word: str, names: list[str]) -> str:
    plain = word.lower().replace("-", "_").strip("_")
    for name, *others in _ELSEWHERE:
        if name in names and (plain == name or plain in others):
            return name
    endings = [name for name in names if plain in ("dropout", "alpha") and name.endswith(plain)]
    return endings[0] if len(endings) == 1 else ""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `did you mean 'x'?`, or the known words where nothing is close."""
    words = sorted(known)
    longer = [repr(other) for other in words if other.startswith(f"{word}_")]
    if longer and word not in words and not _usual_name(word, words):
        return f"did you mean {' or '.join(longer)}?"
    if likely := likely_name(word, words):
        return f"did you mean {likely!r}?"
    return f"known: {', '.join(words)}" if words else ""
