"""What rounding a layer's weight costs on a GPU in a pass of merge-aware training, by backend.

    python benchmarks/rounding_speed.py [--shape 8b] [--only bnb-nf4 hqq]

Each of the matrices of one block of the shape, with random weights, is made the dense weight that
its forward multiplies with: as plain training does, and with what LoRA (r = 16) adds rounded onto
the grid, as `train.merge_aware` does. Both are compiled as in training. Prints a Markdown table:
milliseconds of the whole model's matrices, once through; how many bytes a weight that would be at
the memory's speed (a copy's, measured here); and how long compiling took. A training step with all
layers computed again in backward makes each weight two or three times.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from shapes import SHAPES, Shape
from torch import Tensor, nn
from versions import versions

from quantadapt.compiling import compiled_functions
from quantadapt.facade import QuantLinear, lora_change
from quantadapt.registry import registry

BACKENDS: dict[str, dict[str, Any]] = {
    "bnb-nf4": {},
    "hqq": {},
    "bnb-int8": {},
    "torchao-int4": {},
    "torchao-int8": {},
    "torchao-fp8": {},
    "quanto": {"weights": "int4"},
    "eetq": {},
    "mxfp4": {},
    "nvfp4": {},
    "finegrained-fp8": {},
}
RANK = 16


def matrices(shape: Shape) -> list[tuple[int, int, int]]:
    """Return the matrices of a block as (out_features, in_features, how many)."""
    wide, shared = shape.hidden_size, shape.num_key_value_heads
    shared = wide * shared // shape.num_attention_heads
    inner = shape.intermediate_size
    return [(wide, wide, 2), (shared, wide, 2), (inner, wide, 2), (wide, inner, 1)]


def layer(backend: str, rows: int, columns: int, device: str) -> QuantLinear:
    """Return a facade over random weights."""
    quantizer = registry().backend(backend).quantizer(**BACKENDS[backend])
    like: Any = {"device": device, "dtype": torch.bfloat16}
    linear = nn.Linear(columns, rows, bias=False, **like).requires_grad_(False)
    made = QuantLinear(quantizer.quantize_linear(linear), quantizer.target, torch.bfloat16)
    return made.train()


def milliseconds(function: Callable[[], Tensor], device: str) -> tuple[float, float]:
    """Return how long a call takes, and the first one."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    function()
    wait()
    first = time.perf_counter() - began
    times = 10 if device == "cuda" else 1
    began = time.perf_counter()
    for _ in range(times):
        function()
    wait()
    return (time.perf_counter() - began) / times * 1e3, first


def row(backend: str, shape: Shape, device: str, speed: float) -> str:
    """Return the line of a backend; `speed` is that of the memory, in bytes a millisecond."""
    plain = product = rounded = compiling = 0.0
    for rows, columns, count in matrices(shape):
        made = layer(backend, rows, columns, device)
        a, b = torch.randn(RANK, columns, device=device), torch.randn(rows, RANK, device=device)
        change = lora_change(a, b * 1e-4, 1.0)

        def dense(made: QuantLinear = made) -> Tensor:
            return made.dequantize()

        def multiplied(a: Tensor = a, b: Tensor = b) -> Tensor:
            return lora_change(a, b, 1.0)

        def moved(made: QuantLinear = made, change: Tensor = change) -> Tensor:
            return made.moved(change).to(torch.bfloat16)

        with torch.no_grad(), compiled_functions():
            times = [milliseconds(each, device) for each in (dense, multiplied, moved)]
        each = count * shape.num_hidden_layers
        plain, product, rounded = (
            total + each * time
            for total, (time, _) in zip((plain, product, rounded), times, strict=True)
        )
        compiling += times[0][1] + times[2][1]
    traffic = (product + rounded) * speed / shape.linear_weights
    cells = (plain, product, rounded, traffic, compiling)
    return f"| {backend} | {' | '.join(f'{cell:.1f}' for cell in cells)} |"


def memory_speed(device: str) -> float:
    """Return how many bytes a copy reads and writes in a millisecond."""
    one = torch.zeros(2**28 if device == "cuda" else 2**22, device=device)
    other = torch.empty_like(one)
    return 2 * one.nbytes / milliseconds(lambda: other.copy_(one), device)[0]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--only", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    given = parser.parse_args()
    speed = memory_speed(given.device)
    print("| backend | dense ms | product ms | rounded ms | bytes a weight | compiling s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for backend in given.only:
        print(row(backend, SHAPES[given.shape], given.device, speed), flush=True)
    where = torch.cuda.get_device_name() if given.device == "cuda" else "CPU"
    found = versions("torch", "triton", "bitsandbytes", "hqq", "torchao", "optimum-quanto", "eetq")
    print(f"\n{given.shape}; {where}, a copy moves {speed / 1e6:.0f} GB/s; {found}")


if __name__ == "__main__":
    main()
