"""Parameters counted as those of dense layers. Libraries count the tensors that they find: packed
ones, where a number may hold several weights, and no buffers, where many vendors keep theirs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import wraps
from typing import Any

from torch import Tensor, nn

from .lazy_weight import quantized_layers


def counting_dense(count: Any) -> Any:
    """Return a method that counts the weights that a quantized layer stands for."""

    @wraps(count)
    def counted(model: Any, *args: Any, **kwargs: Any) -> Any:
        quantized = any(True for _ in quantized_layers(model))
        return count(_AsDense(model) if quantized else model, *args, **kwargs)

    return counted


class _AsDense:
    """A model as functions see it that count its parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the model's parameters, with one weight for what a quantized layer has packed."""
        packed: set[int] = set()
        for name, layer in quantized_layers(self.model):
            yield f"{name}.weight", layer.weight
            frozen = (p for p in layer.parameters() if p is not layer.bias and not p.requires_grad)
            packed.update(map(id, frozen))
        for name, parameter in self.model.named_parameters():
            if id(parameter) not in packed:
                yield name, parameter
