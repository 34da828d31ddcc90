"""Who computes attention: configs of a model name a function of transformers, or one of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

STOCK = "sdpa"
"""What transformers calls torch's `scaled_dot_product_attention`, and takes by itself."""


def configs_of(
    model: nn.Module, name: str, wanted: Callable[[nn.Module], bool] = lambda _: True
) -> list[Any]:
    """Return the configs of what computes attention as `name` says, and lets itself be told
    otherwise."""
    from transformers import PreTrainedModel

    found: dict[int, Any] = {}
    for part in model.modules():
        if not isinstance(part, PreTrainedModel) or not part._supports_attention_backend:
            continue
        named = getattr(part.config, "_attn_implementation_internal", None) == name
        if named and wanted(part):
            found[id(part.config)] = part.config
    return list(found.values())


@contextmanager
def computed_by(name: str, configs: Sequence[Any]) -> Iterator[None]:
    """Let another function, registered as `name`, compute attention inside."""
    before = [config._attn_implementation_internal for config in configs]
    for config in configs:
        config._attn_implementation_internal = name
    try:
        yield
    finally:
        for config, was in zip(configs, before, strict=True):
            config._attn_implementation_internal = was
