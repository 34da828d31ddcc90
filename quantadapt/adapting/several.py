"""Several adapters in one model: which weights are whose, and names that they can be saved under.

PEFT goes by names: of `model.layers.0.q_proj.lora_A.first.weight` it says that it is another
adapter's where there is one called `model`, `layers` or `lora_A`, and leaves it out of the file.
Here a weight is an adapter's where PEFT's layers keep it under the adapter's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import Problem
from ..model.patches import patched
from ..paths import is_entry

if TYPE_CHECKING:
    from torch import Tensor

_FILTER = "_filter_state_dict_for_adapter_name"


def keys_of(model: Any, adapter: str) -> set[str]:
    """Return the keys in the `state_dict` of a PeftModel of what belongs to one adapter."""
    return set(_weights_of(model, adapter))


def _weights_of(model: Any, adapter: str) -> dict[str, Tensor]:
    """Return what belongs to one adapter by the keys in the `state_dict` of a PeftModel."""
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    owners = BaseTuner, BaseTunerLayer, AuxiliaryTrainingWrapper
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for start, kept in _kept(path, module, adapter) if isinstance(module, owners) else ():
            own = f"{start}.{adapter}"
            held = kept.state_dict(prefix=f"{start}.")
            found |= {k: t for k, t in held.items() if k == own or k.startswith(f"{own}.")}
    return found


def weights_to_save(model: Any) -> dict[str, Tensor]:
    """Return what PEFT saves of a PeftModel by the keys of its `state_dict`: all adapters, and what
    is trained beside them, copied to the CPU.

    PEFT cuts ranks, clones and sorts what it saves. On a GPU that somebody else has filled, there
    is no room for that, so it is handed copies. Frozen weights of the base, of which it may take
    embedding and head, are where they were; vendors are not asked for theirs.
    """
    copies: dict[Any, Tensor] = {}  # what is held under several names is copied once

    def on_cpu(tensor: Tensor) -> Tensor:
        key = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        if key not in copies:
            copies[key] = tensor.detach().cpu()
        return copies[key]

    found = {
        name: on_cpu(weight) if weight.requires_grad else weight.detach()
        for name, weight in model.named_parameters(remove_duplicate=False)
    }
    for adapter in model.peft_config:
        found |= {key: on_cpu(tensor) for key, tensor in _weights_of(model, adapter).items()}
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
        with tokens_by_owner(model):
            yield
    finally:
        setattr(save_and_load, _FILTER, by_names)


@contextmanager
def tokens_by_owner(model: Any) -> Iterator[None]:
    """Inside, PEFT looks for trained tokens of an adapter where that has some: it wants them of all
    adapters of a model in which one has."""
    from peft.utils.other import TrainableTokensWrapper

    def asked(wrapper: Any, method: str) -> Any:
        by_peft = getattr(wrapper, method)

        def of(adapter: str, *args: Any) -> Any:
            has = adapter in wrapper.token_adapter.trainable_tokens_delta
            return by_peft(adapter, *args) if has else {}

        return of

    wrappers = [each for each in model.modules() if isinstance(each, TrainableTokensWrapper)]
    methods = ("adapter_state_dict_load_map", "adapter_state_dict")
    with ExitStack() as stack:
        for each in wrappers:
            stack.enter_context(patched(each, **{name: asked(each, name) for name in methods}))
        yield


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
