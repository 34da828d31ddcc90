"""The cases of speed.py: how each loads its model, and how its user would train it.

Nothing is imported here that imports transformers: Unsloth has to come first.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernel_table import Profile
    from shapes import Shape

RANK, LEARNING_RATE = 16, 1e-4
WARM_UP, PROFILED = 4, 2
"""Steps that are not timed: the first ones, and those after the timed ones that are profiled."""

EVERY = 4
"""The mean loss is read after so many steps, as logging does: reading it waits for the GPU."""

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

OURS: dict[str, dict[str, Any]] = {
    "ours-none": {"backend": "none"},
    "ours-nf4": {"backend": "bnb-nf4"},
    "ours-fp4": {"backend": "bnb-fp4"},
    "ours-bnb8": {"backend": "bnb-int8"},
    "ours-hqq": {"backend": "hqq"},
    "ours-int8": {"backend": "torchao-int8"},
    "ours-int4": {"backend": "torchao-int4"},
    "ours-intx": {"backend": "torchao-intx"},
    "ours-fp8": {"backend": "torchao-fp8"},
    "ours-eetq": {"backend": "eetq"},
    "ours-quanto4": {"backend": "quanto", "weights": "int4"},
    "ours-gptq": {"backend": "gptq"},
    "ours-awq": {"backend": "awq"},
    "ours-autoround": {"backend": "autoround", "iters": 2},
    "ours-aqlm": {"backend": "aqlm"},
    "ours-inc": {"backend": "inc"},
    "ours-ct": {"backend": "compressed-tensors"},
    "ours-w8a8": {"backend": "compressed-tensors", "scheme": "W8A8"},
    "ours-ct8": {"backend": "compressed-tensors", "scheme": "FP8_DYNAMIC"},
    "ours-ctfp4": {"backend": "compressed-tensors", "scheme": "NVFP4A16"},
    "ours-fgfp8": {"backend": "finegrained-fp8"},
    "ours-nvfp4": {"backend": "nvfp4"},
    "ours-mxfp4": {"backend": "mxfp4"},
}
MEMORY: dict[str, dict[str, Any]] = {
    "full": {"gradient_checkpointing": True},
    "halves": {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    "none": {"gradient_checkpointing": False},
    "min": {"memory": "min"},
    "auto": {"memory": "auto"},
}
"""What `ours-nf4:full` and the like set in TrainSpec; full is what stands for no suffix. A number
is a budget in GiB."""

CALIBRATES = ("gptq", "awq", "autoround", "inc")
CALIBRATION = 1024
"""Tokens that these are shown, in four examples."""

WHOLE = 141.0
"""GiB of a card on which everything fits, of which the plan is asked."""

DORA, AWARE, FLOAT8 = "-dora", "-aware", "-fp8products"
"""What `ours-nf4-dora` and the like end in: their adapter is DoRA; `ours-nf4-aware`: they train
through the quantizer; and `ours-nf4-fp8products`: products with the base are in 8-bit floats."""

OTHERS = ("peft-nf4", "peft-nf4-dora", "unsloth", "unsloth-none")


def check(case: str) -> str:
    """Return the case. Raises ArgumentTypeError if there is none of that name."""
    name, _, memory = case.partition(":")
    if case not in OTHERS and (_bare(name) not in OURS or _memory(memory) is None):
        known = [*OTHERS, *OURS]
        raise argparse.ArgumentTypeError(
            f"{case}: take one of {known}; ours-* with {DORA}, {AWARE}, {FLOAT8}, "
            f":{', :'.join(MEMORY)} or :GIB"
        )
    return case


def _bare(name: str) -> str:
    """Return the name of the case without what says how it trains."""
    return name.removesuffix(FLOAT8).removesuffix(AWARE).removesuffix(DORA)


def _memory(suffix: str) -> dict[str, Any] | None:
    """Return what a case's suffix sets in TrainSpec; None if it is none."""
    if re.fullmatch(r"\d+(\.\d+)?", suffix):
        return {"memory": float(suffix)}
    return MEMORY.get(suffix or "full")


@dataclass
class Watch:
    """Times steps by the moments at which a loss is read; profiles some after the timed ones."""

    timed: int
    profile: Profile | None
    losses: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    tables: str | None = None
    done: int = 0
    last: float = field(default_factory=time.perf_counter)

    @property
    def steps(self) -> int:
        return self.timed + (PROFILED if self.profile else 0)

    def reads(self, step: int) -> bool:
        """Whether the loss of step number `step` is to be read."""
        return step % EVERY == 0 or step in (1, self.timed, self.steps)

    def read(self, step: int, loss: float) -> None:
        """Note the end of a step; reading `loss` has waited for the device."""
        self.losses.append(loss)
        if WARM_UP < step <= self.timed:
            self.times.append((time.perf_counter() - self.last) / (step - self.done))
        if self.profile and step == self.timed:
            self.profile.start()
        if self.profile and step == self.timed + PROFILED:
            self.tables = self.profile.stop(PROFILED)
        self.done, self.last = step, time.perf_counter()


