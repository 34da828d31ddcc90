"""Training speed and memory of LoRA on a quantized Llama, against what a user would run instead.

    python benchmarks/speed.py --shape 8b --case unsloth peft-nf4 ours-nf4 ours-nf4:min

Cases: `peft-nf4`, `unsloth`, `unsloth-none` (without checkpointing), `ours-BACKEND:MEMORY`, where
memory is `full` (each layer is computed again in backward; the default), `min` (the same, and the
layers' inputs wait in CPU memory), `auto` (what fits), a number (what fits into so many GiB) or
`none`. `peft-nf4-dora` and `ours-BACKEND-dora:MEMORY` train DoRA, `ours-BACKEND-aware:MEMORY`
through the quantizer, `ours-BACKEND-fp8products:MEMORY` with products in 8-bit floats
(`train.compute: fp8`). Each runs in a process of its own on random weights of the given shape:
batch 4 x 2048, LoRA r=16 on all seven projections, AdamW.

Prints a Markdown table: tokens per second (median of groups of four steps, after four; the loss is
read once in each) and their ratio to the first case; peak GiB, what PyTorch held of the card for
it, and what quantadapt foresaw; time and peak of loading; the share of layers computed
again in backward; the share of the step that its arithmetic takes at least
(`shapes.Shape.floor_seconds`); the first and last loss, which have to agree.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from kernel_table import Profile
from shapes import SHAPES, Shape, checkpoint
from speed_cases import WARM_UP, check, run_case
from tables import case_rows
from versions import versions

PACKAGES = (
    *("torch", "transformers", "peft", "trl", "bitsandbytes", "liger-kernel"),
    *("hqq", "torchao", "optimum-quanto", "unsloth"),
)
COLUMNS = {
    "tokens/s": ("tokens_per_second", ",.0f"),
    "ratio": ("ratio", ".3f"),
    "peak GiB": ("peak_gib", ".2f"),
    "reserved GiB": ("reserved_gib", ".2f"),
    "foreseen GiB": ("predicted_gib", ".2f"),
    "load s": ("load_seconds", ".1f"),
    "load peak GiB": ("load_peak_gib", ".2f"),
    "recomputed": ("recomputed", ".0%"),
    "floor": ("of_floor", ".1%"),
}
RESULT = "RESULT "


def main() -> None:
    """Run the cases and print the table."""
    given = arguments()
    if given.one:
        print(RESULT + json.dumps(run_here(given)))
        return
    # In a process of its own, which gives the GPU's memory back.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(checkpoint, given.shape, given.folder).result()
    results = case_rows(given.case, lambda case: run_apart(case, given), COLUMNS, given.out)
    sys.path.append(given.unsloth_site or "")
    shape = shape_of(given)
    batch = f"{shape.batch} x {shape.length}"
    print(f"\n{given.shape}, {batch}; {device_name(given.device)}; {versions(*PACKAGES)}")
    for found in results:
        if found.get("setting"):
            print(f"\n{found['case']}: {found['setting']}")
        if found.get("tables"):
            print(f"\n{found['case']}: {found['tables']}")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--case", nargs="+", type=check, default=["peft-nf4", "ours-nf4"])
    parser.add_argument("--batch", type=int, help="rows of a step, instead of the shape's")
    parser.add_argument("--length", type=int, help="tokens of a row, likewise")
    parser.add_argument("--steps", type=int, default=20, help=f"the first {WARM_UP} do not count")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/quantadapt-speed"))
    parser.add_argument("--timeout", type=float, default=300, help="seconds for each case")
    parser.add_argument("--profile", action="store_true", help="also print kernels of two steps")
    parser.add_argument("--out", type=Path, help="a file for the figures as JSON")
    parser.add_argument("--unsloth-site", help="folder that Unsloth is installed in, if apart")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.steps <= WARM_UP:
        parser.error(f"--steps has to be more than {WARM_UP}")
    given.folder = given.folder.resolve()
    return given


def run_here(given: argparse.Namespace) -> dict[str, Any]:
    """Run the case `given.one` in this process."""
    profile = Profile(given.device) if given.profile else None
    path = given.folder / f"llama-{given.shape}"
    return run_case(given.one, path, shape_of(given), given.device, given.steps, profile)


def shape_of(given: argparse.Namespace) -> Shape:
    """Return the shape, with the batch that is asked for."""
    shape = SHAPES[given.shape]
    return replace(shape, batch=given.batch or shape.batch, length=given.length or shape.length)


def run_apart(case: str, given: argparse.Namespace) -> dict[str, Any]:
    """Run a case in another process; what went wrong there becomes `error`."""
    command = [sys.executable, str(Path(__file__).resolve()), "--one", case]
    command += ["--shape", given.shape, "--steps", str(given.steps), "--device", given.device]
    command += ["--folder", str(given.folder), *(["--profile"] if given.profile else [])]
    for name, value in (("--batch", given.batch), ("--length", given.length)):
        command += [name, str(value)] if value else []
    environment = dict(os.environ)
    if given.unsloth_site and case.startswith("unsloth"):
        path = [environment.get("PYTHONPATH", ""), given.unsloth_site]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=given.timeout,
            env=environment,
            cwd=given.folder,  # Unsloth writes what it compiles into the working folder
        )
    except subprocess.TimeoutExpired:
        return {"case": case, "error": f"{case}: not done after {given.timeout:.0f} s\n"}
    line = next((x for x in done.stdout.splitlines() if x.startswith(RESULT)), None)
    if line is not None:
        found: dict[str, Any] = json.loads(line.removeprefix(RESULT))
        return found
    return {
        "case": case,
        "error": f"{case}: failed ({done.returncode})\n{last_words(done.stderr)}\n",
    }


def last_words(stderr: str, before: int = 5, after: int = 12) -> str:
    """Return the lines around the last error, which can have many lines of advice behind it."""
    lines = stderr.strip().splitlines()
    errors = [i for i, line in enumerate(lines) if re.match(r"[\w.]+(Error|Refused)\b", line)]
    at = errors[-1] if errors else len(lines)
    return "\n".join(lines[max(0, at - before) : at + after])


def device_name(device: str) -> str:
    """Return what the table was measured on."""
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else platform.machine()


if __name__ == "__main__":
    main()
