"""What a merge that is quantized again keeps of the gain, by the way its weights are rounded.

    python benchmarks/merging.py [--steps 60] [--rates 1e-4 5e-4] [--only hqq] [--device cpu]
        [--ways nearest grid dithered compensated] [--no-aware]

The bundled demo, LoRA with its defaults; gains are in nats per token on the demo's held-out data,
against the quantized base. The last columns are a second training, through the quantizer
(train.merge_aware): what its merged model gains, as a share of what the first adapter gains before
any merge, the KL of the merged model to the trained one, and how long a step takes against the
first. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path
from typing import Any

import torch
from versions import versions

import quantadapt as qa
from quantadapt.exporting.rounding import WAYS
from quantadapt.exporting.tuned import Tuned
from quantadapt.stages import held_out_data

ROWS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("hqq", {"bits": 4}),
    ("hqq", {"bits": 3}),
    ("hqq", {"bits": 2}),
    ("bnb-nf4", {}),
    ("bnb-int8", {}),
    ("torchao-int4", {}),
    ("torchao-int8", {}),
    ("torchao-intx", {"bits": 3}),
    ("torchao-fp8", {}),
    ("quanto", {"weights": "int4"}),
    ("eetq", {}),
    ("gptq", {"bits": 4, "group_size": 64}),
    ("awq", {"group_size": 64}),
    ("autoround", {"bits": 4, "group_size": 64, "iters": 20}),
    ("mxfp4", {}),
    ("nvfp4", {}),
    ("finegrained-fp8", {}),
    ("compressed-tensors", {"scheme": "W4A16"}),
)
AWARE = ("merge-aware training", "its KL", "its step time")


def row(backend: str, options: dict[str, Any], rate: float, given: argparse.Namespace) -> str:
    """Train, merge in each way, and return a row of Markdown."""
    how = {"max_steps": given.steps, "learning_rate": rate}
    tuned, took = trained(backend, options, given.device, **how)
    gain = tuned.gain
    assert gain is not None
    cells = []
    for name in given.ways:
        way = WAYS[name]
        if way.why_not(tuned):
            cells.append("")
            continue
        started = time.perf_counter()
        kept = tuned.gain_kept(way.merged(tuned))
        seconds = time.perf_counter() - started
        cells.append("" if kept is None else f"{kept:.0%} ({seconds:.0f} s)")
    if given.aware:
        aware, its = trained(backend, options, given.device, merge_aware=True, **how)
        cells += [*through_the_quantizer(aware, gain.value), f"{its / took:.2f}"]
    label = ", ".join([backend, *(f"{value}" for value in options.values())])
    return f"| {label} | {rate:g} | {gain.value:.2f} ± {gain.error:.2f} | {' | '.join(cells)} |"


def trained(backend: str, options: dict[str, Any], device: str, **how: Any) -> tuple[Tuned, float]:
    """Return a model that was just trained, and how many seconds that took."""
    model = qa.attach(qa.quantize(None, backend, device=device, **options), "lora")
    found = qa.train(model, verbose=False, **how)
    return Tuned(model, data=lambda tokenizer: held_out_data(None, tokenizer)), found.seconds


def through_the_quantizer(tuned: Tuned, gain: float) -> list[str]:
    """Return what a merge-aware model gains once merged, as a share of `gain`, and the KL of the
    merged model to it, as cells."""
    own, merged = tuned.gain, tuned.merged("requantize")
    assert own is not None
    kept = tuned.gain_kept(merged) or 0.0
    return [f"{kept * own.value / gain:.0%}", f"{tuned.compared(merged)['kl'].value:.0e}"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 5e-4])
    parser.add_argument("--only", nargs="+", help="backends, by name")
    parser.add_argument("--ways", nargs="*", choices=[*WAYS], default=[*WAYS])
    parser.add_argument("--aware", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    columns = [*given.ways, *(AWARE if given.aware else ())]
    print(f"| backend | learning rate | gain, nats per token | {' | '.join(columns)} |")
    print(f"| --- | ---: | ---: |{' ---: |' * len(columns)}", flush=True)
    for backend, options in ROWS:
        for rate in given.rates if not given.only or backend in given.only else ():
            print(row(backend, options, rate, given), flush=True)
    where = torch.cuda.get_device_name() if given.device == "cuda" else processor()
    made = versions("torch", "transformers", "peft", "hqq", "bitsandbytes", "torchao")
    print(f"\n{given.steps} steps, {where}, {torch.get_num_threads()} threads; {made}")


def processor() -> str:
    """Return what the CPU is called."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