def run_case(
    case: str, path: Path, shape: Shape, device: str, steps: int, profile: Profile | None
) -> dict[str, Any]:
    """Load, train a few steps, and return the figures; those of a GPU are None without one."""
    load, train = _parts(check(case))
    _import(case)
    started = time.perf_counter()
    model = load(path, shape, device)
    _synchronize(device)
    found: dict[str, Any] = {"case": case, "load_seconds": time.perf_counter() - started}
    found["load_peak_gib"] = _peak_gib(device)
    watch = Watch(steps, profile)
    found |= train(model, _batches(shape, watch.steps), watch)
    times = sorted(watch.times)
    median = times[len(times) // 2]
    floor = shape.floor_seconds(found["recomputed"]) if device == "cuda" else None
    return found | {
        "tokens_per_second": shape.tokens / median,
        "step_seconds": median,
        "of_floor": floor and floor / median,
        "reserved_gib": _reserved_gib(device),
        "peak_gib": _peak_gib(device),
        "losses": [watch.losses[0], watch.losses[-1]],
        "tables": watch.tables,
    }


def _import(case: str) -> None:
    """Import what takes long, which is no part of loading."""
    if case.startswith("unsloth"):
        import unsloth  # noqa: F401
    import bitsandbytes
    import peft
    import transformers  # noqa: F401

    del bitsandbytes, peft


def _parts(case: str) -> tuple[Callable[..., Any], Callable[..., dict[str, Any]]]:
    if case.startswith("peft-nf4"):
        return partial(peft_nf4, use_dora=case.endswith(DORA)), partial(plain_loop, recomputed=1.0)
    if case.startswith("unsloth"):
        checkpointing = "unsloth" if case == "unsloth" else False
        load = partial(unsloth, checkpointing=checkpointing)
        return load, partial(plain_loop, recomputed=1.0 if checkpointing else 0.0)
    name, _, memory = case.partition(":")
    options, train = OURS[_bare(name)], {**(_memory(memory) or {})}
    if name.endswith(AWARE):
        train["merge_aware"] = True
    if name.endswith(FLOAT8):
        train["compute"] = "fp8"
    adapter = "dora" if DORA in name else "lora"
    load = partial(ours, options=options, adapter=adapter)
    return load, partial(our_loop, backend=options, options=train)


def ours(
    path: Path,
    shape: Shape,
    device: str,
    options: dict[str, Any],
    adapter: str,
    calibrates: bool = True,
) -> Any:
    """Return an adapter of ours on a quantized base. Where that `calibrates` is not wanted, layers
    are what those of such a base are, but rounded to nearest: answers take as long."""
    import torch

    import quantadapt as qa

    if options["backend"] == "aqlm":
        return qa.attach(aqlm(shape, device), adapter, r=RANK, lora_alpha=RANK)
    if options["backend"] in CALIBRATES and not calibrates:
        return qa.attach(rounded(path, device, **options), adapter, r=RANK, lora_alpha=RANK)
    # Enough to quantize with: speed does not depend on how well.
    shown = torch.arange(CALIBRATION).view(-1, 1, CALIBRATION // 4)
    calibration = (
        [{"input_ids": row} for row in shown] if options["backend"] in CALIBRATES else None
    )
    model = qa.quantize(
        str(path), **options, device=device, dtype="bfloat16", calibration=calibration
    )
    return qa.attach(model, adapter, r=RANK, lora_alpha=RANK)


def rounded(path: Path, device: str, backend: str, **options: Any) -> Any:
    """Return a base of a backend that calibrates, made by its own rounding of single layers."""
    import torch

    import quantadapt as qa
    from quantadapt.protocols import LayerwiseQuantizer
    from quantadapt.registry import registry

    quantizer: Any = registry().backend(backend).quantizer(**options)
    model = LayerwiseQuantizer.quantize(quantizer, str(path), device=device, dtype=torch.bfloat16)
    return qa.quantize(model, backend, device=device, dtype="bfloat16")


def aqlm(shape: Shape, device: str) -> Any:
    """Return a model of random codes: fitting real ones takes hours, and speed is the same."""
    import torch
    from random_models import random_aqlm, random_llama

    import quantadapt as qa
    from quantadapt.registry import registry

    quantize = partial(random_aqlm, registry().backend("aqlm").quantizer())
    model = random_llama(shape, quantize, device, torch.bfloat16)
    return qa.quantize(model, "aqlm", device=device, dtype="bfloat16")


def peft_nf4(path: Path, shape: Shape, device: str, use_dora: bool) -> Any:
    """Return what the PEFT documentation tells to write."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers_nf4 import transformers_nf4

    model = transformers_nf4(path, device)
    model = prepare_model_for_kbit_training(
        model, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    config = LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules=PROJECTIONS,
        task_type="CAUSAL_LM",
        use_dora=use_dora,
    )
    return get_peft_model(model, config)


def unsloth(path: Path, shape: Shape, device: str, checkpointing: str | bool) -> Any:
    """Return what Unsloth's notebooks write; by itself it is nf4 with double quantization."""
    return unsloth_model(path, shape.length, PROJECTIONS, checkpointing)


def unsloth_model(path: Path, length: int, targets: list[str], checkpointing: str | bool) -> Any:
    """Return Unsloth's LoRA on `targets`, on a base in 4 bits, for rows of `length` tokens."""
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(path),
        max_seq_length=length,
        dtype=None,
        load_in_4bit=True,
        use_gradient_checkpointing=checkpointing,
    )
    return FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=RANK,
        lora_dropout=0,
        bias="none",
        target_modules=targets,
        use_gradient_checkpointing=checkpointing,
    )


