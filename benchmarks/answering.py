"""Answering speed of LoRA on a quantized Llama, against what a user would run instead.

    python benchmarks/answering.py --shape 8b --case peft-nf4 unsloth ours-nf4 ours-hqq

Cases are those of speed.py, each in a process of its own on random weights of the given shape. A
batch of prompts of 128 tokens is answered greedily with as many more; the first batch does not
count, the median of the others (`--rounds`) does. `ours` decodes as `quantadapt generate` and
`serve` do, `peft-nf4` by transformers' `generate`, `unsloth` by its `for_inference`.
`ours-...:growing` decodes without fixed slots, and so without CUDA graphs. `agrees` is the share of
tokens that a case would choose, too, after the same tokens as the first case. (Random weights: the
choice is often between equals.) Backends that calibrate round to nearest here, which takes seconds
and is as fast afterwards.
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

PROMPT = 128
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
    print(
        f"| case | {' | '.join(f'{name} | ratio | agrees' for name in names)} | peak GiB | load s |"
    )
    print(f"| --- | {'---: | ' * (3 * len(names))}---: | ---: |", flush=True)
    first: dict[str, Any] | None = None
    for case in given.case:
        found = run_apart(case, given, None if first is None else first["batches"])
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
        cells += [f"{here['speed']:.1f}", f"{here['speed'] / there['speed']:.2f}"]
        cells.append("" if here["agrees"] is None else f"{here['agrees']:.1%}")
    peak = "" if found["peak_gib"] is None else f"{found['peak_gib']:.2f}"
    return f"| {case} | {' | '.join(cells)} | {peak} | {found['load_seconds']:.0f} |"


def run_apart(case: str, given: argparse.Namespace, first: Any) -> dict[str, Any]:
    """Run a case in another process, beside what the first one answered; what went wrong there
    becomes `failed`."""
    command = [sys.executable, str(Path(__file__).resolve()), "--one", case]
    command += ["--shape", given.shape, "--device", given.device, "--folder", str(given.folder)]
    command += ["--batch", *map(str, given.batch), "--rounds", str(given.rounds)]
    command += ["--new", str(given.new)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=given.timeout,
            cwd=given.folder, input=json.dumps(first),
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
    load, started = _parts(name)[0], time.perf_counter()
    rounds = {"calibrates": False} if name.startswith("ours") else {}
    model = load(given.folder / f"llama-{given.shape}", shape, given.device, **rounds)
    load_seconds = time.perf_counter() - started
    answer = _answering(case, model, given.new)
    first = json.load(sys.stdin)
    generator = torch.Generator().manual_seed(1)
    found: dict[str, Any] = {"batches": {}}
    for batch in given.batch:
        prompts = torch.randint(3, shape.vocab_size, (batch, PROMPT), generator=generator)
        seconds = []
        for _ in range(1 + given.rounds):
            _synchronize(given.device)
            started = time.perf_counter()
            tokens = answer(prompts.to(given.device))
            seconds.append(time.perf_counter() - started)
        speed, agrees = batch * given.new / statistics.median(seconds[1:]), None
        if first is not None:
            told = first[str(batch)]["tokens"]
            chosen = answer(prompts.to(given.device), told)
            pairs = [
                ab for both in zip(chosen, told, strict=True) for ab in zip(*both, strict=True)
            ]
            agrees = sum(a == b for a, b in pairs) / len(pairs)
        found["batches"][str(batch)] = {"speed": speed, "tokens": tokens, "agrees": agrees}
    return found | {"peak_gib": _peak_gib(given.device), "load_seconds": load_seconds}


def _answering(case: str, model: Any, new: int) -> Callable[..., list[list[int]]]:
    """Return what answers a batch of prompts, int64 [batch, PROMPT], with `new` tokens each. With
    tokens as a second argument it goes on from these, and returns what it would have chosen."""
    if case.startswith("unsloth"):
        from unsloth import FastLanguageModel

        FastLanguageModel.for_inference(model)
    model.eval()
    return _ours(case, model, new) if case.startswith("ours") else _by_transformers(model, new)


def _by_transformers(model: Any, new: int) -> Callable[..., list[list[int]]]:
    import torch

    def answer(prompts: Any, told: list[list[int]] | None = None) -> list[list[int]]:
        chosen: list[list[int]] = [[] for _ in prompts]

        def tell(ids: Any, scores: Any) -> Any:
            for row, token in zip(chosen, scores.argmax(-1).tolist(), strict=True):
                row.append(token)
            place = ids.shape[1] - PROMPT
            tokens = torch.tensor([[row[place]] for row in told or ()], device=scores.device)
            return torch.full_like(scores, -torch.inf).scatter(1, tokens, 0.0)

        with torch.no_grad():
            found = model.generate(
                input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=False,
                max_new_tokens=new, min_new_tokens=new, pad_token_id=0, use_cache=True,
                logits_processor=[tell] if told else [],
            )  # fmt: skip
        tokens: list[list[int]] = found[:, PROMPT:].tolist()
        return chosen if told else tokens

    return answer


def _ours(case: str, model: Any, new: int) -> Callable[..., list[list[int]]]:
    from quantadapt.evaluation.predictions import evaluating
    from quantadapt.generation.rows import Row, Rows
    from quantadapt.generation.sampling import Sampling
    from quantadapt.generation.slots import rows_for

    batch = Rows(model) if case.endswith(GROWING) else rows_for(model)

    def answer(prompts: Any, told: list[list[int]] | None = None) -> list[list[int]]:
        sampling = Sampling(max_new_tokens=new)
        rows = [Row(ids, sampling.chooser(i), new) for i, ids in enumerate(prompts.tolist())]
        chosen: list[list[int]] = [[] for _ in rows]
        with evaluating(model):
            batch.add(rows)
            while True:
                for row, all_chosen, tokens in zip(rows, chosen, told or chosen, strict=True):
                    all_chosen.append(row.tokens[-1])
                    row.tokens[-1] = tokens[len(row.tokens) - 1]
                if not batch.rows:
                    return chosen
                batch.step()

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
    parser.add_argument("--rounds", type=int, default=3, help="batches that count, of each size")
    parser.add_argument("--new", type=int, default=128, help="tokens that are answered")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/quantadapt-speed"))
    parser.add_argument("--timeout", type=float, default=300, help="seconds for each case")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.folder = given.folder.resolve()
    return given


if __name__ == "__main__":
    main()
