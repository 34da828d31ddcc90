"""`train`: run a trainer, go on from a checkpoint, and say in words what went wrong.

Nothing of the model is left changed but the adapter's weights.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import OutputError, Problem, TrainingError, did_you_mean
from .kernels import fused_kernels
from .trainers import (
    CHECKPOINTS,
    PREFIX,
    STATE,
    OnLog,
    adapter_device,
    compute_dtype,
    make_trainer,
    quiet,
)

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from .spec import TrainSpec


@dataclass(frozen=True)
class TrainResult:
    """What a training run did.

    Attributes:
        steps: optimizer steps done in all, those before a resume included.
        losses: (step, mean loss since the entry before) of all logged steps, in nats per token.
        seconds: wall-clock time of the training loop of this call.
        tokens: tokens without padding that went through the model in this call.
        peak_memory_gib: of the GPU during this call, or of the process where there is none.
        resumed_from: the step of the checkpoint that this call went on from, or None.
        trainable_parameters: number of weights that were trained.
        base_parameters: number of frozen weights, as if they were dense.
    """

    steps: int
    losses: list[tuple[int, float]]
    seconds: float
    tokens: int
    peak_memory_gib: float
    resumed_from: int | None
    trainable_parameters: int
    base_parameters: int


def train(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    spec: TrainSpec,
    *,
    output: Path,
    seed: int,
    on_log: OnLog | None = None,
) -> TrainResult:
    """Train the adapter of `model`, in place.

    Args:
        model: a PeftModel over a causal or an encoder-decoder language model.
        dataset: columns `input_ids` and `completion_mask`, as `load_data` makes them.
        output: run folder; checkpoints go to `output / "checkpoints"`.
        on_log: called at the first, the last and every `logging_steps`-th step with step,
            max_steps, loss, learning_rate, grad_norm, seconds and tokens.

    Raises:
        TrainingError: a setting cannot be used, the loss is no number, or memory runs out.
        OutputError: there are checkpoints of another run, or writing one failed.
        KeyboardInterrupt: as it came; earlier checkpoints are whole, none is half written.
    """
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not trainable:
        fix = "check adapter.target_modules, and that the adapter was not loaded for inference"
        raise TrainingError("the model has no trainable weights", fix=fix)
    checkpoint = _checkpoint_to_resume(Path(output), spec)
    with ExitStack() as stack:
        stack.enter_context(_given_back(model))
        stack.enter_context(_fast_adapters(model))
        if spec.use_liger_kernel:
            stack.enter_context(fused_kernels(model))
        trainer = make_trainer(model, tokenizer, dataset, spec, Path(output), seed, on_log)
        _run(trainer, checkpoint)
        return TrainResult(
            steps=trainer.state.global_step,
            losses=[(e["step"], e["loss"]) for e in trainer.state.log_history if "loss" in e],
            seconds=trainer.progress.seconds,
            tokens=int(trainer.progress.tokens),
            peak_memory_gib=_peak_memory_gib(adapter_device(model)),
            resumed_from=_step(checkpoint) if checkpoint else None,
            trainable_parameters=trainable,
            base_parameters=base_parameters(model),
        )


def problems(spec: TrainSpec) -> list[Problem]:
    """Return what is wrong with settings that only transformers can judge; loads no model."""
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    found = []
    for key, known in (("optim", OptimizerNames), ("lr_scheduler_type", SchedulerType)):
        names = [member.value for member in known]
        value = getattr(spec, key)
        if value not in names:
            what = f"there is no {value!r}"
            found.append(Problem(what, did_you_mean(value, names), where=f"train.{key}"))
    return found


def base_parameters(model: nn.Module) -> int:
    """Count the weights of the base: a quantized layer as if it were dense, adapters not at all."""
    base = getattr(model, "get_base_model", lambda: model)()
    return _base_parameters(base, set())


def _base_parameters(module: Any, seen: set[int]) -> int:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    from .facade import QuantLinear

    if id(module) in seen:
        return 0
    seen.add(id(module))
    if isinstance(module, BaseTunerLayer):
        return _base_parameters(module.get_base_layer(), seen)
    if isinstance(module, AuxiliaryTrainingWrapper):
        return _base_parameters(module.original_module, seen)
    if isinstance(module, QuantLinear):
        bias = getattr(module, "bias", None)
        weights = module.in_features * module.out_features
        return weights + (0 if bias is None else int(bias.numel()))
    own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
    seen.update(map(id, own))
    children = sum(_base_parameters(child, seen) for child in module.children())
    return children + sum(int(p.numel()) for p in own)


def _run(trainer: Any, checkpoint: Path | None) -> None:
    """Train, or go on from `checkpoint`; turn what may go wrong into words."""
    import torch

    if checkpoint and _is_finished(trainer, checkpoint):
        return
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        with quiet():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        fix = (
            "lower train.per_device_train_batch_size (and raise gradient_accumulation_steps), set"
            " train.gradient_checkpointing, or lower data.max_length"
        )
        raise TrainingError("the GPU has run out of memory", fix=fix, where="train") from error


def _is_finished(trainer: Any, checkpoint: Path) -> bool:
    """Load a checkpoint that was the last one, and say so."""
    from transformers import TrainerState

    state = TrainerState.load_from_json(str(checkpoint / STATE))
    wanted = trainer.args.max_steps if trainer.args.max_steps > 0 else state.max_steps
    if state.global_step < wanted:
        return False
    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = state
    return True


def _checkpoint_to_resume(output: Path, spec: TrainSpec) -> Path | None:
    """Return the last whole checkpoint, if the spec asks to go on. Raises OutputError."""
    folder = output / CHECKPOINTS
    found = [p for p in folder.glob(f"{PREFIX}*") if (p / STATE).is_file() and _step(p)]
    if not found:
        return None
    if not spec.resume:
        fix = "set train.resume to go on from them, or use another output folder"
        raise OutputError("there are checkpoints of an earlier run", fix=fix, where=str(folder))
    last = max(found, key=_step)
    try:
        json.loads((last / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fix = "delete this checkpoint to go on from the one before"
        raise OutputError(f"cannot read it: {error}", fix=fix, where=str(last)) from None
    return last


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.removeprefix(PREFIX)
    return int(number) if number.isdigit() else 0


@contextmanager
def _given_back(model: Any) -> Iterator[None]:
    """Undo what trainers leave on a model: forwards, hooks, token ids, checkpointing, mode."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    patchable = {id(m): m for m in (model, base)}.values()
    before = [(m, m.__dict__.get("forward")) for m in patchable]
    configs = [c for c in (base.config, getattr(base, "generation_config", None)) if c is not None]
    settings = [dict(config.__dict__) for config in configs]
    hooks = {module: set(module._forward_hooks) for module in model.modules()}
    training = model.training
    try:
        yield
    finally:
        for module, forward in before:
            module.__dict__.pop("_original_forward", None)
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward
        with quiet():
            if getattr(base, "is_gradient_checkpointing", False):
                base.gradient_checkpointing_disable()
        for module, known in hooks.items():  # TRL and Trainer each leave one on the embedding
            for key in set(module._forward_hooks) - known:
                del module._forward_hooks[key]
        for config, values in zip(configs, settings, strict=True):
            config.__dict__.clear()
            config.__dict__.update(values)
        model.train(training)


@contextmanager
def _fast_adapters(model: Any) -> Iterator[None]:
    """Let float32 adapters on a half-precision base use the tensor cores (TF32).

    TF32 has more mantissa bits than bfloat16 and as many as float16. A float32 base keeps full
    precision.
    """
    import torch

    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    if adapter_device(model).type == "cuda" and compute_dtype(model) != torch.float32:
        matmul.allow_tf32 = True
    try:
        yield
    finally:
        matmul.allow_tf32 = before


def _peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        import torch

        return float(torch.cuda.max_memory_allocated(device)) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
