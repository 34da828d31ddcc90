"""Training speed on instruction data as people have it: most examples short, some long.

    python benchmarks/instructions.py --shape 8b --case unsloth peft-nf4 ours-nf4 ours-nf4:packed

Lengths are log-normal, 350 tokens in the mean and 4096 at most, from a fixed seed; `--sigma` says
how they are spread. Every case sees all examples once. Cases, in processes of their own on random
weights of the given shape, LoRA r=16 on all seven projections, AdamW, every layer recomputed:
`peft-nf4` (batches of 8, padded), `unsloth` (TRL's SFTTrainer on batches of 8, as its notebooks
write it; by itself it lays a batch end to end), `ours-BACKEND` (batches of 8, padded),
`ours-BACKEND:grouped` (batches of examples of similar length), `ours-BACKEND:packed` (`--rows` rows
of up to 4096 tokens); with `+eager` behind it without CUDA graphs, with `+auto` with as many layers
recomputed as the card asks for.

Prints a Markdown table: tokens without padding per second, over the second half of the steps; their
ratio to the first case; the share of tokens that went through the model that are padding; peak GiB;
steps; the first and last loss. Of packed cases also how far loss and gradient of eight examples in
a row are from those of the same examples padded.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from experts import run_apart
from shapes import SHAPES, checkpoint
from speed import RESULT, device_name
from speed_cases import (
    EVERY,
    LEARNING_RATE,
    OURS,
    PROJECTIONS,
    WARM_UP,
    _import,
    _peak_gib,
    _synchronize,
    ours,
    peft_nf4,
    unsloth_model,
)
from tables import case_rows
from versions import versions

PACKAGES = (
    *("torch", "transformers", "peft", "trl", "bitsandbytes", "liger-kernel"),
    *("hqq", "torchao", "flash-attn", "xformers", "unsloth"),
)
COLUMNS = {
    "tokens/s": ("tokens_per_second", ",.0f"),
    "ratio": ("ratio", ".3f"),
    "padding": ("padding", ".1%"),
    "peak GiB": ("peak_gib", ".2f"),
    "steps": ("steps", ",d"),
}
BATCH, MEAN, LONGEST = 8, 350, 4096
GROUPED, PACKED = ":grouped", ":packed"
OPTIONS: dict[str, dict[str, Any]] = {
    "": {"gradient_checkpointing": True},
    "eager": {"gradient_checkpointing": True, "cuda_graphs": False},
    "auto": {"memory": "auto"},
}
GROUP = 50
"""Batches whose examples are sorted by length, as transformers' `group_by_length` does."""


def main() -> None:
    """Run the cases and print the table."""
    given = arguments()
    if given.one:
        print(RESULT + json.dumps(run_here(given)))
        return
    # In a process of its own, which gives the GPU's memory back.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(checkpoint, given.shape, given.folder).result()
    results = case_rows(
        given.case, lambda case: run_apart(case, given, Path(__file__)), COLUMNS, given.out
    )
    sys.path.append(given.unsloth_site or "")
    lengths = lengths_of(given)
    what = f"{len(lengths)} examples, {sum(lengths) / len(lengths):.0f} tokens in the mean"
    spread = f"{sorted(lengths)[len(lengths) // 2]} in the median, {max(lengths)} at most"
    print(f"\n{given.shape}; {what}, {spread}; {device_name(given.device)}; {versions(*PACKAGES)}")
    for found in results:
        if found.get("notes"):
            print(f"\n{found['case']}: {found['notes']}")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="demo")
    parser.add_argument("--case", nargs="+", type=check, default=["ours-nf4", "ours-nf4:packed"])
    parser.add_argument("--examples", type=int, default=320)
    parser.add_argument("--sigma", type=float, default=1.0, help="of the lengths' logarithms")
    parser.add_argument("--rows", type=int, default=2, help="packed ones, in a batch")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/quantadapt-instructions"))
    parser.add_argument("--timeout", type=float, default=300, help="seconds for each case")
    parser.add_argument("--out", type=Path, help="a file for the figures as JSON")
    parser.add_argument("--unsloth-site", help="folder that Unsloth is installed in, if apart")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.folder = given.folder.resolve()
    return given


def check(case: str) -> str:
    """Return the case. Raises ArgumentTypeError if there is none of that name."""
    name, way, option = parts_of(case)
    if case not in ("peft-nf4", "unsloth") and (
        name not in OURS or way not in (":", GROUPED, PACKED) or option not in OPTIONS
    ):
        known, ways = ["peft-nf4", "unsloth", *OURS], [GROUPED, PACKED, "+eager", "+auto"]
        text = f"{case}: take one of {known}; ours-* with some of {ways}"
        raise argparse.ArgumentTypeError(text)
    return case


