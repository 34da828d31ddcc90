"""AQLM against hqq at about 2 bits, on the whole bundled demo.

    python benchmarks/aqlm_vs_hqq.py [--device cpu]

Bits per weight count everything that is stored for the quantized layers: codes, codebooks, scales
and zero points, the latter three in 16 bits each. AQLM calibrates on the demo's instructions; both
errors are relative and a mean over the layers, that of the outputs on held-out tokens. Prints a
Markdown table.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

import quantadapt as qa
from quantadapt import demo
from quantadapt.data import load_everything
from quantadapt.facade import facades
from quantadapt.loading import from_pretrained
from quantadapt.quantizing import load_tokenizer

ROWS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("none", {}),
    ("hqq", {"bits": 2, "group_size": 64}),
    ("hqq", {"bits": 2, "group_size": 16}),
    ("aqlm", {"num_codebooks": 1, "in_group_size": 4}),
    ("aqlm", {"num_codebooks": 1, "in_group_size": 4, "beam_size": 1, "max_epochs": 2}),
    ("aqlm", {"num_codebooks": 2, "in_group_size": 8}),
)
EXAMPLES = 64


def stored_bits(vendor: Any) -> float:
    """Return how many bits a quantized layer takes."""
    if hasattr(vendor, "codebooks"):
        numbers = vendor.codebooks.numel() + vendor.scales.numel()
        return vendor.codes.numel() * vendor.nbits_per_codebook + 16 * numbers
    if hasattr(vendor, "W_q"):
        numbers = vendor.meta["scale"].numel() + vendor.meta["zero"].numel()
        return vendor.in_features * vendor.out_features * vendor.meta["nbits"] + 16 * numbers
    return 16 * vendor.weight.numel()


class Errors:
    """Compares quantized layers with those of the unquantized model on the same inputs."""

    def __init__(self, device: str) -> None:
        tokenizer = load_tokenizer(str(demo.MODEL_DIR))
        held_out = [*load_everything(str(demo.EVAL_FILE), tokenizer)][:EXAMPLES]
        held_out += [*load_everything(str(demo.TEXT_FILE), tokenizer)][:EXAMPLES]
        self.examples = [torch.tensor([e["input_ids"]], device=device) for e in held_out]
        dense = from_pretrained(str(demo.MODEL_DIR), dtype=torch.float32)
        self.dense = dense.to(device).eval()

    def of(self, model: nn.Module) -> tuple[float, float]:
        """Return the mean relative error of weights, and of outputs."""
        weights, outputs, hooks = {}, {}, []
        for name, facade in facades(model):
            linear = self.dense.get_submodule(name)
            weight = linear.weight.detach()
            difference = facade.dequantize().float() - weight
            weights[name] = float(difference.norm() / weight.norm())
            outputs[name] = torch.zeros(2, dtype=torch.float64)

            def add(_: Any, args: Any, y: torch.Tensor, name: str = name, d: Any = difference):
                wrong = nn.functional.linear(args[0], d)
                outputs[name] += torch.tensor([wrong.square().sum(), y.square().sum()])

            hooks.append(linear.register_forward_hook(add))
        with torch.no_grad():
            for ids in self.examples:
                self.dense(input_ids=ids)
        for hook in hooks:
            hook.remove()
        found = [float((wrong / whole).sqrt()) for wrong, whole in outputs.values()]
        return sum(weights.values()) / len(weights), sum(found) / len(found)


def row(backend: str, options: dict[str, Any], errors: Errors, device: str) -> str:
    """Run one row and return it as Markdown."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["QUANTADAPT_CACHE"] = cache  # nothing is taken over from another run
        started = time.perf_counter()
        model = qa.quantize(None, backend, device=device, dtype="float32", **options)
        seconds = time.perf_counter() - started
    layers = [facade for _, facade in facades(model)]
    size = sum(layer.in_features * layer.out_features for layer in layers)
    bits = sum(stored_bits(layer.vendor) for layer in layers) / size
    weight_error, output_error = errors.of(model)
    instructions = qa.evaluate(model)["perplexity"]
    text = qa.evaluate(model, str(demo.TEXT_FILE))["perplexity"]
    name = " ".join([backend, *(f"{key}={value}" for key, value in options.items())])
    cells = (
        f"{bits:.2f}",
        f"{weight_error:.3f}",
        f"{output_error:.3f}",
        f"{instructions:.2f}",
        f"{text:.2f}",
        f"{seconds:.1f}",
    )
    return f"| {name} | {' | '.join(cells)} |"


def hardware(device: str) -> str:
    """Name what it ran on."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    errors = Errors(device)
    print(
        "| backend | bits per weight | weight error | output error | perplexity, instructions "
        "| perplexity, other text | quantize s |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for backend, options in ROWS:
        print(row(backend, options, errors, device), flush=True)
    names = ("torch", "transformers", "aqlm", "hqq")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    print(f"\n{hardware(device)}; {versions}")


if __name__ == "__main__":
    main()
