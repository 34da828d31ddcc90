"""`train`: run a trainer, go on from a checkpoint, and say in words what went wrong.

Nothing of the model is left changed but the adapter's weights.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..compiling import compiled_functions
from ..distributed.talking import reduced, share, start
from ..errors import OutputError, Problem, TrainingError, did_you_mean
from ..memory.workload import OOM_FIX, Setting
from .lent import fast_attention, fused_kernels, one_row_each
from .loop import CHECKPOINTS, PREFIX, STATE
from .progress import OnLog
from .trainer import adapter_device, compute_dtype, make_trainer, quiet

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from ..spec import TrainSpec
    from .memory_fit import Fitting


@dataclass(frozen=True)
class TrainResult:
    """What a training run did.

    Attributes:
        steps: optimizer steps done in all, those before a resume included.
        losses: (step, mean loss since the entry before) of all logged steps, in nats per token.
        seconds: wall-clock time of the training loop of this call.
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
            sharded one.
    """

    steps: int
    losses: list[tuple[int, float]]
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


def train(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    spec: TrainSpec,
    *,
    output: Path,
    seed: int,
    on_log: OnLog | None = None,
    on_note: Callable[[str], None] | None = None,
) -> TrainResult:
    """Train the adapter of `model`, in place.

    Args:
        model: a PeftModel over a causal or an encoder-decoder language model.
        dataset: columns `input_ids` and `completion_mask`, as `load_data` makes them.
        output: run folder; checkpoints go to `output / "checkpoints"`.
        on_log: called at the first, the last and every `logging_steps`-th step with step,
            max_steps, loss, learning_rate, grad_norm, seconds and tokens.
        on_note: told in a sentence how memory is used, where that was chosen or had to change.

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
    device = adapter_device(model)
    start(str(device))
    share(p for p in model.parameters() if p.requires_grad)
    with ExitStack() as stack:
        stack.enter_context(_given_back(model))
        stack.enter_context(_quick_walks(model))
        stack.enter_context(_fast_adapters(model))
        fused = stack.enter_context(_fused_training(model, keep_casts=spec.memory != "min"))
        stack.enter_context(compiled_functions())
        stack.enter_context(fast_attention(device))
        if spec.use_liger_kernel:
            stack.enter_context(fused_kernels(model))
        if spec.memory == "min":
            stack.enter_context(_one_block_at_a_time(model))
        if not spec.packing:
            stack.enter_context(one_row_each())
        trainer = make_trainer(model, tokenizer, dataset, spec, Path(output), seed, on_log)
        trainer.fused = fused
        trainer.fitting = stack.enter_context(_fitting(trainer, model, spec, on_note))
        _run(trainer, checkpoint)
        return TrainResult(
            steps=trainer.state.global_step,
            losses=[(e["step"], e["loss"]) for e in trainer.state.log_history if "loss" in e],
            seconds=trainer.progress.seconds,
            tokens=int(reduced(float(trainer.progress.tokens), device, "sum")),
            peak_memory_gib=reduced(_peak_memory_gib(device), device, "max"),
            resumed_from=_step(checkpoint) if checkpoint else None,
            trainable_parameters=trainable,
            base_parameters=base_parameters(model),
            setting=trainer.fitting.setting,
            layers=trainer.fitting.checkpointer.count,
            longest=max(trainer.fitting.lengths),
            dequantize_share=_dequantize_share(trainer, spec),
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
    return found + (_reporting_problems(spec.report_to) if spec.report_to else [])


def _reporting_problems(wanted: Iterable[str]) -> list[Problem]:
    from transformers.integrations import integration_utils

    known = integration_utils.INTEGRATION_TO_CALLBACK
    unlisted = ("all", "none", "flyte")
    there = {*integration_utils.get_available_reporting_integrations(), *unlisted}
    found = []
    for name in wanted:
        if name not in (*known, *unlisted):
            hint = did_you_mean(name, known)
            found.append(Problem(f"there is no {name!r}", hint, where="train.report_to"))
        elif name not in there:
            fix = f"pip install {name.replace('_', '-')}, or leave it out"
            found.append(Problem(f"{name} is not installed", fix, where="train.report_to"))
    return found


def base_parameters(model: nn.Module) -> int:
    """Count the weights of the base: a quantized layer as if it were dense, adapters not at all."""
    base = getattr(model, "get_base_model", lambda: model)()
    return _base_parameters(base, set())


def _base_parameters(module: Any, seen: set[int]) -> int:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    from ..facade import QuantLinear
    from ..sharding import PACKED

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
    # What a sharded block has packed are its quantized layers, which are counted above.
    named = module.named_parameters(recurse=False)
    own = [p for name, p in named if name != PACKED and id(p) not in seen]
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
        words = trainer.fitting.describe(trainer.fitting.setting)
        what = f"the GPU has run out of memory, with {words}"
        raise TrainingError(what, fix=OOM_FIX, where="train") from error


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
    """Undo what trainers leave on a model: forwards, hooks, token ids, mode."""
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


@contextmanager
def _fitting(
    trainer: Any, model: Any, spec: TrainSpec, on_note: Callable[[str], None] | None
) -> Iterator[Fitting]:
    from .cuda_graphs import can_record, graphed
    from .memory_fit import Fitting
    from .recomputing import checkpointed

    repeats = spec.cuda_graphs and not spec.use_reentrant and can_record(model)
    with checkpointed(model, None, spec.use_reentrant, draws=not repeats) as checkpointer:
        fitting = Fitting(trainer, checkpointer, spec, on_note)
        with graphed(model, fitting.on_note) if repeats else nullcontext() as fitting.graphs:
            yield fitting


def _dequantize_share(trainer: Any, spec: TrainSpec) -> float | None:
    """Return the share of a step that dequantizing takes, by the time that doing it once takes now;
    None without a step, and for a sharded base, whose layers would have to be gathered for it."""
    from ..sharding import is_sharded

    steps = trainer.state.global_step - trainer.progress.first_step + 1
    if steps < 1 or not trainer.progress.seconds or is_sharded(trainer.model):
        return None
    setting, layers = trainer.fitting.setting, trainer.fitting.checkpointer.count
    kept = 0 if setting.offload else setting.checkpointed_layers  # from recomputation to backward
    passes = 2 + (setting.checkpointed_layers - kept) / layers
    parts = spec.per_device_train_batch_size / setting.micro_batch
    each = passes * parts * spec.gradient_accumulation_steps * _dequantize_seconds(trainer.model)
    # The first block's input needs no gradient: a few layers are counted once too often.
    return min(float(each * steps / trainer.progress.seconds), 1.0)


def _dequantize_seconds(model: Any) -> float:
    """Return how long dequantizing every layer of the base takes, the second time."""
    import torch

    from ..facade import facades

    started = 0.0
    for _ in range(2):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _, facade in facades(model):
            facade.dequantize()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


@contextmanager
def _quick_walks(model: Any) -> Iterator[None]:
    """Trainer calls `train` and `zero_grad` at every step, and each walks through all modules: that
    takes as long as several layers."""
    whole, trained = type(model), [p for p in model.parameters() if p.requires_grad]

    def train(mode: bool = True) -> Any:
        return model if model.training == mode else whole.train(model, mode)

    def zero_grad(set_to_none: bool = True) -> None:
        for parameter in trained:
            parameter.grad = None

    whole.train(model)
    model.__dict__.update(train=train, zero_grad=zero_grad)
    try:
        yield
    finally:
        del model.__dict__["train"], model.__dict__["zero_grad"]


def _one_block_at_a_time(model: Any) -> Any:
    from ..sharding import one_block_at_a_time

    return one_block_at_a_time(model)


def _fused_training(model: Any, keep_casts: bool) -> Any:
    from ..adapting.fused import fused_training

    return fused_training(model, keep_casts)


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
