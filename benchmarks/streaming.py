"""Training with the quantized base in CPU memory, on cards that do not hold it.

    python benchmarks/streaming.py --case 8b:none 8b:all 30b:none 30b:experts 30b-all:all 70b:all

A case is a shape and what is streamed of its base (`train.stream`): `8b` is Llama-8B's, 1 x 512
tokens, for a card of 4 GiB; `30b` Qwen3-30B-A3B's, 1 x 2048, 10.5 GiB; `30b-all` the same with LoRA
on the experts, too, which are 0.6 billion weights, and `paged_adamw_8bit`; `70b` Llama-70B's,
1 x 2048, 24 GiB; `demo` and `demo-experts` are tiny, for a look without a GPU. `:none` is what the
others are compared with: the same training, on the whole card. Where something is streamed
PyTorch's allocator is held to what such a card leaves of itself. LoRA r=16 on all layers, AdamW,
`--memory` as in the spec; with `--folder` what is streamed lies in a file there, in place of CPU
memory. Weights are random, and made, quantized and moved block by block; each
case runs in a process of its own.

Prints a Markdown table: tokens per second (median of the steps after the first two), seconds of a
step; GiB in use at most and what PyTorch held for it, of so many that it may; GiB of the base in
CPU memory; GiB moved in a step, how fast, and the share of the time of copies in which the GPU
computed; seconds of loading and GiB at most meanwhile; the first and the last loss, which agree to
the digit with those of `:none`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from experts import ATTENTION
from experts import SHAPES as EXPERTS
from several_gpus import rows_in_order
from shapes import SHAPES
from speed import RESULT, device_name, last_words
from speed_cases import LEARNING_RATE, OURS, RANK, _batches, _peak_gib, _reserved_gib, _synchronize
from tables import case_row
from versions import versions

PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "bitsandbytes", "hqq", "torchao")
COLUMNS = {
    "tokens/s": ("tokens_per_second", ",.0f"),
    "step s": ("step_seconds", ".3f"),
    "peak GiB": ("peak_gib", ".2f"),
    "reserved GiB": ("reserved_gib", ".2f"),
    "card GiB": ("card_gib", ".1f"),
    "in CPU memory GiB": ("host_gib", ".2f"),
    "moved GiB": ("moved_gib", ".2f"),
    "GiB/s": ("speed", ".1f"),
    "hidden": ("hidden", ".0%"),
    "load s": ("load_seconds", ".0f"),
    "load peak GiB": ("load_peak_gib", ".2f"),
}
STREAMS = ("none", "experts", "all")
WARM_UP = 2
"""Steps that are not timed: kernels are compiled, and the order of the blocks is seen."""


@dataclass(frozen=True)
class Case:
    """A shape with its batch, a card of `card` GiB, the layers that LoRA goes to, an optimizer."""

    shape: Any
    card: float
    targets: str | list[str] = "all-linear"
    optim: str = "adamw_torch_fused"


CASES = {
    "demo": Case(replace(SHAPES["demo"], num_hidden_layers=4, batch=1), 4.0),
    "demo-experts": Case(replace(EXPERTS["demo"], layers=4), 4.0),
    "8b": Case(replace(SHAPES["8b"], batch=1, length=512), 4.0),
    "30b": Case(replace(EXPERTS["qwen3-30b"], batch=1), 10.5, ATTENTION),
    "30b-all": Case(replace(EXPERTS["qwen3-30b"], batch=1), 10.5, optim="paged_adamw_8bit"),
    "70b": Case(replace(SHAPES["70b"], batch=1), 24.0),
}


def main() -> None:
    """Run the cases and print the table."""
    given = arguments()
    if given.one:
        print(RESULT + json.dumps(run_here(given)))
        return
    print(f"| case | {' | '.join(COLUMNS)} | first and last loss |")
    print(f"| --- | {'---: | ' * len(COLUMNS)}--- |", flush=True)
    notes, results = [], []
    for case in given.case:
        found = run_apart(case, given)
        results.append(found)
        print(case_row(found, COLUMNS, digits=4), flush=True)
        print(found.get("error", ""), file=sys.stderr, end="", flush=True)
        notes += [f"{case}: {note}" for note in found.get("notes", ())]
        if given.out:
            given.out.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(f"\n{given.backend}, {device_name(given.device)}; {versions(*PACKAGES)}\n")
    print("\n".join(notes))


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = ["8b:none", "8b:all", "30b:none", "30b:experts", "30b-all:all", "70b:all"]
    parser.add_argument("--case", nargs="+", type=check, default=default)
    parser.add_argument("--backend", choices=OURS, default="ours-nf4")
    parser.add_argument("--card", type=float, help="GiB, instead of the case's own")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--length", type=int, help="tokens of a row, instead of the case's own")
    parser.add_argument("--steps", type=int, default=8, help=f"the first {WARM_UP} do not count")
    parser.add_argument("--memory", default="min", help="auto or min; full: recompute all layers")
    parser.add_argument("--folder", type=Path, help="on a fast disk, in place of CPU memory")
    parser.add_argument("--optim", help="instead of the case's own")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--timeout", type=float, default=240, help="seconds for each case")
    parser.add_argument("--out", type=Path, help="a file for the figures as JSON")
    parser.add_argument("--one", type=check, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.steps <= WARM_UP:
        parser.error(f"--steps has to be more than {WARM_UP}")
    return given


def check(case: str) -> str:
    """Return the case. Raises ArgumentTypeError if there is none of that name."""
    name, _, which = case.partition(":")
    if name not in CASES or which not in STREAMS:
        known = f"one of {', '.join(CASES)} with :{', :'.join(STREAMS)}"
        raise argparse.ArgumentTypeError(f"{case}: take {known}")
    return case


def case_of(given: argparse.Namespace) -> Case:
    """Return the case, with what the command line changes."""
    case = CASES[given.one.partition(":")[0]]
    shape = case.shape
    if given.layers:
        key = "layers" if hasattr(shape, "layers") else "num_hidden_layers"
        shape = replace(shape, **{key: given.layers})
    shape = replace(shape, length=given.length or shape.length)
    changed = {"card": given.card or case.card, "optim": given.optim or case.optim}
    return replace(case, shape=shape, **changed)


def run_apart(case: str, given: argparse.Namespace) -> dict[str, Any]:
    """Run a case in another process; what went wrong there becomes `error`."""
    command = [sys.executable, str(Path(__file__).resolve()), "--one", case, *sys.argv[1:]]
    try:
        done = subprocess.run(command, timeout=given.timeout, capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        return {"case": case, "error": f"{case}: not done after {given.timeout:.0f} s\n"}
    line = next((x for x in done.stdout.splitlines() if x.startswith(RESULT)), None)
    if line is not None:
        found: dict[str, Any] = json.loads(line.removeprefix(RESULT))
        return found
    words = last_words(done.stderr)
    return {"case": case, "error": f"{case}: failed ({done.returncode})\n{words}\n"}


def run_here(given: argparse.Namespace) -> dict[str, Any]:
    """Load, train a few steps, and return the figures; those of a GPU are None without one."""
    import torch

    from quantadapt.memory.cards import CONTEXT, GIB
    from quantadapt.streaming import streamer_of

    case, which, device = case_of(given), given.one.partition(":")[2], given.device
    found: dict[str, Any] = {"case": given.one}
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        allowed = total if which == "none" else case.card * GIB - CONTEXT
        torch.cuda.set_per_process_memory_fraction(allowed / total)
        found["card_gib"] = total / GIB if which == "none" else case.card
    started = time.perf_counter()
    model = build(case, given, which)
    _synchronize(device)
    found |= {"load_seconds": time.perf_counter() - started, "load_peak_gib": _peak_gib(device)}
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found |= train(case, given, model)
    found |= {"peak_gib": _peak_gib(device), "reserved_gib": _reserved_gib(device)}
    if (streamer := streamer_of(model)) is not None:
        traffic = streamer.traffic
        found["host_gib"], found["hidden"] = streamer.nbytes / GIB, traffic.hidden
        if traffic.copied:
            found["speed"] = traffic.nbytes / GIB / traffic.copied
    return found


def build(case: Case, given: argparse.Namespace, which: str, rank: int = RANK) -> Any:
    """Return the model with its adapter; no more than a block is dense, or on the card, at once."""
    import torch
    from random_models import random_model

    import quantadapt as qa
    from quantadapt.registry import registry
    from quantadapt.streaming import Streamer, stream_block

    options = dict(OURS[given.backend])
    name, dtype = options.pop("backend"), "bfloat16" if given.device == "cuda" else "float32"
    quantize = registry().backend(name).quantizer(**options).quantize_linear
    done = None
    if which != "none":
        folder = getattr(given, "folder", None)  # long_context.py has none
        done = partial(stream_block, Streamer(torch.device(given.device), folder=folder), which)
    model = random_model(case.shape.config(), quantize, given.device, getattr(torch, dtype), done)
    model = qa.quantize(model, name, **options, device=given.device, dtype=dtype)
    return qa.attach(model, "lora", r=rank, lora_alpha=rank, target_modules=case.targets)


def train(case: Case, given: argparse.Namespace, model: Any) -> dict[str, Any]:
    """Train on random tokens and return the figures of it."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    import quantadapt as qa
    from quantadapt import demo

    rows = _batches(case.shape, given.steps).flatten(0, 1).tolist()
    data = Dataset.from_dict({"input_ids": rows, "completion_mask": [[1] * len(r) for r in rows]})
    full = given.memory == "full"
    memory = {"gradient_checkpointing": True} if full else {"memory": given.memory}
    logs: list[dict[str, Any]] = []
    notes: list[str] = []
    with rows_in_order():
        result = qa.train(
            model,
            data,
            tokenizer=AutoTokenizer.from_pretrained(demo.MODEL_DIR),
            on_log=logs.append,
            on_note=notes.append,
            max_steps=given.steps,
            per_device_train_batch_size=case.shape.batch,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            warmup_ratio=0,
            logging_steps=1,
            optim=case.optim,
            **memory,
        )
    seconds = sorted(b["seconds"] - a["seconds"] for a, b in pairwise(logs[WARM_UP - 1 :]))
    step = seconds[len(seconds) // 2]
    losses = [loss for _, loss in result.losses]
    return {
        "step_seconds": step,
        "tokens_per_second": case.shape.tokens / step,
        "moved_gib": result.streamed and result.streamed.gib,
        "losses": [losses[0], losses[-1]],
        "notes": [*notes, repr(result)],
    }


if __name__ == "__main__":
    main()
