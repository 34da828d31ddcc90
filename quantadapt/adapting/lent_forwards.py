"""Layers of PEFT's over facades that compute otherwise while their model trains.

They stay PEFT's own: what makes, saves and merges them is PEFT's, and so is their forward in
whatever pass does not train, or has anything else than a single adapter that is switched on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..facade import QuantLinear


class Way(NamedTuple):
    """How layers of a class compute.

    Attributes:
        held_in: the dictionary of the layer with an entry for each adapter that it has.
        forward: makes the output of the layer, the adapter's name and x [..., in_features]:
            [..., out_features].
        takes: says, of the same, whether it is to.
    """

    held_in: str
    forward: Callable[[Any, str, Tensor], Tensor]
    takes: Callable[[Any, str, Tensor], bool] = lambda *_: True


@contextmanager
def lent_forwards(model: nn.Module, ways: Mapping[type[nn.Module], Way]) -> Iterator[int]:
    """Inside, passes that train compute the layers of these classes so; yield how many."""
    layers = [m for m in model.modules() if type(m) in ways and _is_over_facade(m)]
    for layer in layers:
        layer.__dict__["forward"] = _forward_of(layer, ways[type(layer)])
    try:
        yield len(layers)
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _is_over_facade(layer: Any) -> bool:
    base = layer.base_layer
    trained = base.bias is not None and base.bias.requires_grad
    offloaded = any("_hf_hook" in part.__dict__ for part in (layer, base))
    changed = offloaded or "forward" in vars(layer)
    return type(base) is QuantLinear and not trained and not changed


def _forward_of(layer: Any, way: Way) -> Callable[..., Tensor]:
    kind = type(layer)

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = [name for name in layer.active_adapters if name in getattr(layer, way.held_in)]
        plain = not (args or kwargs or layer.disable_adapters or layer.merged)
        trains = layer.training and torch.is_grad_enabled()
        if plain and trains and len(active) == 1 and way.takes(layer, active[0], x):
            return way.forward(layer, active[0], x)
        output: Tensor = kind.forward(layer, x, *args, **kwargs)
        return output

    return forward