def plain_loop(model: Any, batches: Any, watch: Watch, recomputed: float) -> dict[str, Any]:
    """The steps of Trainer with bf16 autocast, by hand."""
    import torch

    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    model.train()
    total = torch.zeros((), device=device)
    for step, ids in enumerate(batches.to(device), 1):
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total = total + loss.detach()
        if watch.reads(step):
            watch.read(step, total.item() / (step - watch.done))
            total = torch.zeros_like(total)
    return {"recomputed": recomputed}


def our_loop(
    model: Any, batches: Any, watch: Watch, backend: dict[str, Any], options: dict[str, Any]
) -> dict[str, Any]:
    """`quantadapt.train` on the same batches; return how it used memory."""
    from unittest.mock import patch

    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoTokenizer, Trainer

    import quantadapt as qa
    from quantadapt import demo

    notes: list[str] = []
    rows_at_a_time = batches.shape[1] // options.get("gradient_accumulation_steps", 1)
    rows = batches.flatten(0, 1).tolist()
    data = Dataset.from_dict({"input_ids": rows, "completion_mask": [[1] * len(r) for r in rows]})
    in_order = patch.object(
        Trainer, "_get_train_sampler", lambda self, *_: SequentialSampler(self.train_dataset)
    )
    with in_order:
        result = qa.train(
            model,
            data,
            tokenizer=AutoTokenizer.from_pretrained(demo.MODEL_DIR),
            on_log=lambda entry: watch.read(entry["step"], entry["loss"]),
            on_note=notes.append,
            max_steps=len(batches),
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            warmup_ratio=0,
            logging_steps=EVERY,
            per_device_train_batch_size=rows_at_a_time,
            **options,
        )
    return {
        "recomputed": result.setting.recomputed_layers / result.layers,
        "setting": "; ".join([*notes, result.setting.describe(result.layers, rows_at_a_time)]),
        "predicted_gib": _predicted_gib(model, batches, backend, options, result.setting),
    }


def _predicted_gib(
    model: Any, batches: Any, backend: dict[str, Any], train: dict[str, Any], setting: Any
) -> float | None:
    """Return what `quantadapt plan` foresees for a setting, from the model's config alone; None for
    a model that no config was read for."""
    if not model.quantadapt.source:
        return None
    from quantadapt.planning import plan
    from quantadapt.spec import Spec

    state, (_, batch, length) = model.quantadapt, batches.shape
    options = {key: value for key, value in backend.items() if key != "backend"}
    spec = Spec(
        model=state.source,
        backend={"name": backend["backend"], **options},
        adapter={"name": "lora", "r": RANK, "use_dora": model.peft_config["default"].use_dora},
        data={"max_length": length},
        train={"per_device_train_batch_size": batch, **_of_memory(train)},
        evaluate={"unquantized": False},
        device=state.device,
        dtype=state.dtype_name,
    )
    memory = plan(spec, check_output=False, cards=[WHOLE]).memory
    if memory is None:
        return None
    work = replace(memory.work, keeps_dense=memory.cards[0].keeps_dense)
    return work.peak(setting) / 2**30


def _of_memory(train: dict[str, Any]) -> dict[str, Any]:
    """Return those options of a training that say how it uses memory."""
    return {n: v for n, v in train.items() if n in ("memory", "gradient_checkpointing")}


def _batches(shape: Shape, steps: int) -> Any:
    """Return random tokens, int64 [steps, batch, length]: the same for every case."""
    import torch

    generator = torch.Generator().manual_seed(1)
    size = (steps, shape.batch, shape.length)
    return torch.randint(shape.vocab_size, size, generator=generator)


def _synchronize(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def _peak_gib(device: str) -> float | None:
    """Return the most GPU memory in use since the last call, or None without a GPU."""
    import torch

    if device != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


def _reserved_gib(device: str) -> float | None:
    """Return the most GPU memory that PyTorch held since the last `_peak_gib`, in use or not."""
    import torch

    return torch.cuda.max_memory_reserved() / 2**30 if device == "cuda" else None
