"""Several adapters in one model: which weights are whose, and names that they can be saved under.

PEFT goes by names: of `model.layers.0.q_proj.lora_A.first.weight` it says that it is another
adapter's where there is one called `model`, `layers` or `lora_A`, and leaves it out of the file.
Here a weight is an adapter's where PEFT's layers keep it under the adapter's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import Problem
from ..paths import is_entry

_FILTER = "_filter_state_dict_for_adapter_name"


def keys_of(model: Any, adapter: str) -> set[str]:
    """Return the keys in the `state_dict` of a PeftModel of what belongs to one adapter."""
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    owners = BaseTuner, BaseTunerLayer, AuxiliaryTrainingWrapper
    found: set[str] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        for start, kept in _kept(path, module, adapter) if isinstance(module, owners) else ():
            own = f"{start}.{adapter}"
            keys = kept.state_dict(prefix=f"{start}.")
            found |= {key for key in keys if key == own or key.startswith(f"{own}.")}
    return found


def _kept(path: str, module: Any, adapter: str) -> Iterator[tuple[str, Any]]:
    """Yield path and dictionary where a module keeps something by adapter, this one too; some
    methods have dictionaries of such dictionaries."""
    from peft.tuners._buffer_dict import BufferDict
    from torch import nn

    for name, child in module._modules.items():
        if isinstance(child, (nn.ModuleDict, nn.ParameterDict, BufferDict)):
            start = f"{path}.{name}"
            yield from [(start, child)] if adapter in child else _kept(start, child, adapter)


@contextmanager
def kept_apart(model: Any) -> Iterator[None]:
    """Inside, PEFT saves of each adapter of `model` what is that adapter's, whatever the names."""
    from peft.utils import save_and_load

    def without_others(state: Mapping[str, Any], unwanted: Sequence[str]) -> dict[str, Any]:
        others = {key for name in unwanted for key in keys_of(model, name)}
        return {key: value for key, value in state.items() if key not in others}

    by_names = getattr(save_and_load, _FILTER)
    setattr(save_and_load, _FILTER, without_others)
    try:
        yield
    finally:
        setattr(save_and_load, _FILTER, by_names)


def unsavable(model: Any) -> list[Problem]:
    """Return which adapters of `model` have names that no folder can have: PEFT saves each in one
    of its name."""
    found = []
    for name in getattr(model, "peft_config", {}):
        if not is_entry(name):
            what = f"the adapter {name!r} cannot be saved: no folder can be called so"
            fix = "give it another name, without slashes, as it is added or loaded"
            found.append(Problem(what, fix, where="adapter"))
    return found
