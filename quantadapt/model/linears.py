"""Which modules are linear layers: `nn.Linear`, subclasses that compute the same, and transformers'
`Conv1D`, which keeps its weight as [in_features, out_features].

Backends meet `nn.Linear` alone: they get `as_linear` of a layer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear


def is_conv1d(module: nn.Module) -> bool:
    """Say whether `module` is transformers' `Conv1D`, as in GPT-2: a linear layer, transposed."""
    kind = type(module)
    return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")


def is_linear(module: nn.Module) -> bool:
    """Say whether `module` is a dense linear layer that computes x Wᵀ + b and nothing else."""
    if type(module) is nn.Linear:
        return True
    plain = type(module._parameters.get("weight")) is nn.Parameter
    if not plain or "forward" in vars(module) or next(module.children(), None) is not None:
        return False
    return is_conv1d(module) or (isinstance(module, nn.Linear) and _computes_linear(module))


def _computes_linear(module: nn.Linear) -> bool:
    """Look at what a subclass of `nn.Linear` is: its parameters, and what its forward returns."""
    kind: Any = type(module)
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return False  # attention reads its weight and never calls it
    if set(module._parameters) != {"weight", "bias"} or module._buffers:
        return False
    return kind.forward is nn.Linear.forward or _tried(kind, module.bias is not None)


@cache
def _tried(kind: Any, bias: bool) -> bool:
    """Say whether the forward of a class returns, for small numbers, what `nn.Linear`'s does."""
    numbers = torch.Generator().manual_seed(0)
    with torch.device("cpu"), torch.no_grad():
        linear = nn.Linear(4, 3, bias, device="meta").to_empty(device="cpu")
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=numbers))
        other = kind.__new__(kind)
        vars(other).update(vars(linear))
        x = torch.randn(2, 5, 4, generator=numbers)
        try:
            found = other(x)
            return isinstance(found, torch.Tensor) and torch.allclose(found, linear(x), atol=1e-5)
        except Exception:  # it wants what only its own __init__ sets, or another input
            return False


def as_linear(module: nn.Module) -> nn.Linear:
    """Return a linear layer as `nn.Linear`: itself, or one over the same tensors."""
    if type(module) is nn.Linear:
        return module
    layer: Any = module
    weight = layer.weight.data.t() if is_conv1d(module) else layer.weight
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    if not isinstance(weight, nn.Parameter):
        weight = nn.Parameter(weight.contiguous(), requires_grad=layer.weight.requires_grad)
    linear.weight, linear.bias = weight, layer.bias
    return linear.train(module.training)


def linear_of(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """Return a linear layer that holds these tensors, [out_features, in_features] and a bias; they
    are frozen, but for a bias that is a parameter already."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        if not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        linear.bias = bias
    return linear


def as_conv1d(linear: nn.Linear) -> nn.Module:
    """Return a linear layer as transformers' `Conv1D`, its weight transposed."""
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        made: Any = Conv1D(linear.out_features, linear.in_features)
    weight, bias = linear.weight.detach().t().contiguous(), linear.bias
    if bias is None:
        bias = weight.new_zeros(linear.out_features)
    made.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    made.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
    module: nn.Module = made.train(linear.training)
    return module


def other_linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of the linear layers that are no `nn.Linear` itself."""
    for name, module in model.named_modules():
        if type(module) is not nn.Linear and is_linear(module):
            yield name, module


def conv1d_layers(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the layers that are `Conv1D` in the model's own class, whatever stands
    there now; of a model that is none of transformers', those that are `Conv1D` now."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(type(model), "_from_config"):
        if not hasattr(sys.modules.get(type(model).__module__), "Conv1D"):
            return ()  # no need to make another
        with torch.device("meta"):
            model = type(model)(config)  # type: ignore[call-arg]
    return tuple(name for name, module in model.named_modules() if is_conv1d(module))
