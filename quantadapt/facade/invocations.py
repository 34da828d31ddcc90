"""aLoRA: adapters that are off in each row up to an invocation, a sequence of tokens in the prompt.

PEFT looks for it in the tokens that its model gets, and tells its layers by hooks that last as long
as a pass. Layers that are recomputed in backward run after that, and are told here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

OPTION = "alora_invocation_tokens"
"""PEFT's name of the option of LoRA."""
Layer = Callable[..., Any]


def has_invocations(model: Any) -> bool:
    """Say whether an adapter of `model` is off up to its invocation."""
    configs = getattr(model, "peft_config", None)
    return isinstance(configs, dict) and any(getattr(c, OPTION, None) for c in configs.values())


class Invocations:
    """Where the invocations of a pass are, in PEFT's form: for each row, how many tokens from its
    end; None outside a pass."""

    def __init__(self) -> None:
        self.places: Any = None

    def again(self, layer: Layer) -> Layer:
        """Return `layer` that finds the invocations where they are now, whenever it runs."""
        return partial(self._run, self.places, layer)

    def _run(self, places: Any, layer: Layer, *args: Any) -> Any:
        with self.at(places):
            return layer(*args)

    @contextmanager
    def at(self, places: Any) -> Iterator[None]:
        """Inside, layers find the invocations there."""
        before, self.places = self.places, places
        try:
            yield
        finally:
            self.places = before

    def tell(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Tell a layer; a hook before its forward."""
        return args, {**kwargs, "alora_offsets": self.places}


@contextmanager
def kept_invocations(model: Any) -> Iterator[Invocations]:
    """Inside, layers that run again once the pass is over know the invocations of it, if `model`
    has adapters that need them."""
    from peft.tuners.lora import LoraLayer

    found = Invocations()
    if not has_invocations(model):
        yield found
        return
    tuner = model.base_model
    own = tuner._enable_peft_forward_hooks

    @contextmanager
    def hooks(*args: Any, alora_offsets: Any = None, **kwargs: Any) -> Iterator[None]:
        with own(*args, **kwargs), found.at(alora_offsets):
            yield

    with ExitStack() as stack:
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                handle = layer.register_forward_pre_hook(found.tell, with_kwargs=True)
                stack.callback(handle.remove)
        vars(tuner)["_enable_peft_forward_hooks"] = hooks
        stack.callback(vars(tuner).pop, "_enable_peft_forward_hooks")
        yield found
