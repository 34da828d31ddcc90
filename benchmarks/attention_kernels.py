"""Attention of one row by cuDNN and by flash attention: time, memory of backward, and error.

    python benchmarks/attention_kernels.py

Causal, bfloat16, heads of 128 numbers, random: as the 8B shape has them (32 of queries, 8 of keys),
and as a long row goes through them where `memory: min` asks for it (4 and 1 at a time). The first
call of a length is told apart, as cuDNN plans then. The error is that of the last eight tokens
against float32. `--device cpu --kernels flash --tokens 256` tries the script itself.
"""

from __future__ import annotations

import argparse
import time

import torch
from speed import device_name
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from versions import versions

KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
HEADS = ((32, 8), (4, 1))
"""Of queries, and of keys and values."""
HEAD, CHECKED = 128, 8
AGAIN = 2
"""How often a length comes again; the quickest counts."""


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    lengths = [1024 * 2**n for n in range(8)] + [196_608]
    parser.add_argument("--tokens", type=int, nargs="+", default=lengths)
    parser.add_argument("--kernels", choices=KERNELS, nargs="+", default=list(KERNELS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    given = parser.parse_args()
    print(
        "| kernel | heads | tokens | first: forward | backward | again: forward | backward"
        " | MiB of backward | error |"
    )
    print(f"| --- | --- |{' ---: |' * 7}")
    for kernel in given.kernels:
        passed(kernel, 640, HEADS[0], given.device)  # starts the library
        for heads in HEADS:
            for tokens in given.tokens:
                found = [passed(kernel, tokens, heads, given.device) for _ in range(1 + AGAIN)]
                first, again = found[0], [min(times) for times in zip(*found[1:], strict=True)]
                cells = " | ".join(f"{1e3 * s:.2f}" for s in (*first[:2], *again[:2]))
                row = f"| {kernel} | {heads[0]}, {heads[1]} | {tokens:,} | {cells}"
                print(f"{row} | {again[2] / 2**20:,.0f} | {again[3]:.1e} |", flush=True)
    print(f"\nms; {device_name(given.device)}; {versions('torch')}")


def passed(kernel: str, tokens: int, heads: tuple[int, int], device: str) -> tuple[float, ...]:
    """Return the seconds of forward and of backward, the bytes that backward takes beside what is
    there (0 on a CPU), and the relative error."""
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, count, tokens, HEAD, dtype=torch.bfloat16, device=device).requires_grad_()
        for count in (heads[0], heads[1], heads[1])
    )
    gradient = torch.ones_like(q)
    start = now(device)
    with sdpa_kernel(KERNELS[kernel]):
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    middle = now(device)
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    if before:
        torch.cuda.reset_peak_memory_stats()
    out.backward(gradient)
    end = now(device)
    taken = torch.cuda.max_memory_allocated() - before if before else 0
    return middle - start, end - middle, taken, error(out.detach(), q, k, v)


@torch.no_grad()
def error(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Return by how much the last tokens of `out` [1, heads, tokens, head_dim] are off, of what
    softmax(q kᵀ / sqrt(head_dim)) v is in float32; of the first head of keys."""
    tokens, group = q.shape[2], q.shape[1] // k.shape[1]
    last = q[0, :group, -CHECKED:].float() @ k[0, 0].float().T / HEAD**0.5
    places = torch.arange(tokens, device=q.device)
    hidden = places[None, :] > places[-CHECKED:, None]
    expected = last.masked_fill(hidden, float("-inf")).softmax(-1) @ v[0, 0].float()
    found = out[0, :group, -CHECKED:].float()
    return ((found - expected).norm() / expected.norm()).item()


def now(device: str) -> float:
    """Return the time at which all work is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
