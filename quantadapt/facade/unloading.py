"""PEFT's `merge_and_unload` and `unload`: what is merged when the adapter goes stays merged."""

from __future__ import annotations

from functools import wraps
from typing import Any

from .lazy_weight import quantized_layers


def keeping_what_is_merged(unload: Any) -> Any:
    """Return a method of PEFT's tuners that takes the adapter's layers away. Until then a merged
    layer computes with a dense weight, which is quantized now; somebody may hold PEFT's layer, so
    that it is gone cannot be seen by itself."""

    @wraps(unload)
    def unloaded(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = unload(self, *args, **kwargs)
        for _, layer in quantized_layers(model):
            layer.keep_merged()
        return model

    return unloaded
