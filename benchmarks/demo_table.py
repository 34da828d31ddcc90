"""The bundled demo on every backend: perplexity before and after LoRA, size, and time.

    python benchmarks/demo_table.py [--steps 60] [--device cpu]

Same data, seed and adapter for each row, one run after the other, in one process. Prints a
Markdown table.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
from versions import versions

import quantadapt as qa

ROWS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("none", {}),
    ("hqq", {"bits": 8}),
    ("hqq", {"bits": 4}),
    ("hqq", {"bits": 3}),
    ("hqq", {"bits": 2}),
    ("bnb-nf4", {}),
    ("bnb-fp4", {}),
    ("bnb-int8", {}),
    ("torchao-int8", {}),
    ("torchao-int4", {}),
    ("torchao-intx", {"bits": 3}),
    ("torchao-fp8", {}),
    ("eetq", {}),
    ("quanto", {"weights": "int8"}),
    ("quanto", {"weights": "int4"}),
    ("quanto", {"weights": "int2"}),
    ("gptq", {"bits": 4, "group_size": 64}),
    ("gptq", {"bits": 3, "group_size": 64}),
    ("gptq", {"bits": 2, "group_size": 64}),
    ("awq", {"group_size": 64}),
    ("autoround", {"bits": 4, "group_size": 64, "iters": 20}),
    ("autoround", {"bits": 2, "group_size": 64, "iters": 20}),
    ("aqlm", {"num_codebooks": 1, "in_group_size": 4}),
    ("inc", {"method": "fp8"}),
    ("inc", {"method": "rtn", "bits": 4}),
)


def row(backend: str, options: dict[str, Any], steps: int, device: str) -> str:
    """Run one row and return it as Markdown."""
    with tempfile.TemporaryDirectory() as folder:
        spec = qa.Spec(
            backend={"name": backend, **options},
            train={"max_steps": steps},
            evaluate={"samples": 0, "unquantized": False},
            output=str(Path(folder) / "run"),
            device=device,
        )
        metrics = qa.run(spec).metrics
    found = metrics["evaluations"]["perplexity"]["perplexity"]["values"]
    size, merge = metrics["size"], metrics["merge"]
    merged = "kl" in merge
    name = " ".join([backend, *(f"{key}={value}" for key, value in options.items())])
    cells = (
        f"{found['quantized']:.2f}",
        f"{found['tuned']:.3f}",
        f"{found['merged']:.3f}" if merged else "refused",
        f"{merge['kl']:.1e}" if merged else "",
        f"{size['quantized_mib']:.2f}",
        f"{metrics['stages']['quantize']:.2f}",
        f"{1000 * metrics['train']['seconds'] / metrics['train']['steps']:.0f}",
    )
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--backend", action="append")
    options = parser.parse_args()
    print("| backend | quantized | tuned | merged | KL of the merge | MiB | quantize s | ms/step |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for backend, chosen in ROWS:
        if options.backend and backend not in options.backend:
            continue
        print(row(backend, chosen, options.steps, options.device), flush=True)
    names = ["torch", "transformers", "peft", "trl", "hqq", "bitsandbytes", "torchao"]
    names += ["gptqmodel", "aqlm", "neural-compressor", "optimum-quanto", "auto-round"]
    print(f"\n{platform.machine()}, {torch.get_num_threads()} threads; {versions(*names)}")


if __name__ == "__main__":
    main()
