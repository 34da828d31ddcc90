"""What quantizing costs, and what distilling from the dense base gets back, beside LoftQ.

    python benchmarks/distillation.py [--steps 100] [--device cpu]
    python benchmarks/distillation.py --shape 1b --device cuda --steps 60

For each backend: perplexity on held-out text and KL divergence from the dense model, in nats per
token, of the quantized base, of LoftQ's start (five rounds, not trained), and after distilling from
both starts. By default on the bundled demo; `--shape 1b` makes a Llama of 1.2 billion random
weights, of which only the divergence means something. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from shapes import Shape
from versions import versions

import quantadapt as qa
from quantadapt import demo

ROWS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("bnb-nf4", {}),
    ("hqq", {"bits": 4, "group_size": 64}),
    ("hqq", {"bits": 3, "group_size": 64}),
    ("hqq", {"bits": 2, "group_size": 64}),
)
SHAPES = {"1b": Shape(2048, 8192, 16, 32, 8, 128256, batch=8, length=512)}
RATES = {"": 2e-3, "1b": 2e-4}


def random_checkpoint(shape: Shape, folder: Path) -> str:
    """Write a checkpoint of random weights with the demo's tokenizer. What its layers make is as
    large as what they get, so that it prefers some tokens to others."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = shape.config()
    config.tie_word_embeddings = True
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=2 * parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    for file in demo.MODEL_DIR.glob("*token*.json"):
        shutil.copy(file, folder)
    return str(folder)


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
    parser.add_argument("--shape", choices=SHAPES, default="")
    parser.add_argument("--batch", type=int, default=8)
    asked = parser.parse_args()
    given = {
        "device": asked.device,
        "max_steps": asked.steps,
        "learning_rate": RATES[asked.shape],
        "per_device_train_batch_size": asked.batch,
    }
    with tempfile.TemporaryDirectory() as folder:
        source = str(demo.MODEL_DIR)
        if asked.shape:
            source = random_checkpoint(SHAPES[asked.shape], Path(folder))
        dense = qa.quantize(source, "none", device=asked.device)
        print(f"dense: perplexity {qa.evaluate(dense, max_examples=96)['perplexity']:.2f}\n")
        del dense
        names = ("quantized", "LoftQ's start", "distilled", "distilled from LoftQ")
        heads = " | ".join(f"{name} | KL" for name in names)
        print(f"| backend | {heads} | ms/step | GiB |")
        print(f"| --- |{' ---: |' * 10}", flush=True)
        for backend, options in ROWS:
            print(row(source, backend, options, dict(given)), flush=True)
    names = ("torch", "transformers", "peft", "trl", "hqq", "bitsandbytes")
    print(f"\n{platform.machine()}, {torch.get_num_threads()} threads; {versions(*names)}")


if __name__ == "__main__":
    main()
