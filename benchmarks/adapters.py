"""How fast other adapters train than LoRA, on one quantized base.

    python benchmarks/adapters.py --shape 8b --adapter lora dora vera adalora ia3

Each on all linear layers of random weights in nf4, every layer recomputed, with the options that
`quantadapt adapters` shows; all in one process, one after the other. Prints a Markdown table:
tokens per second (median of the steps after the first three), against the first one's, GiB in use
at most, those that `quantadapt plan` foresees, those that the models before have left (which count
in the peak), how many weights are trained, and the share of the time that the products with frozen
weights would take at the least. `--device cpu` tries it in a toy size.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from growth import foreseen_gib, free, median_step, model_of
from several_gpus import peak
from shapes import SHAPES
from speed import device_name
from versions import versions

PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "bitsandbytes", "liger-kernel")


def main() -> None:
    """Measure and print the table."""
    given = arguments()
    shape = SHAPES["demo" if given.device == "cpu" else given.shape]
    if given.layers:
        shape = replace(shape, num_hidden_layers=given.layers)
    heads = "tokens/s | ratio | peak GiB | foreseen | left before | trained weights | of the floor"
    print(f"| adapter | {heads} |\n| --- | {'---: | ' * 7}", flush=True)
    reference = None
    for name in given.adapter:
        free(given.device)
        left = held(given.device)
        options = {"r": 16, "lora_alpha": 16} if name in ("lora", "dora") else {}
        model = model_of(shape, given.device, name, **options)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        seconds = median_step(model, shape)
        reference = reference or seconds
        share = shape.floor_seconds(1.0) / seconds
        cells = f"{shape.tokens / seconds:,.0f}", f"{reference / seconds:.3f}"
        foreseen = foreseen_gib(shape, {"name": name, **options})
        cells += f"{peak(given.device)[0]:.2f}", f"{foreseen:.2f}", f"{left:.2f}"
        cells += f"{trained:,}", f"{share:.1%}"
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        del model
    print(f"\n{given.shape}; {device_name(given.device)}; {versions(*PACKAGES)}")


def held(device: str) -> float:
    """Return the GiB that are allocated now."""
    if device == "cpu":
        return 0.0
    import torch

    return torch.cuda.memory_allocated() / 2**30


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = ["lora", "dora", "vera", "adalora", "ia3"]
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--adapter", nargs="+", default=default)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    return parser.parse_args()


if __name__ == "__main__":
    main()
