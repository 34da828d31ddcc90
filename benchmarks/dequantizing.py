"""How fast packed weights become dense ones on a GPU, by backend: as in training, and otherwise.

    python benchmarks/dequantizing.py [--rows 14336 --columns 4096] [--case ours-nf4 ours-int4]
    python benchmarks/dequantizing.py --rows 196608 --columns 2048 --case ours-int4

A layer, or a stack of experts, [experts * out_features, in_features], of random weights, rounded to
nearest by those that calibrate: time goes by the layout. Prints a Markdown table: bits of a weight;
microseconds as training reads it in bfloat16 (by a kernel of ours, or one that is compiled), the
same by the compiler alone where there is a kernel of ours, in eager mode; what the first would
take if packed bytes were read and dense ones written at the speed of a copy, measured here; how
long the first call took; and whether all results are the same bits.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from speed import device_name
from speed_cases import OURS
from torch import Tensor, nn
from versions import versions

from quantadapt import compiling
from quantadapt.facade import QuantLinear
from quantadapt.registry import registry
from quantadapt.testing.bench import weight_bytes

CASES = ["nf4", "hqq", "int4", "gptq", "awq", "autoround", "quanto4", "int8", "fp8", "ct", "nvfp4"]
COLUMNS = ("bits", "us", "compiled", "eager", "at a copy's speed", "first call s", "equal")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=14336)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--case", nargs="+", choices=OURS, default=[f"ours-{n}" for n in CASES])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    given = parser.parse_args()
    rate = copied(given.device, given.rows * given.columns)
    print(f"| {given.rows} x {given.columns} | {' | '.join(COLUMNS)} |")
    print(f"| --- | {'---: | ' * len(COLUMNS)}", flush=True)
    for case in given.case:
        try:
            line = row(case, given.rows, given.columns, given.device, rate)
        except Exception as error:
            line = f"failed: {str(error).splitlines()[0]}"
        print(f"| {case} | {line} |", flush=True)
    names = versions("torch", "triton", "bitsandbytes", "hqq", "torchao", "gptqmodel")
    print(f"\na copy: {rate / 1e12:.2f} TB/s; {device_name(given.device)}; {names}")


def row(case: str, rows: int, columns: int, device: str, rate: float) -> str:
    """Return the figures of a case.

    Args:
        rate: bytes a second that a copy reads and writes.
    """
    options = dict(OURS[case])
    quantizer = registry().backend(options.pop("backend")).quantizer(**options)
    like: Any = {"device": device, "dtype": torch.bfloat16}
    linear = nn.Linear(columns, rows, bias=False, **like).requires_grad_(False)
    layer = QuantLinear(
        quantizer.quantize_linear(linear).to(device), quantizer.target, like["dtype"]
    )
    none = partial(patch.object, compiling, "_by_hand", lambda *_: None)
    with none():
        expected, eager = layer.dequantize(), seconds(layer.dequantize, device, 3)
    with compiling.compiled_functions():
        started = time.perf_counter()
        equal = torch.equal(layer.dequantize(), expected)
        first, ours = time.perf_counter() - started, seconds(layer.dequantize, device)
        with none():
            equal &= torch.equal(layer.dequantize(), expected)
            compiled = seconds(layer.dequantize, device)
    packed = weight_bytes(layer)
    times = [1e6 * t for t in (ours, compiled, eager, (packed + expected.nbytes) / rate)]
    figures = [f"{8 * packed / linear.weight.numel():.2f}", *(f"{t:,.0f}" for t in times)]
    return " | ".join([*figures, f"{first:.1f}", "yes" if equal else "**no**"])


def seconds(run: Callable[[], Tensor], device: str, times: int = 20) -> float:
    """Return how long a call takes, the median of `times`, in the device's own time."""
    found = []
    for _ in range(times):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(200_000)  # so that Python is ahead
            begin.record()  # type: ignore[no-untyped-call]
            run()
            end.record()  # type: ignore[no-untyped-call]
            end.synchronize()
            found.append(begin.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            run()
            found.append(time.perf_counter() - started)
    return sorted(found)[times // 2]


def copied(device: str, numbers: int) -> float:
    """Return how many bytes a second a copy of so many numbers of 16 bits reads and writes."""
    source = torch.zeros(numbers, dtype=torch.bfloat16, device=device)
    made = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: made.copy_(source), device)


if __name__ == "__main__":
    main()
