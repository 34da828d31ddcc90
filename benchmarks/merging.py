"""What a merge that is quantized again keeps of the gain, by the way its weights are rounded.

    python benchmarks/merging.py [--steps 60] [--rates 1e-4 5e-4] [--only "hqq, 2"] [--device cpu]
        [--ways nearest grid dithered refined compensated] [--no-aware] [--model DIR]

The bundled demo, or a model that `real_shape.py --make` made; LoRA with its defaults, trained on
the demo's examples. Gains are in nats per token on the demo's held-out data, against the quantized
base. The last columns are a second training, through the quantizer (train.merge_aware): what its
merged model gains, as a share of what the first adapter gains before any merge, the KL of the
merged model to the trained one, and how long training takes against the first, compiling included
(`speed.py` times steps: `ours-nf4-aware`). Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from versions import versions

import quantadapt as qa
from quantadapt import demo
from quantadapt.evaluation.gain import TokenLosses, token_losses
from quantadapt.exporting.rounding import WAYS
from quantadapt.exporting.tuned import Tuned, compared
from quantadapt.quantizing.examples import examples_from
from quantadapt.quantizing.state import state_of
from quantadapt.registry import registry
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
PACKAGES = (
    *("torch", "transformers", "peft", "hqq", "bitsandbytes", "torchao", "optimum-quanto", "eetq"),
    *("gptqmodel", "auto-round", "compressed-tensors"),
)
AWARE = ("merge-aware training", "its KL", "its step time")


def rows(backend: str, options: dict[str, Any], given: argparse.Namespace) -> Iterator[str]:
    """Quantize once; for each learning rate train, merge in each way, and yield a row."""
    shown = str(demo.TRAIN_FILE) if registry().backend(backend).calibration else None
    base = qa.quantize(given.model, backend, device=given.device, calibration=shown, **options)
    before = token_losses(base, held_out_data(None, state_of(base).tokenizer))
    for rate in given.rates:
        how = {"max_steps": given.steps, "learning_rate": rate}
        tuned, took = trained(base, before, **how)
        gain = tuned.gain
        assert gain is not None
        cells = [kept(tuned, name) for name in given.ways]
        tuned.model.unload()
        if given.aware:
            aware, its = trained(base, before, merge_aware=True, **how)
            cells += [*through_the_quantizer(aware, gain.value), f"{its / took:.2f}"]
            aware.model.unload()
        size = f"{gain.value:.2f} ± {gain.error:.2f}"
        yield f"| {label(backend, options)} | {rate:g} | {size} | {' | '.join(cells)} |"


def label(backend: str, options: dict[str, Any]) -> str:
    """Return what a row is called: `hqq, 2`."""
    return ", ".join([backend, *map(str, options.values())])


def trained(base: Any, before: TokenLosses, **how: Any) -> tuple[Tuned, float]:
    """Return `base`, whose losses are `before`, with a LoRA that was just trained, and how many
    seconds the second half of its steps took: in the first kernels are compiled."""
    model, ends = qa.attach(base, "lora"), dict[int, float]()

    def note(entry: dict[str, Any]) -> None:
        ends[entry["step"]] = perf_counter()

    qa.train(model, str(demo.TRAIN_FILE), verbose=False, on_log=note, **how)
    tuned = Tuned(
        model,
        before=before,
        data=lambda tokenizer: held_out_data(None, tokenizer),
        examples=lambda tokenizer: examples_from(str(demo.TRAIN_FILE), tokenizer),
    )
    late = [when for step, when in ends.items() if step >= max(ends) // 2]
    return tuned, late[-1] - late[0]


def kept(tuned: Tuned, name: str) -> str:
    """Return what is kept of the gain by the way of rounding `name`, as a cell."""
    if WAYS[name].why_not(tuned):
        return ""
    share = tuned.gain_kept(WAYS[name].merged(tuned))
    return "" if share is None else f"{share:.1%}"


def through_the_quantizer(tuned: Tuned, gain: float) -> list[str]:
    """Return what a merge-aware model gains once merged, as a share of `gain`, and the KL of the
    merged model to it, as cells."""
    own, merged = tuned.gain, tuned.merged("requantize")
    assert own is not None
    share = tuned.gain_kept(merged) or 0.0
    found = compared(tuned.model, merged, tuned.held_out)
    return [f"{share * own.value / gain:.1%}", f"{found['kl'].value:.0e}"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 5e-4])
    parser.add_argument("--only", nargs="+", help="rows, by backend or name")
    parser.add_argument("--ways", nargs="*", choices=[*WAYS], default=[*WAYS])
    parser.add_argument("--aware", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--model", help="a folder with the demo's tokenizer; by default the demo")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    columns = [*given.ways, *(AWARE if given.aware else ())]
    print(f"| backend | learning rate | gain, nats per token | {' | '.join(columns)} |")
    print(f"| --- | ---: | ---: |{' ---: |' * len(columns)}", flush=True)
    for backend, options in ROWS:
        if not given.only or {backend, label(backend, options)} & {*given.only}:
            for row in rows(backend, options, given):
                print(row, flush=True)
    where = torch.cuda.get_device_name() if given.device == "cuda" else processor()
    made = versions(*PACKAGES)
    print(f"\n{given.steps} steps, {where}, {torch.get_num_threads()} threads; {made}")


def processor() -> str:
    """Return what the CPU is called."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
