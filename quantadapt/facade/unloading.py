"""PEFT's `merge_and_unload` and `unload`: what is merged when the adapter goes stays merged,
and what is known of the model is that of its base."""

from __future__ import annotations

from functools import wraps
from typing import Any

from ..model.own_biases import may_train_biases
from .lazy_weight import quantized_layers


def keeping_what_is_merged(unload: Any) -> Any:
    """Return a method of PEFT's tuners that takes the adapter's layers away. Until then a merged
    layer computes with a dense weight, which is quantized now; somebody may hold PEFT's layer, so
    that it is gone cannot be seen by itself."""

    @wraps(unload)
    def unloaded(self: Any, *args: Any, **kwargs: Any) -> Any:
        changed = unload.__name__ == "merge_and_unload" or _has_changed_its_base(self)
        model = unload(self, *args, **kwargs)
        for _, layer in quantized_layers(model):
            layer.keep_merged()
        if (known := getattr(model, "quantadapt", None)) is not None:
            known.lose_adapter(changed=changed)
        return model

    return unloaded


def _has_changed_its_base(tuner: Any) -> bool:
    """Say whether what PEFT's tuner leaves is another base: where something is merged, or biases
    are trained, which are the base's own."""
    merged = any(getattr(module, "merged_adapters", None) for module in tuner.modules())
    return merged or may_train_biases(tuner)