def parts_of(case: str) -> tuple[str, str, str]:
    """Return the name of a case, its way of batching with the colon, and its option."""
    rest, _, option = case.partition("+")
    name, _, way = rest.partition(":")
    return name, f":{way}", option


# The data -----------------------------------------------------------------------------------------


def lengths_of(given: argparse.Namespace) -> list[int]:
    """Return how many tokens each example has; on a toy shape, a tenth of them."""
    import torch

    shape = SHAPES[given.shape]
    longest = min(LONGEST, 6 * shape.length)
    scale = longest / LONGEST
    generator = torch.Generator().manual_seed(7)
    drawn = torch.randn(given.examples, generator=generator) * given.sigma
    lengths = (drawn + math.log(MEAN * scale) - given.sigma**2 / 2).exp().long()
    return [int(length) for length in lengths.clamp(8, longest)]


def rows_of(given: argparse.Namespace) -> list[list[int]]:
    """Return random token ids: the same for every case."""
    import torch

    generator, size = torch.Generator().manual_seed(1), SHAPES[given.shape].vocab_size
    draw = partial(torch.randint, size, generator=generator)
    return [draw((length,)).tolist() for length in lengths_of(given)]


def grouped(rows: list[list[int]]) -> list[list[int]]:
    """Return the examples in such an order that those of a batch are of similar length."""
    import random

    size, draws = BATCH * GROUP, random.Random(3)
    parts = [sorted(rows[start : start + size], key=len) for start in range(0, len(rows), size)]
    batches = [part[i : i + BATCH] for part in parts for i in range(0, len(part), BATCH)]
    draws.shuffle(batches)
    return [row for batch in batches for row in batch]


def padded(batch: list[list[int]]) -> int:
    """Return how many tokens a batch has with its padding."""
    return len(batch) * max(map(len, batch))


def batches_of(rows: list[list[int]]) -> list[list[list[int]]]:
    """Return the rows in batches, in their order."""
    return [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]


# One case -----------------------------------------------------------------------------------------


