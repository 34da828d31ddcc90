"""Where the time of a training step goes: torch.profiler's kernels, by kind and by name."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

KINDS = {
    "attention": r"flash|fmha|sdpa|attention|attn",
    "dequantize": r"dequant",
    "cross-entropy": r"cross_entropy|nll_loss|softmax|^_rows",
    "matrix products": r"gemm|cutlass|nvjet|xmma|cublas|splitk|gemv|::mm|::addmm|::bmm|matmul",
    "norm, SwiGLU, RoPE": r"rms|norm|silu|swiglu|rope|rotary",
    "optimizer": r"adam|multi_tensor",
    "copies and casts": r"memcpy|memset|copy|::to\b",
    "reductions": r"reduce",
    "elementwise": r"elementwise|vectorized|triton",
}
"""A kernel is of the first kind whose pattern is found in its name."""


class Profile:
    """Records kernels between `start` and `stop`: of the GPU, or operations where there is none."""

    def __init__(self, device: str) -> None:
        self.device = device

    def start(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        # CPU operations, too, would be recorded at the price of gaps between the kernels.
        wanted = ProfilerActivity.CUDA if self.device == "cuda" else ProfilerActivity.CPU
        self._profiler = profile(activities=[wanted])
        self._profiler.start()
        self._started = time.perf_counter()

    def stop(self, steps: int, top: int = 40) -> str:
        """Return tables in Markdown, in milliseconds per step."""
        wall = (time.perf_counter() - self._started) * 1e3
        self._profiler.stop()
        events = self._events()
        busy = _covered((e.time_range.start, e.time_range.end) for e in events) / 1e3
        names: Counter[str] = Counter()
        kinds: Counter[str] = Counter()
        calls = Counter(event.name for event in events)
        for event in events:
            names[event.name] += self._milliseconds(event)
        for name, spent in names.items():
            kinds[_kind(name)] += spent
            calls[_kind(name)] += calls[name]
        line = f"{wall / steps:.1f} ms a step; the device was busy for {busy / wall:.1%} of them"
        by_kind = _table("kind", kinds.most_common(), calls, steps)
        by_name = _table("kernel", names.most_common(top), calls, steps)
        return "\n\n".join((line, by_kind, by_name))

    def _events(self) -> list[Any]:
        from torch.autograd import DeviceType

        wanted = DeviceType.CUDA if self.device == "cuda" else DeviceType.CPU
        return [
            event
            for event in self._profiler.events()
            if event.device_type == wanted and not event.is_user_annotation
        ]

    def _milliseconds(self, event: Any) -> float:
        if self.device == "cuda":
            return float(event.time_range.elapsed_us()) / 1e3
        return float(event.self_cpu_time_total) / 1e3


def _kind(name: str) -> str:
    found = (kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE))
    return next(found, "other")


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of the spans; kernels of several streams overlap."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def _table(
    head: str, rows: Iterable[tuple[str, float]], calls: Mapping[str, int], steps: int
) -> str:
    lines = [f"| {head} | calls a step | ms a step |", "| --- | ---: | ---: |"]
    for name, spent in rows:
        short = name.replace("|", "/")[:110]
        lines.append(f"| {short} | {calls[name] / steps:.0f} | {spent / steps:.2f} |")
    return "\n".join(lines)
