"""What quantizing costs, and what distilling from the dense base gets back, beside LoftQ.

    python benchmarks/distillation.py [--steps 100] [--device cpu]
    python benchmarks/distillation.py --model MODEL --rate 2e-4 --device cuda

For each backend: perplexity on held-out text and KL divergence from the dense model, in nats per
token, of the quantized base, of LoftQ's start (five rounds, not trained), and after distilling from
both starts. The bundled demo, or a model that `real_shape.py --make` made. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import platform
from typing import Any

import torch
from versions import versions

import quantadapt as qa
from quantadapt import demo

ROWS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("bnb-nf4", {}),
    ("hqq", {"bits": 4, "group_size": 64}),
    ("hqq", {"bits": 3, "group_size": 64}),
    ("hqq", {"bits": 2, "group_size": 64}),
)


def figures(model: Any) -> str:
    """Return perplexity and divergence as cells of a row."""
    perplexity = qa.evaluate(model, max_examples=96)["perplexity"]
    return f"{perplexity:.2f} | {qa.evaluate(model, evaluation='agreement')['kl']:.4f}"


def row(source: str, backend: str, options: dict[str, Any], given: dict[str, Any]) -> str:
    """Measure one backend and return its row."""
    device = given.pop("device")
    cells, times = [], []
    for adapter in ({}, {"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 5}}):
        base = qa.quantize(source, backend, device=device, **options)
        model = qa.attach(base, "lora", r=16, lora_alpha=32, target_modules="all-linear", **adapter)
        cells.append(figures(model))
        result = qa.train(model, objective="distill", verbose=False, **given)
        cells.append(figures(model))
        times.append(f"{1000 * result.seconds / result.steps:.0f} | {result.peak_memory_gib:.2f}")
        del base, model
    quantized, distilled, started, both = cells
    name = " ".join([backend, *(f"{key}={value}" for key, value in options.items())])
    return f"| {name} | {quantized} | {started} | {distilled} | {both} | {times[0]} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rate", type=float, default=2e-3, help="of learning")
    parser.add_argument("--model", default=str(demo.MODEL_DIR), help="has the demo's tokenizer")
    parser.add_argument("--batch", type=int, default=8)
    asked = parser.parse_args()
    given = {
        "device": asked.device,
        "max_steps": asked.steps,
        "learning_rate": asked.rate,
        "per_device_train_batch_size": asked.batch,
    }
    dense = qa.quantize(asked.model, "none", device=asked.device)
    print(f"dense: perplexity {qa.evaluate(dense, max_examples=96)['perplexity']:.2f}\n")
    del dense
    names = ("quantized", "LoftQ's start", "distilled", "distilled from LoftQ")
    heads = " | ".join(f"{name} | KL" for name in names)
    print(f"| backend | {heads} | ms/step | GiB |")
    print(f"| --- |{' ---: |' * 10}", flush=True)
    for backend, options in ROWS:
        print(row(asked.model, backend, options, dict(given)), flush=True)
    names = ("torch", "transformers", "peft", "trl", "hqq", "bitsandbytes")
    print(f"\n{platform.machine()}, {torch.get_num_threads()} threads; {versions(*names)}")


if __name__ == "__main__":
    main()
