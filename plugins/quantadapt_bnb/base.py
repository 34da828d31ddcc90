"""What 4-bit and 8-bit layers of bitsandbytes have in common."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from quantadapt.protocols import LayerwiseQuantizer, Quantizer

if TYPE_CHECKING:
    import torch
    from torch import nn

_OF_EXPERT = re.compile(r"experts\.\d+\..*\.(absmax|SCB)$")
"""Tensors of checkpoints whose experts are quantized one by one."""


class BitsAndBytes(LayerwiseQuantizer):
    def stays_dense(self, model: nn.Module, skip_modules: tuple[str, ...]) -> tuple[str, ...]:
        from quantadapt.loading import not_converted

        return not_converted(model, skip_modules)

    def load(self, path: str, *, device: str, dtype: torch.dtype) -> nn.Module:
        from quantadapt.loading import Checkpoint

        if any(map(_OF_EXPERT.search, Checkpoint(path).files)):  # which transformers 5 cannot load
            return super().load(path, device=device, dtype=dtype)
        return Quantizer.load(self, path, device=device, dtype=dtype)

    def left_dense(self, names: list[str], head: str | None) -> dict[str, Any]:
        return {"llm_int8_skip_modules": names}


def holds(module: nn.Module, weight_class: str) -> bool:
    """Say whether the weight of `module` is of that class of bitsandbytes."""
    return type(getattr(module, "weight", None)).__name__ == weight_class


@contextmanager
def on_default_stream(device: torch.device) -> Iterator[None]:
    """Inside, all runs on the default stream of a GPU: there bitsandbytes starts the kernels that
    quantize to blocks, whatever the current stream is, and what is on another would not wait."""
    import torch

    if device.type != "cuda":
        yield
        return
    current, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
    default.wait_stream(current)
    with torch.cuda.stream(default):
        yield
    current.wait_stream(default)
