"""Answering speed of LoRA on a quantized Llama, against what a user would run instead.

    python benchmarks/answering.py --shape 8b --case peft-nf4 unsloth ours-nf4 ours-hqq

Cases are those of speed.py, each in a process of its own on random weights of the given shape. A
batch of prompts of 128 tokens is answered greedily with 128 more; the first batch does not count,
the median of three does. `ours` decodes as `quantadapt generate` and `serve` do, `peft-nf4` by
transformers' `generate`, `unsloth` by its `for_inference`. `ours-...:growing` decodes without
fixed slots, and so without CUDA graphs. `same` says how many tokens are those of the first
case, which has the same weights where it is nf4, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shapes import SHAPES, checkpoint
from speed import device_name
from speed_cases import OURS, _import, _parts, _peak_gib, _synchronize
from versions import versions

PROMPT = NEW = 128
ROUNDS = 3
GROWING = ":growing"
RESULT = "RESULT "
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "hqq", "torchao", "unsloth")


def main() -> None:
    """Run the cases and print the table."""
    given = arguments()
    if given.one:
        print(RESULT + json.dumps(run_here(given.one, given)))
        return
    path = checkpoint(given.shape, given.folder)
    names = [f"tokens/s at {batch}" for batch in given.batch]
    print(f"| case | {' | '.join(f'{name} | ratio | same' for name in names)} | peak GiB |")
    print(f"| --- | {'---: | ' * (3 * len(names))}---: |", flush=True)
    first: dict[str, Any] | None = None
    for case in given.case:
        found = run_apart(case, given)
        if "failed" in found:
            print(f"| {case} | {found['failed']} |", flush=True)
            continue
        first = first or found
        print(row(case, found, first), flush=True)
    print(f"\n{given.shape}, {path.name}; {device_name(given.device)}; {versions(*PACKAGES)}")


def row(case: str, found: dict[str, Any], first: dict[str, Any]) -> str:
    """Return the case's line of the table."""
    cells = []
    for batch, here in found["batches"].items():
        there = first["batches"][batch]
        same = [a == b for a, b in zip(here["tokens"], there["tokens"], strict=False)]
        cells += [f"{here['speed']:.1f}", f"{here['speed'] / there['speed']:.2f}"]
        cells.append(f"{sum(same) / max(len(same), 1):.0%}")
    peak = "" if found["peak_gib"] is None else f"{found['peak_gib']:.2f}"
    return f"| {case} | {' | '.join(cells)} | {peak} |"


def run_apart(case: str, given: argparse.Namespace) -> dict[str, Any]:
    """Run a case in another process; what went wrong there becomes `failed`."""
    command = [sys.executable, str(Path(__file__).resolve()), "--one", case]
    command += ["--shape", given.shape, "--device", given.device, "--folder", str(given.folder)]
    command += ["--batch", *map(str, given.batch)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=given.timeout,
            cwd=given.folder,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {given.timeout:.0f} s"}
    lines = [x for x in done.stdout.splitlines() if x.startswith(RESULT)]
    if not lines:
        return {"failed": " ".join(done.stderr.strip().splitlines()[-1:])[:200]}
    found: dict[str, Any] = json.loads(lines[0].removeprefix(RESULT))
    return found


def run_here(case: str, given: argparse.Namespace) -> dict[str, Any]:
    """Load a case in this process and answer."""
    import torch

    name = case.removesuffix(GROWING)
    _import(name)
    shape = SHAPES[given.shape]
    model = _parts(name)[0](given.folder / f"llama-{given.shape}", shape, given.device)
    answer = _answering(case, model)
    generator = torch.Generator().manual_seed(1)
    found: dict[str, Any] = {"batches": {}}
    for batch in given.batch:
        prompts = torch.randint(3, shape.vocab_size, (batch, PROMPT), generator=generator)
        seconds = []
        for _ in range(1 + ROUNDS):
            _synchronize(given.device)
            started = time.perf_counter()
            tokens = answer(prompts.to(given.device))
            seconds.append(time.perf_counter() - started)
        speed = batch * NEW / statistics.median(seconds[1:])
        found["batches"][str(batch)] = {
            "speed": speed,
            "tokens": [t for answer in tokens for t in answer],
        }
    return found | {"peak_gib": _peak_gib(given.device)}


def _answering(case: str, model: Any) -> Callable[[Any], list[list[int]]]:
    """Return what answers a batch of prompts, int64 [batch, PROMPT], with NEW tokens each."""
    if case.startswith("unsloth"):
        from unsloth import FastLanguageModel

        FastLanguageModel.for_inference(model)
    model.eval()
    return _ours(case, model) if case.startswith("ours") else _by_transformers(model)


def _by_transformers(model: Any) -> Callable[[Any], list[list[int]]]:
    import torch

    def answer(prompts: Any) -> list[list[int]]:
        with torch.no_grad():
            found = model.generate(
                input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=False,
                max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0, use_cache=True,
            )  # fmt: skip
        tokens: list[list[int]] = found[:, PROMPT:].tolist()
        return tokens

    return answer


def _ours(case: str, model: Any) -> Callable[[Any], list[list[int]]]:
    from quantadapt.evaluation.predictions import evaluating
    from quantadapt.generation.rows import Row, Rows
    from quantadapt.generation.sampling import Sampling
    from quantadapt.generation.slots import rows_for

    batch = Rows(model) if case.endswith(GROWING) else rows_for(model)

    def answer(prompts: Any) -> list[list[int]]:
        sampling = Sampling(max_new_tokens=NEW)
        rows = [Row(ids, sampling.chooser(i), NEW) for i, ids in enumerate(prompts.tolist())]
        with evaluating(model):
            batch.add(rows)
            while batch.rows:
                batch.step()
        return [row.tokens for row in rows]

    return answer


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = ["peft-nf4", "unsloth", *OURS, *(f"{name}{GROWING}" for name in OURS)]
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--case", nargs="+", choices=known, default=["peft-nf4", "ours-nf4"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/quantadapt-speed"))
    parser.add_argument("--timeout", type=float, default=300, help="seconds for each case")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.folder = given.folder.resolve()
    return given


if __name__ == "__main__":
    main()
