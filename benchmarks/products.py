"""What the library's own matrix products reach: how near to a step's least time anyone can come.

    python benchmarks/products.py --shape 8b

For each linear layer of the shape, with the tokens of a step: the forward product and that of the
gradient, alone and added to what is there already (as LoRA's part is), bfloat16, random numbers,
each repeated for a third of a second. A GPU that is at its limit of power is slower then than in
the first few milliseconds. `speed.py` takes 790 TFLOP/s for the floor of a step; the last line says
what these products, a step's worth of them, take instead. Then the products of LoRA r 16, which
wait for memory. `--device cpu --shape demo` tries the script itself.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from shapes import PEAK_FLOPS, SHAPES, Shape
from speed import device_name
from torch import Tensor
from versions import versions

RANK = 16
SECONDS = {"cuda": 0.35, "cpu": 0.01}


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    given = parser.parse_args()
    shape = SHAPES[given.shape]
    torch.manual_seed(0)
    layers = layers_of(shape)
    print("| layer | outputs x inputs | forward | added to | gradient | added to |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    taken = 0.0
    for name, (outputs, inputs, count) in layers.items():
        seconds = products(shape.tokens, outputs, inputs, given.device)
        flops = 2 * shape.tokens * outputs * inputs
        cells = " | ".join(f"{flops / s / 1e12:,.0f}" for s in seconds)
        print(f"| {name} | {outputs:,} x {inputs:,} | {cells} |", flush=True)
        taken += count * (seconds[0] + seconds[2])
    least = shape.floor_seconds(0)
    print(
        f"\nTFLOP/s; all of them once, without the head: {taken * 1e3:,.0f} ms. At"
        f" {PEAK_FLOPS / 1e12:,.0f} TFLOP/s a step takes {least * 1e3:,.0f} ms, with the head.\n"
    )
    print("| layer | x A | h B | dy B | dB | dA | g A | a copy of the output |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, (outputs, inputs, _) in layers.items():
        cells = " | ".join(
            f"{s * 1e6:,.0f}" for s in low_rank(shape.tokens, outputs, inputs, given.device)
        )
        print(f"| {name} | {cells} |", flush=True)
    packages = versions("torch")
    print(f"\nmicroseconds; {given.shape}, {device_name(given.device)}; {packages}")


def layers_of(shape: Shape) -> dict[str, tuple[int, int, int]]:
    """Return outputs, inputs and how many there are of each kind of linear layer."""
    hidden, mlp, count = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers
    keys = hidden * shape.num_key_value_heads // shape.num_attention_heads
    return {
        "q, o": (hidden, hidden, 2 * count),
        "k, v": (keys, hidden, 2 * count),
        "gate, up": (mlp, hidden, 2 * count),
        "down": (hidden, mlp, count),
    }


def products(tokens: int, outputs: int, inputs: int, device: str) -> list[float]:
    """Return the seconds of y = x Wᵀ, y += x Wᵀ, dx = dy W and dx += dy W."""
    x, w = numbers(tokens, inputs, device), numbers(outputs, inputs, device, 0.02)
    dy, y, dx = (numbers(tokens, n, device, 1e-3) for n in (outputs, outputs, inputs))
    runs: list[Callable[[], Tensor]] = [
        lambda: torch.mm(x, w.T, out=y),
        lambda: torch.addmm(y, x, w.T, out=y),
        lambda: torch.mm(dy, w, out=dx),
        lambda: torch.addmm(dx, dy, w, out=dx),
    ]
    return [seconds(run, device, SECONDS[device]) for run in runs]


def low_rank(tokens: int, outputs: int, inputs: int, device: str) -> list[float]:
    """Return the seconds of what LoRA adds, forward and backward, and of a copy."""
    x, dy, y = numbers(tokens, inputs, device), *(numbers(tokens, outputs, device) for _ in "ab")
    a, b = numbers(RANK, inputs, device), numbers(outputs, RANK, device)
    h = numbers(tokens, RANK, device)
    runs: list[Callable[[], Tensor]] = [
        lambda: x @ a.T,
        lambda: h @ b.T,
        lambda: dy @ b,
        lambda: dy.T @ h,
        lambda: h.T @ x,
        lambda: h @ a,
        lambda: y.copy_(dy),
    ]
    return [seconds(run, device, SECONDS[device] / 7) for run in runs]


def numbers(rows: int, columns: int, device: str, size: float = 1.0) -> Tensor:
    """Return normally distributed numbers, as large as that."""
    return size * torch.randn(rows, columns, device=device, dtype=torch.bfloat16)


def seconds(run: Callable[[], Tensor], device: str, at_least: float) -> float:
    """Return what a call takes when it is repeated for so long."""
    for _ in range(3):
        run()
    one = timed(run, device, 1)
    return timed(run, device, max(int(at_least / one), 5))


def timed(run: Callable[[], Tensor], device: str, times: int) -> float:
    """Return the mean seconds of so many calls, one after the other."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(times):
        run()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / times


if __name__ == "__main__":
    main()
