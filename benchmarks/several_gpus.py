"""Training on several GPUs: tokens per second, memory per card, and the same losses as on one.

    python benchmarks/several_gpus.py --case one ddp fsdp loss-one loss-ddp loss-fsdp 70b
    python benchmarks/several_gpus.py --case one ddp-4 fsdp-4 70b-4 context-64k context-256k

nf4 with double quantization, LoRA r=16 on all seven projections, weights made on the spot and
quantized (and sharded) block by block as they are made. `one`, `ddp`, `fsdp`: Llama-8B shape,
4 x 2048 tokens for each GPU; `-4`: on four. `loss-*`: the same rows, 8 in all, on one and on two
GPUs. `70b`: Llama-70B shape, sharded over two cards whose allocators are held to 24 GiB each,
1 x 2048 tokens for each; `70b-4` over four, 4 x 2048 each. `context-*`: Llama-8B shape, one row of
so many tokens on four GPUs (`-2`: on two), each of which has a part of it; `-70b`: Llama-70B shape,
sharded, too. `context-1m-4-layers` are four of the 32 layers, as a step of all takes more than ten
minutes; `context-one` is one GPU that has a row of the length of such a part by itself. Prints a
Markdown table. With `--device cpu` everything runs in a toy size, to try it out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from random_models import random_llama
from shapes import SHAPES, Shape
from versions import versions

PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "liger-kernel")
RANK, LEARNING_RATE = 16, 1e-4
WARM_UP = 3
GIB = 2**30
LLAMA_70B = replace(SHAPES["70b"], batch=1)


@dataclass(frozen=True)
class Case:
    """How one model is trained.

    Attributes:
        shape: the model; its `batch` rows go to each GPU in a step.
        gpus: how many processes. parallel: how they share the work.
        limit_gib: what torch's allocator may take of each card; None: all.
        options: of TrainSpec.
        steps: how many, where they take long; None: as the command says.
    """

    shape: Shape
    gpus: int = 1
    parallel: str = "auto"
    limit_gib: float | None = None
    options: tuple[tuple[str, Any], ...] = (("gradient_checkpointing", True),)
    steps: int | None = None


def context(tokens: int, steps: int = 2, gpus: int = 4, **values: Any) -> Case:
    """Return the case of one row of so many tokens on all GPUs together."""
    shape = replace(values.pop("shape", SHAPES["8b"]), batch=1, length=tokens)
    memory = values.pop("memory", ("gradient_checkpointing", True))
    options = (memory, ("context_parallel_size", gpus))
    return Case(shape, gpus, values.pop("parallel", "ddp"), options=options, steps=steps)


K = 1024
_1B = replace(SHAPES["1b"], batch=4)
CASES = {
    "one": Case(SHAPES["8b"]),
    "ddp": Case(SHAPES["8b"], 2, "ddp"),
    "fsdp": Case(SHAPES["8b"], 2, "fsdp"),
    "one-1b": Case(_1B, options=()),
    "ddp-1b": Case(_1B, 2, "ddp", options=()),
    "fsdp-1b": Case(_1B, 2, "fsdp", options=()),
    "loss-one": Case(replace(_1B, batch=8)),
    "loss-ddp": Case(_1B, 2, "ddp"),
    "loss-fsdp": Case(_1B, 2, "fsdp"),
    "70b": Case(
        LLAMA_70B,
        2,
        "fsdp",
        limit_gib=24,
        options=(("memory", "min"), ("optim", "paged_adamw_8bit")),
    ),
    "ddp-4": Case(SHAPES["8b"], 4, "ddp"),
    "fsdp-4": Case(SHAPES["8b"], 4, "fsdp"),
    "70b-4": Case(replace(LLAMA_70B, batch=4), 4, "fsdp"),
    "context-one": Case(replace(SHAPES["8b"], batch=1, length=16 * K)),
    "context-64k-2": context(64 * K, 4, gpus=2),
    "context-128k-2": context(128 * K, gpus=2),
    "context-64k": context(64 * K, 4),
    "context-128k": context(128 * K),
    "context-256k": context(256 * K),
    "context-512k": context(512 * K),
    "context-1m": context(1024 * K, memory=("memory", "min")),
    "context-1m-4-layers": context(
        1024 * K, 1, shape=replace(SHAPES["8b"], num_hidden_layers=4), memory=("memory", "min")
    ),
    "context-70b": context(32 * K, 3, shape=LLAMA_70B, parallel="fsdp"),
}
TOY = Shape(256, 768, 2, 4, 2, 2048, batch=2, length=64)


def main() -> None:
    """Run the cases and print the table."""
    given = arguments()
    if given.one:
        measure(given)
        return
    print(
        "| case | GPUs | tokens/s | peak GiB | reserved GiB | build s | build peak GiB | losses |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |", flush=True)
    for name in given.case:
        print(row(name, given), flush=True)
    print(f"\n{given.device}; {versions(*PACKAGES)}")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def case_of(name: str, device: str) -> Case:
    """Return a case; on a CPU in a toy size, without what needs a GPU."""
    case = CASES[name]
    if device == "cuda":
        return case
    shape = replace(TOY, batch=case.shape.batch)
    kept = ("gradient_checkpointing", "context_parallel_size")
    return replace(case, shape=shape, options=tuple(o for o in case.options if o[0] in kept))


def row(name: str, given: argparse.Namespace) -> str:
    """Run one case in processes of its own and return its line of the table."""
    from quantadapt.distributed.launching import launch

    case = case_of(name, given.device)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--one", name, "--result", str(result)]
        command += ["--device", given.device, "--steps", str(given.steps)]
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        failure = launch(command, case.gpus)
        if failure is not None:
            reason = failure.text.strip().splitlines()[-1:]
            sys.stderr.write(failure.text + "\n")
            return (
                f"| {name} | {case.gpus} | failed in process {failure.rank}: {reason} | | | | | |"
            )
        found = json.loads(result.read_text(encoding="utf-8"))
    cells = (
        f"{case.gpus}",
        f"{found['tokens_per_second']:,.0f}",
        *(" / ".join(f"{gib:.2f}" for gib in found[key]) for key in ("peak", "reserved")),
        f"{found['build_seconds']:.1f}",
        " / ".join(f"{gib:.2f}" for gib in found["build_peak"]),
        ", ".join(f"{loss:.4f}" for loss in found["losses"]),
    )
    return f"| {name} | {' | '.join(cells)} |"


def measure(given: argparse.Namespace) -> None:
    """Train in this process, one of the case's, and have the first one write the figures."""
    import torch

    from quantadapt.distributed import start, stop, world

    case, mine = case_of(given.one, given.device), world()
    device = f"cuda:{mine.local_rank}" if given.device == "cuda" else "cpu"
    if given.device == "cuda":
        torch.cuda.set_device(device)
        if case.limit_gib:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(case.limit_gib * GIB / total)
    start(device)
    started = time.perf_counter()
    model = build(case, device)
    found: dict[str, Any] = {"build_seconds": time.perf_counter() - started}
    found["build_peak"] = of_all(peak(device)[0])
    losses, times = train(case, model, case.steps or given.steps)
    allocated, reserved = peak(device)
    found |= {"peak": of_all(allocated), "reserved": of_all(reserved), "losses": losses}
    timed = sorted(times[min(WARM_UP, len(times) - 1) :])
    rows_shared_by = dict(case.options).get("context_parallel_size", 1)
    tokens = case.gpus * case.shape.tokens // rows_shared_by
    found["tokens_per_second"] = tokens / timed[len(timed) // 2]
    if mine.is_main:
        given.result.write_text(json.dumps(found), encoding="utf-8")
    stop()


def peak(device: str) -> tuple[float, float]:
    """Return the highest GiB allocated and reserved since the last call; zeros without a GPU."""
    import torch

    if device == "cpu":
        return 0.0, 0.0
    found = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    return found[0] / GIB, found[1] / GIB


def of_all(value: float) -> list[float]:
    """Return the value of each process."""
    from torch import distributed

    if not distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def build(case: Case, device: str) -> Any:
    """Return a quantized Llama with LoRA; nowhere is there ever more than a block unquantized."""
    import torch

    import quantadapt as qa
    from quantadapt.planning import plan
    from quantadapt.quantizing import quantize_plan
    from quantadapt.registry import registry
    from quantadapt.sharding import shard_block
    from quantadapt.spec import Spec

    dtype = "bfloat16" if device != "cpu" else "float32"
    spec = Spec(backend="bnb-nf4", train={"parallel": case.parallel}, device=device, dtype=dtype)
    made = plan(spec, check_output=False)
    quantize = registry().backend("bnb-nf4").quantizer().quantize_linear
    done = shard_block if made.parallel == "fsdp" else None
    model = random_llama(case.shape, quantize, device, getattr(torch, dtype), done)
    base = quantize_plan(plan(spec, module=model, check_output=False), module=model)
    return qa.attach(base, "lora", r=RANK, lora_alpha=RANK)


def train(case: Case, model: Any, steps: int) -> tuple[list[float], list[float]]:
    """Return the losses and the seconds of each step of `quantadapt.train` on random tokens."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer

    import quantadapt as qa
    from quantadapt import demo

    shape, generator = case.shape, torch.Generator().manual_seed(1)
    size = steps * case.gpus * shape.batch, shape.length
    rows = torch.randint(shape.vocab_size, size, generator=generator).tolist()
    data = Dataset.from_dict({"input_ids": rows, "completion_mask": [[1] * len(r) for r in rows]})
    logs: list[dict[str, Any]] = []
    with rows_in_order():
        result = qa.train(
            model,
            data,
            tokenizer=AutoTokenizer.from_pretrained(demo.MODEL_DIR),
            on_log=logs.append,
            max_steps=steps,
            per_device_train_batch_size=shape.batch,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            warmup_ratio=0,
            logging_steps=1,
            parallel=case.parallel,
            **dict(case.options),
        )
    seconds = [0.0, *(entry["seconds"] for entry in logs)]
    return [loss for _, loss in result.losses], [b - a for a, b in pairwise(seconds)]


@contextmanager
def rows_in_order() -> Iterator[None]:
    """Have trainers take the rows as they come, so that every case sees the same batches."""
    from unittest.mock import patch

    from torch.utils.data import SequentialSampler
    from transformers import Trainer

    def sampler(self: Any, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    with patch.object(Trainer, "_get_train_sampler", sampler):
        yield


if __name__ == "__main__":
    main()
