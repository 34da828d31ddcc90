"""What products in 8-bit floats (`train.compute: fp8`) do to learning: curves and perplexities.

    python benchmarks/float8.py --model DIR [--make 120] [--backend bnb-nf4] [--steps 60]

Trains LoRA r=16 on all layers on the demo's instructions twice, from the same start and on the same
batches, with products in the compute dtype and in 8-bit floats. `--make STEPS` first makes the
model of `real_shape.py` (the shape of Llama 3.2 1B) in DIR. Needs a GPU from Hopper on.

Prints the two curves, how far they are apart, and the perplexity on held-out answers before and
after, in Markdown.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import real_shape
import torch
from versions import versions

import quantadapt as qa

PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "bitsandbytes")
EVERY = 5
"""A point of a curve is the mean loss of so many steps."""


def trained(given: argparse.Namespace, compute: str) -> dict[str, Any]:
    """Train, and return the curve, the perplexity before and after, and tokens per second."""
    model = qa.quantize(str(given.model), given.backend, device="cuda", dtype="bfloat16")
    before = qa.evaluate(model)["perplexity"]
    model = qa.attach(model, "lora", r=16, lora_alpha=16)
    result = qa.train(
        model,
        compute=compute,
        max_steps=given.steps,
        per_device_train_batch_size=16,
        logging_steps=EVERY,
        gradient_checkpointing=False,
    )
    return {
        "curve": result.losses,
        "before": before,
        "after": qa.evaluate(model)["perplexity"],
        "speed": result.tokens / result.seconds,
    }


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--make", type=int, metavar="STEPS")
    parser.add_argument("--backend", default="bnb-nf4")
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args()
    if given.make:
        real_shape.make(given.model, given.make)
    plain, float8 = (trained(given, compute) for compute in ("dtype", "fp8"))
    print("\n| step | bf16 | fp8 | fp8 / bf16 - 1 |\n| ---: | ---: | ---: | ---: |")
    apart = []
    for (step, loss), (_, other) in zip(plain["curve"], float8["curve"], strict=True):
        apart.append(other / loss - 1)
        print(f"| {step} | {loss:.4f} | {other:.4f} | {apart[-1]:+.3%} |")
    print("\n| products | perplexity before | after | tokens/s |\n| --- | ---: | ---: | ---: |")
    for name, found in (("bf16", plain), ("fp8", float8)):
        print(f"| {name} | {found['before']:.4f} | {found['after']:.4f} | {found['speed']:,.0f} |")
    print(
        f"\nfurthest apart {max(map(abs, apart)):.3%}, on the mean {sum(apart) / len(apart):+.3%}"
    )
    print(f"{given.backend}, {torch.cuda.get_device_name()}; {versions(*PACKAGES)}")


if __name__ == "__main__":
    main()