@dataclass
class Clock:
    """Times the second half of the steps."""

    losses: list[float] = field(default_factory=list)
    seen: list[tuple[int, int, float]] = field(default_factory=list)

    def read(self, step: int, tokens: int, loss: float) -> None:
        """Note that `tokens` without padding have been trained on after a step; reading `loss` has
        waited for the device."""
        self.losses.append(loss)
        self.seen.append((step, tokens, time.perf_counter()))

    @property
    def rate(self) -> float:
        """Tokens per second in the second half: kernels are compiled, and passes recorded, once a
        shape of batch has been seen."""
        late = [seen for seen in self.seen if seen[0] >= max(WARM_UP, self.seen[-1][0] // 2)]
        if len(late) < 2:
            raise ValueError("too few steps to time: raise --examples")
        (_, before, start), (_, after, end) = late[0], late[-1]
        return (after - before) / (end - start)


def run_here(given: argparse.Namespace) -> dict[str, Any]:
    """Load, train on all examples once, and return the figures."""
    case, device = given.one, given.device
    _import(case)
    path, shape = checkpoint(given.shape, given.folder), SHAPES[given.shape]
    shape = replace(shape, length=LONGEST)
    rows, clock = rows_of(given), Clock()
    train: Callable[..., dict[str, Any]]
    if case == "peft-nf4":
        model, train = peft_nf4(path, shape, device, use_dora=False), peft_loop
    elif case == "unsloth":
        model, train = unsloth_model(path, LONGEST, PROJECTIONS, "unsloth"), unsloth_loop
    else:
        name, way, option = parts_of(case)
        model = ours(path, shape, device, OURS[name], "lora")
        train = partial(our_loop, way=way, rows_at_a_time=given.rows, options=OPTIONS[option])
    _synchronize(device)
    found = {"case": case, **train(model, rows, clock)}
    return {
        **found,
        "tokens_per_second": clock.rate,
        "padding": 1 - sum(map(len, rows)) / found["through"],
        "peak_gib": _peak_gib(device),
        "losses": [clock.losses[0], clock.losses[-1]],
    }


def peft_loop(model: Any, rows: list[list[int]], clock: Clock) -> dict[str, Any]:
    """The steps of Trainer with bf16 autocast on padded batches, by hand."""
    import torch

    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    model.train()
    batches, tokens = batches_of(rows), 0
    for step, batch in enumerate(batches, 1):
        parts = [torch.tensor(row) for row in batch]
        pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        ids, mask = pad(parts), pad([torch.ones_like(part) for part in parts])
        labels = ids.masked_fill(mask == 0, -100)
        ids, mask, labels = (x.to(device) for x in (ids, mask, labels))
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += sum(map(len, batch))
        if step % EVERY == 0 or step in (1, len(batches)):
            clock.read(step, tokens, loss.item())
    return {"through": sum(map(padded, batches)), "steps": len(batches)}


def unsloth_loop(model: Any, rows: list[list[int]], clock: Clock) -> dict[str, Any]:
    """TRL's SFTTrainer as Unsloth has patched it, in the order of `rows`."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from quantadapt import demo

    batches = batches_of(rows)
    counts = list(accumulate(sum(map(len, batch)) for batch in batches))

    class Told(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                clock.read(state.global_step, counts[state.global_step - 1], float(logs["loss"]))

    config = SFTConfig(
        output_dir="unsloth-output",
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        optim="adamw_torch_fused",
        logging_steps=EVERY,
        logging_first_step=True,
        save_strategy="no",
        report_to="none",
        bf16=True,
        max_length=LONGEST,
        disable_tqdm=True,
    )
    with in_order():
        trainer = SFTTrainer(
            model=model,
            processing_class=AutoTokenizer.from_pretrained(demo.MODEL_DIR),
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            args=config,
            callbacks=[Told()],
        )
        trainer.train()
    free = bool(getattr(trainer.data_collator, "padding_free", False))
    through = sum(map(len, rows)) if free else sum(map(padded, batches))
    return {"through": through, "steps": len(batches), "notes": f"padding-free: {free}"}


def our_loop(
    model: Any,
    rows: list[list[int]],
    clock: Clock,
    way: str,
    rows_at_a_time: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    """`quantadapt.train`, with padding or packed."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    import quantadapt as qa
    from quantadapt import demo

    notes, packs = list[str](), way == PACKED
    if packs:
        notes.append(compared(model, rows))
    rows = grouped(rows) if way == GROUPED else rows
    masks = [[1] * len(row) for row in rows]
    with in_order(not packs), counted_tokens() as through:
        result = qa.train(
            model,
            Dataset.from_dict({"input_ids": rows, "completion_mask": masks}),
            tokenizer=AutoTokenizer.from_pretrained(demo.MODEL_DIR),
            on_log=lambda entry: clock.read(entry["step"], entry["tokens"], entry["loss"]),
            on_note=notes.append,
            num_train_epochs=1,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            warmup_ratio=0,
            logging_steps=EVERY,
            per_device_train_batch_size=rows_at_a_time if packs else BATCH,
            packing=packs,
            **options,
        )
    return {"through": sum(through), "steps": result.steps, "notes": "; ".join(notes)}


@contextmanager
def in_order(wanted: bool = True) -> Iterator[None]:
    """Let trainers take the examples in the order in which they are."""
    from unittest.mock import patch

    from torch.utils.data import SequentialSampler
    from transformers import Trainer

    def order(self: Any, *_: Any) -> Any:
        return SequentialSampler(self.train_dataset)

    with patch.object(Trainer, "_get_train_sampler", order) if wanted else patch.dict({}):
        yield


@contextmanager
def counted_tokens() -> Iterator[list[int]]:
    """Yield how many tokens each batch has, its padding included."""
    from unittest.mock import patch

    from quantadapt import SFT

    found, count = list[int](), SFT.count

    def counted(self: Any, batch: Any) -> int:  # asked once for each batch of a step
        found.append(batch["input_ids"].numel())
        return count(self, batch)

    with patch.object(SFT, "count", counted):
        yield found


def compared(model: Any, rows: list[list[int]]) -> str:
    """Say how far loss and gradient of a few examples in a row are from those of them padded."""
    import torch

    from quantadapt import SFT
    from quantadapt.data.batches import CausalCollator, PackedCollator
    from quantadapt.training.packing import kept_apart

    some = sorted(rows, key=len)[len(rows) // 2 :][:BATCH]
    apart = [
        {"input_ids": r, "completion_mask": [1] * len(r), "seq_lengths": [len(r)]} for r in some
    ]
    weights = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():  # a fresh LoRA has no gradient in its first half
        generator = torch.Generator().manual_seed(0)
        for weight in weights:
            noise = torch.randn(weight.shape, generator=generator) * 0.01
            weight.add_(noise.to(weight.device))

    def outcome(collator: Any) -> tuple[float, Any]:
        task, batch = SFT(), collator(apart)
        count = torch.tensor(float(task.count(batch)), device=weights[0].device)
        moved = {k: v.to(count.device) if hasattr(v, "to") else v for k, v in batch.items()}
        loss = task.loss(model, moved, count)
        grads = torch.autograd.grad(loss, weights)
        return float(loss.detach()), torch.cat([grad.flatten() for grad in grads])

    model.train()
    loss, grads = outcome(CausalCollator(0))
    with kept_apart(model, lambda _: None):
        its_loss, its_grads = outcome(PackedCollator(0, 64, few_shapes=True))
    error = float((its_grads - grads).norm() / grads.norm())
    _peak_gib(weights[0].device.type)
    return f"packed, loss {its_loss:.6f} instead of {loss:.6f}, gradient {error:.1e} away"


if __name__ == "__main__":
    main()
