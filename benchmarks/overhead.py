"""What the pipeline costs per step against a hand-written PEFT loop.

    python benchmarks/overhead.py [--steps 40] [--repeats 3]

Same model (the bundled demo), same bitsandbytes nf4 base, same LoRA, same data, same batches and
optimizer, in one process, alternating. The hand-written loop is what a user of transformers, peft
and bitsandbytes would write. Prints a Markdown table of ratios; below 1 means faster.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers_nf4 import transformers_nf4

import quantadapt as qa
from quantadapt import demo
from quantadapt.data import load_data
from quantadapt.spec import DataSpec

BATCH, LEARNING_RATE, RANK = 8, 2e-3, 16


def hand_written(data: Any, steps: int) -> tuple[list[float], float]:
    """Return (seconds of each step but the first, last loss) of a plain PEFT loop."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = transformers_nf4(demo.MODEL_DIR, "cpu", torch.float32)
    config = LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW(
        (p for p in model.parameters() if p.requires_grad), lr=LEARNING_RATE, weight_decay=0.0
    )
    times, loss = [], torch.tensor(0.0)
    for batch in batches(data, steps):
        started = time.perf_counter()
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - started)
    return times[1:], loss.item()


def batches(data: Any, steps: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield padded batches, shuffled once."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    for step in range(steps):
        rows = [data[i] for i in order[step * BATCH : (step + 1) * BATCH]]
        yield collate(rows)


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Return input_ids, attention_mask and labels of shape [batch, longest]."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), longest), 2)
    labels = torch.full((len(rows), longest), -100)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for i, row in enumerate(rows):
        tokens = torch.tensor(row["input_ids"])
        ids[i, : len(tokens)] = tokens
        mask[i, : len(tokens)] = 1
        wanted = torch.tensor(row["completion_mask"]) == 1
        labels[i, : len(tokens)][wanted] = tokens[wanted]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def pipeline(data: Any, steps: int) -> tuple[list[float], float]:
    """Return (seconds of each step but the first, last loss) of quantadapt on the same base."""
    model = qa.attach(qa.quantize(backend="bnb-nf4"), "lora", r=RANK, lora_alpha=32)
    with tempfile.TemporaryDirectory() as folder:
        log: list[dict[str, Any]] = []
        qa.train(
            model,
            data,
            output=Path(folder),
            on_log=log.append,
            max_steps=steps,
            learning_rate=LEARNING_RATE,
            per_device_train_batch_size=BATCH,
            lr_scheduler_type="constant",
            warmup_ratio=0.0,
            logging_steps=1,
        )
    return [b["seconds"] - a["seconds"] for a, b in pairwise(log)], log[-1]["loss"]


def main() -> None:
    """Run both, alternating, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    tokenizer = qa.quantize(backend="none").quantadapt.tokenizer
    data = load_data(DataSpec(), tokenizer, seed=0).train
    pairs = [
        (hand_written(data, options.steps), pipeline(data, options.steps))
        for _ in range(options.repeats)
    ]
    hand = [seconds for (times, _), _ in pairs for seconds in times]
    ours = [seconds for _, (times, _) in pairs for seconds in times]
    print(f"| | ms per step (median of {len(hand)} steps, {options.repeats} runs) | last loss |")
    print("| --- | ---: | ---: |")
    print(f"| transformers + peft + bitsandbytes | {in_ms(hand)} | {pairs[-1][0][1]:.3f} |")
    print(f"| quantadapt, bnb-nf4 | {in_ms(ours)} | {pairs[-1][1][1]:.3f} |")
    print(f"| ratio | {statistics.median(ours) / statistics.median(hand):.3f} | |")
    names = ("torch", "transformers", "peft", "trl", "bitsandbytes")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    print(f"\n{platform.machine()}, {torch.get_num_threads()} threads; {versions}")


def in_ms(times: list[float]) -> str:
    """Return the median in milliseconds."""
    return f"{statistics.median(times) * 1000:.1f}"


if __name__ == "__main__":
    main()
