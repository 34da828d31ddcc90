"""What answers are compared with, by objectives for which it costs something to leave it, and by
what is measured of them: the model as that training began.

Where an adapter starts from nothing it is the model without it. One that had learnt before, or
whose start moves a part of the base into it, as PiSSA's does, is another model without it: then its
weights as they were are kept in CPU memory, and take the place of those that there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import warn
from ..records import Adapter, Start

if TYPE_CHECKING:
    from torch import Tensor, nn

FILE = "reference.safetensors"
"""In a checkpoint: those weights, by name."""
_AT_RANDOM = ("init_lora_weights", "init_weights", "init_ia3_weights")
"""Options of PEFT's methods: where one is False, an adapter starts from random numbers."""


def has_reference(model: Any) -> bool:
    """Say whether the model that answers are compared with is known."""
    state: Any = getattr(model, "quantadapt", None)
    if getattr(state, "adapter", None) is None or not hasattr(model, "disable_adapter"):
        return False
    return state.begun is not None or (not state.begun_elsewhere and starts_as_its_base(model))


def is_compared(model: Any, evaluation: str) -> bool:
    """Say the same for an evaluation, which tells what it leaves out of a model with an adapter."""
    if known := has_reference(model):
        return known
    if getattr(getattr(model, "quantadapt", None), "adapter", None) is not None:
        text = f"{evaluation} has no reward-* figures: the model that this training began with is"
        warn(
            f"{text} not known here, as where its adapter had learnt before",
            UserWarning,
            stacklevel=2,
        )
    return False


def starts_as_its_base(model: Any) -> bool:
    """Say whether the adapter of `model`, which has one, adds nothing where it starts, and takes
    nothing from the base."""
    from ..model.own_biases import may_train_biases

    state = model.quantadapt
    if not state.own_biases and may_train_biases(model):  # PEFT put it there: nothing noted them
        return False
    return adds_nothing(state.adapter, state.adapter_options)


def adds_nothing(adapter: Adapter, options: Mapping[str, Any]) -> bool:
    """Say whether an adapter that has just been attached is the base, by its method and options."""
    if adapter.start == Start.CHANGED or any(options.get(name) is False for name in _AT_RANDOM):
        return False
    return options.get("init_lora_weights", True) in (True, "gaussian", "eva")


def refer_to_now(model: Any) -> int:
    """Let the model as it is now be the one that is compared with. Return the bytes that are kept
    for it; 0 where that is the model without its adapter."""
    state = model.quantadapt
    state.begun, state.begun_elsewhere = None, False
    if not state.learnt and starts_as_its_base(model):
        return 0
    # Copies, also of what is in CPU memory already.
    state.begun = [(p, p.detach().to("cpu", copy=True)) for p in _trained(model).values()]
    return sum(value.nbytes for _, value in state.begun)


def save_reference(model: Any, folder: Path) -> None:
    """Write into a checkpoint what is kept."""
    from safetensors.torch import save_file

    if begun := getattr(getattr(model, "quantadapt", None), "begun", None):
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        kept = {names[id(parameter)]: value.contiguous() for parameter, value in begun}
        save_file(kept, folder / FILE)


def load_reference(model: Any, folder: Path) -> None:
    """Take from a checkpoint what was kept there; nothing is where it is the model without its
    adapter."""
    from safetensors.torch import load_file

    state = model.quantadapt
    state.begun, state.begun_elsewhere = None, False
    if (folder / FILE).is_file():
        stored = load_file(folder / FILE)
        state.begun = [(p, stored[name]) for name, p in _trained(model).items()]


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@contextmanager
def reference(model: Any) -> Iterator[None]:
    """Inside, `model` is the one that is compared with, see `has_reference`. Casts of its weights
    that layers were lent are not those: `adapting.fused.without_casts`."""
    from ..model.own_biases import without_adapter

    begun: list[tuple[nn.Parameter, Tensor]] | None
    begun = getattr(getattr(model, "quantadapt", None), "begun", None)
    if begun is None:
        with without_adapter(model):
            yield
        return
    now = [(parameter, parameter.detach().clone()) for parameter, _ in begun]
    try:
        _put(begun)
        yield
    finally:
        _put(now)


def _put(values: list[tuple[nn.Parameter, Tensor]]) -> None:
    """In place, as CUDA graphs read weights where they were."""
    import torch

    with torch.no_grad():
        for parameter, value in values:
            parameter.copy_(value)
