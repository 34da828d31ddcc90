"""The base of a model without its adapter, also where that has trained biases, which are the base's
own parameters: PEFT switches its layers off and leaves those as they were trained."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

OwnBiases = list[tuple[nn.Parameter, Tensor]]
"""Parameters of a base with the values that they had before an adapter trained them."""


def trains_biases(option: Any) -> bool:
    """Say whether an adapter with this value of PEFT's option `bias` trains those of the base."""
    return option not in ("none", False, None)


def biases_of(model: nn.Module, *options: Any) -> OwnBiases:
    """Return the biases of `model` with copies of their values, where an adapter with one of these
    values of `bias` trains them; else none."""
    trained = any(map(trains_biases, options))
    return [(bias, bias.detach().clone()) for bias in _biases(model)] if trained else []


def may_train_biases(model: Any, *others: Any) -> bool:
    """Say whether `model` has biases and an adapter of PEFT's that trains some: one that it has, or
    one with another value of `bias`."""
    own = (getattr(config, "bias", None) for config in model.peft_config.values())
    return any(map(trains_biases, (*own, *others))) and any(True for _ in _biases(model))


def _biases(model: nn.Module) -> Iterator[nn.Parameter]:
    return (p for name, p in model.named_parameters() if name.rpartition(".")[2] == "bias")


def those_trained(found: OwnBiases) -> OwnBiases:
    """Return those of `found` that are trained, or have other values now."""
    return [
        (bias, value)
        for bias, value in found
        if bias.requires_grad or not bool((bias.detach() == value).all())
    ]


@contextmanager
def own_biases(model: Any) -> Iterator[None]:
    """Let the base of `model` have the biases that it had before its adapter trained them, as far
    as quantadapt put that there."""
    known: OwnBiases = getattr(getattr(model, "quantadapt", None), "own_biases", [])
    trained = [(bias, bias.data) for bias, _ in known]
    # They stay where they are from now on, as CUDA graphs that read them want it.
    known[:] = [(bias, value.to(bias.device, bias.dtype)) for bias, value in known]
    for bias, value in known:
        bias.data = value
    try:
        yield
    finally:
        for bias, value in trained:
            bias.data = value


@contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """Let the base of a PeftModel compute alone; any other model stays as it is."""
    if not hasattr(model, "disable_adapter"):
        yield
        return
    with ExitStack() as stack:
        with warnings.catch_warnings():
            if _gets_them_all_back(model):
                warnings.filterwarnings("ignore", "Careful, disabling adapter layers", UserWarning)
            stack.enter_context(model.disable_adapter())
        stack.enter_context(own_biases(model))
        yield


def _gets_them_all_back(model: Any) -> bool:
    """Say whether PEFT's warning, that a base alone keeps biases that were trained, is wrong."""
    known = getattr(getattr(model, "quantadapt", None), "own_biases", [])
    return bool(known) or not may_train_biases(model)
