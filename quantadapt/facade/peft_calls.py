"""Which of PEFT's functions is at work on a layer.

PEFT tells its base layers nothing: whether a weight is changed for good or merged for a while, and
whether a module is copied to be kept or to be trained, only the call stack knows. It is asked where
weights are written and modules copied, never in a forward. Wrapping PEFT's methods instead would
mean each class with a `merge` of its own, those of later releases and other packages included, and
what all of them call (`get_base_layer`) they call for other reasons, too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

_COPY_TO_TRAIN = (
    ("peft.utils", "ModulesToSaveWrapper", "update"),
    ("peft.tuners.ln_tuning.layer", "LNTuningLayer", "update_layer"),
    ("peft.tuners.shadow.model", "ShadowModel", "_build_shadow_head"),
)
"""Module, class and method of what copies a layer of the base and trains the copy."""


def merging_layer(weight: nn.Module) -> Any:
    """Return PEFT's layer around a quantized layer, or around experts with the quantized stack
    `weight`, whose `merge` or `unmerge` runs just now, or None."""
    for name, caller in _callers("peft.tuners.tuners_utils", "BaseTunerLayer"):
        if name in ("merge", "unmerge") and _adapts(caller, weight):
            return caller
    return None


def _adapts(layer: Any, weight: nn.Module) -> bool:
    base = layer.get_base_layer()
    stacks = getattr(base, "quantized_stacks", None)
    return weight is (base if stacks is None else stacks.get(layer.parameter_name))


def copies_to_train() -> bool:
    """Say whether PEFT is copying a module in order to train the copy."""
    return any(
        name == method
        for module, kind, method in _COPY_TO_TRAIN
        for name, _ in _callers(module, kind)
    )


def makes_room(base: nn.Module) -> bool:
    """Say whether a PEFT layer around `base` is putting an empty weight, of the shape of a file's,
    there before it loads the file (AdaMSS): packed weights have shapes of their own."""
    layers = _callers("peft.tuners.tuners_utils", "BaseTunerLayer")
    return any(
        name == "_load_from_state_dict" and layer.get_base_layer() is base for name, layer in layers
    )


def looks_for_parameters() -> bool:
    """Say whether PEFT is looking for the parameters that `target_parameters` names."""
    tuners = _callers("peft.tuners.tuners_utils", "BaseTuner")
    return any(name == "_inject_parameters" for name, _ in tuners)


def replaces_module() -> bool:
    """Say whether PEFT is putting its layer in front of a module, which it asks where it is."""
    tuners = _callers("peft.tuners.tuners_utils", "BaseTuner")
    return any(name == "_replace_module" for name, _ in tuners)


def _callers(module: str, kind: str) -> Iterator[tuple[str, Any]]:
    """Yield (name, self) of every method of a `kind` that runs, the innermost first."""
    wanted = getattr(sys.modules.get(module), kind, None)
    frame = sys._getframe(1) if wanted is not None else None
    while frame is not None:
        caller = frame.f_locals.get("self")
        if wanted is not None and isinstance(caller, wanted):
            yield frame.f_code.co_name, caller
        frame = frame.f_back
