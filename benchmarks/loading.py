"""Time and GPU memory of quantizing a Llama's checkpoint while it is loaded, warm cache.

    python benchmarks/loading.py --shape 8b --case transformers-nf4 bnb-nf4 hqq

`transformers-nf4` is `AutoModelForCausalLM.from_pretrained` with bitsandbytes; any other case is a
backend of ours. Each runs in a process of its own, on random weights of the given shape. Prints a
Markdown table: the median of the loads after one that is not timed, and of the last load the
memory that the model takes, and how much more was taken while it was loaded.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from shapes import SHAPES, checkpoint
from speed import device_name
from transformers_nf4 import transformers_nf4
from versions import versions


def main() -> None:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--case", nargs="+", default=["transformers-nf4", "bnb-nf4", "hqq"])
    parser.add_argument("--loads", type=int, default=3, help="of each case, that are timed")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/quantadapt-speed"))
    given = parser.parse_args()
    path = apart(checkpoint, given.shape, given.folder.resolve())
    print(
        "| case | s | model GiB | more at the peak GiB |\n| --- | ---: | ---: | ---: |", flush=True
    )
    for case in given.case:
        seconds, model, more = apart(measure, case, path, given.device, given.loads)
        print(f"| {case} | {seconds:.2f} | {model:.2f} | {more:.2f} |", flush=True)
    packages = ("torch", "transformers", "safetensors", "bitsandbytes", "hqq")
    print(f"\n{given.shape}; {device_name(given.device)}; {versions(*packages)}")


def apart(function: Any, *arguments: Any) -> Any:
    """Call the function in a process of its own, which gives the GPU's memory back."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(case: str, path: Path, device: str, loads: int) -> tuple[float, float, float]:
    """Return the median of seconds, and GiB of the model and beyond; nan without a GPU."""
    load = partial(transformers_nf4, path, device)
    if case != "transformers-nf4":
        load = partial(ours, case, path, device)
    times, model, more = [], float("nan"), float("nan")
    for _ in range(loads + 1):
        started = time.perf_counter()
        quantized = load()
        if device == "cuda":
            model, more = memory()
        times.append(time.perf_counter() - started)
        del quantized
        gc.collect()
    return statistics.median(times[1:]), model, more


def memory() -> tuple[float, float]:
    """Return what is in use on the GPU, and how much more it was since the last call, in GiB."""
    import torch

    torch.cuda.synchronize()
    now, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return now / 2**30, (peak - now) / 2**30


def ours(backend: str, path: Path, device: str) -> Any:
    import quantadapt as qa

    return qa.quantize(str(path), backend, device=device, dtype="bfloat16")


if __name__ == "__main__":
    main()
