"""What README.md has figures of and wants GPUs, as much side by side as there are GPUs.

    python benchmarks/published.py --out figures                    # all: some hours of a GPU
    python benchmarks/published.py --out figures --row packing adapters
    python benchmarks/published.py --out figures --list

A row is a command with a GPU, or several, for itself. What it prints is in `figures/ROW.txt` as it
comes, its errors are beside it; what ended well is not run again. Rows that run side by side share
the CPUs, so times that wait for Python are better taken one by one (`--at-once 1`).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Condition

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Row:
    """Arguments of `python`, with the folder of results as {out}; after how many minutes they have
    failed, how many GPUs they take, and the row that has to be done before."""

    arguments: str
    minutes: float
    gpus: int = 1
    after: str | None = None


MODEL = "{out}/model"
COMPARE = f"-m quantadapt compare benchmarks/all_backends.yaml --model {MODEL}"
ROWS = {
    "model": Row(f"benchmarks/real_shape.py --model {MODEL} --make 300 --backend none", 5),
    "speed-1b": Row(
        "benchmarks/speed.py --shape 1b --case"
        " unsloth peft-nf4 ours-nf4:halves ours-nf4:full ours-nf4:auto",
        10,
    ),
    "speed-8b": Row(
        "benchmarks/speed.py --shape 8b --case"
        " unsloth peft-nf4 ours-nf4:min ours-nf4:halves ours-nf4:full ours-nf4:auto",
        15,
    ),
    "speed-8b-none": Row(
        "benchmarks/speed.py --shape 8b --case unsloth-none ours-nf4:none --steps 16 --profile", 6
    ),
    "speed-8b-long": Row(
        "benchmarks/speed.py --shape 8b --batch 1 --length 65536 --steps 6 --case"
        " unsloth ours-nf4:24 ours-nf4:80",
        15,
    ),
    "attention": Row("benchmarks/attention_kernels.py", 5),
    "adapters": Row("benchmarks/adapters.py --shape 8b", 6),
    "packing": Row(
        "benchmarks/instructions.py --shape 8b --examples 480 --timeout 400 --case"
        " unsloth ours-nf4 ours-nf4:packed ours-nf4:packed+auto",
        25,
    ),
    "experts": Row(
        "benchmarks/experts.py --shape qwen3-30b --layers 12 --steps 14 --case"
        " unsloth ours-nf4 ours-fp4 ours-bnb8 ours-hqq ours-int8 ours-int4 ours-fp8 ours-intx"
        " ours-quanto4 ours-nf4:9.06",
        15,
    ),
    "answers": Row(
        "benchmarks/answering.py --shape 8b --rounds 1 --case peft-nf4 unsloth ours-nf4", 10
    ),
    "answers-others": Row(
        "benchmarks/answering.py --shape 8b-8-layers --rounds 1 --batch 1 --case"
        " ours-nf4 ours-fp4 ours-bnb8 ours-hqq ours-int8 ours-int4 ours-fp8 ours-intx"
        " ours-quanto4 ours-awq ours-gptq ours-autoround",
        20,
    ),
    "merging": Row(
        f"benchmarks/merging.py --model {MODEL} --device cuda --only hqq bnb-nf4"
        " --ways nearest dithered refined",
        30,
        after="model",
    ),
    "distillation": Row(
        f"benchmarks/distillation.py --model {MODEL} --rate 2e-4 --device cuda", 8, after="model"
    ),
    "float8": Row("benchmarks/float8.py --model {out}/model-float8 --make 120", 10),
    "streaming": Row(
        "benchmarks/streaming.py --case 8b:all 30b-all:all 70b:all --memory auto --timeout 280", 15
    ),
    "long-context": Row("benchmarks/long_context.py --shape 8b --cards 12 16 24 --stream none", 20),
    "rewards": Row("benchmarks/rewards.py --shape 8b --case trl ours-nf4", 10),
    "growth": Row("benchmarks/growth.py --out {out}/growth.json --figures {out}", 20),
    "compare": Row(
        f"{COMPARE} --adapters lora,dora,adalora --at-once 8 -o {{out}}/compared", 40, after="model"
    ),
    "compare-small": Row(
        f"{COMPARE} --adapters vera,ia3 --set train.learning_rate=1e-2 --at-once 8"
        " -o {out}/compared-small",
        30,
        after="model",
    ),
    "tests": Row("-m pytest -m cuda tests -n 4 --dist loadscope -p no:cacheprovider", 30),
    "two-gpus": Row(
        "benchmarks/several_gpus.py --case"
        " one ddp fsdp one-1b ddp-1b fsdp-1b loss-one loss-ddp loss-fsdp 70b",
        20,
        gpus=2,
    ),
    "two-gpus-tests": Row(
        "-m pytest -m cuda -p no:cacheprovider tests/test_distributed.py"
        " tests/test_context_parallel.py tests/test_objectives_in_two.py",
        15,
        gpus=2,
    ),
    "four-gpus": Row(
        "benchmarks/several_gpus.py --case"
        " ddp-4 fsdp-4 70b-4 context-64k context-128k context-256k",
        30,
        gpus=4,
    ),
}


class Gpus:
    """Those that are free; whoever wants some waits for them.

    Args:
        names: as CUDA_VISIBLE_DEVICES has them.
    """

    def __init__(self, names: list[str]) -> None:
        self.count, self.free = len(names), names
        self.changed = Condition()

    def take(self, count: int) -> list[str]:
        """Return so many, once they are free."""
        with self.changed:
            self.changed.wait_for(lambda: len(self.free) >= count)
            taken, self.free = self.free[:count], self.free[count:]
            return taken

    def give(self, taken: list[str]) -> None:
        """Take them back."""
        with self.changed:
            self.free += taken
            self.changed.notify_all()


def with_what_they_need(names: list[str]) -> list[str]:
    """Return the rows, behind those that have to be done before."""
    needed = [after for name in names if (after := ROWS[name].after)]
    return [*dict.fromkeys([*needed, *names])]


def run(name: str, gpus: Gpus, out: Path) -> str:
    """Run a row and return what to say of it."""
    row, told = ROWS[name], out / f"{name}.txt"
    if (out / f"{name}.done").exists():
        return f"{name}: done before"
    if row.gpus > gpus.count:
        return f"{name}: not run, it wants {row.gpus} GPUs"
    while row.after and not (out / f"{row.after}.done").exists():
        if (out / f"{row.after}.failed").exists():
            return f"{name}: not run, as {row.after} failed"
        time.sleep(1)
    taken = gpus.take(row.gpus)
    started = time.monotonic()
    ended = "failed"
    try:
        if passed(row, taken, out, told):
            ended = "done"
    finally:
        (out / f"{name}.{ended}").touch()
        gpus.give(taken)
    return f"{name}: {ended} after {time.monotonic() - started:.0f} s, see {told}"


def passed(row: Row, taken: list[str], out: Path, told: Path) -> bool:
    """Run the command of a row on the GPUs `taken` and say whether it ended well."""
    command = [sys.executable, *row.arguments.format(out=out).split()]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(taken)}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with told.open("w") as output, told.with_suffix(".err").open("w") as errors:
        try:
            done = subprocess.run(
                command, stdout=output, stderr=errors, env=environment, cwd=ROOT, check=False,
                timeout=60 * row.minutes,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            errors.write(f"not done after {row.minutes:g} minutes\n")
            return False
    return done.returncode == 0


def main() -> None:
    """Run the rows, and say of each how it ended."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="a folder for what they print")
    parser.add_argument("--row", nargs="+", choices=ROWS, default=[*ROWS])
    parser.add_argument("--at-once", type=int, help="rows; by default as many as GPUs allow")
    parser.add_argument("--list", action="store_true", help="show the rows, and end")
    given = parser.parse_args()
    if given.list:
        for name in given.row:
            print(f"{name}: python {ROWS[name].arguments.format(out=given.out)}")
        return
    import torch

    count = torch.cuda.device_count()
    if not count:
        raise SystemExit("there is no GPU here")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = Gpus((visible.split(",") if visible else [*map(str, range(count))])[:count])
    given.out.mkdir(parents=True, exist_ok=True)
    out = given.out.resolve()
    for failed in out.glob("*.failed"):
        failed.unlink()
    with ThreadPoolExecutor(given.at_once or gpus.count) as pool:
        for line in pool.map(lambda name: run(name, gpus, out), with_what_they_need(given.row)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
