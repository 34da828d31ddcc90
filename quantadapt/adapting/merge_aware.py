"""Adapters that train through the quantizer: adapted layers compute with the weight that a merge
will keep, so that what was trained is what is served.

That weight is the base's own, changed by what the adapter adds and dithered onto the scales that
the base has (`Grid.dithered`): a function of base and adapter alone. The gradient goes straight
through the rounding: to the adapter as if the weight were W + dW, to the input through the rounded
weight. A single plain LoRA takes the fused path (`fused_lora`, of experts `facade.fused_experts`);
every other adapter that PEFT can merge gets what rounding changes added to its own output, of
experts to the weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import is_not
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..errors import PlanRefused, Problem, warn
from ..facade import QuantExperts, QuantLinear, QuantWeight, facades
from ..model.linears import linear_of
from .fused_lora import no_autocast

if TYPE_CHECKING:
    from ..quantizing.state import ModelState

WHERE = "train.merge_aware"


class StaysMergeAwareWarning(UserWarning):
    """A model that was trained through the quantizer is trained on without saying so."""


def tell_it_stays(model: nn.Module) -> None:
    """Warn where `model` was trained through the quantizer before, and is to be trained again
    without being asked to be."""
    if getattr(getattr(model, "quantadapt", None), "merge_aware", False):
        text = (
            "the adapter was trained with merge_aware=True and stays so: it is trained, evaluated "
            "and merged with rounded weights. Pass merge_aware=True again, or train an adapter of "
            "its own on a base that is quantized anew"
        )
        warn(text, StaysMergeAwareWarning, stacklevel=5)


def make_merge_aware(model: nn.Module) -> None:
    """Have the adapted quantized layers of `model`, a PeftModel, compute, from now on and in
    evaluation too, with the weights that merging keeps; merging then keeps their scales. So do
    layers that are adapted later, from the next forward or merge on.

    Raises:
        PlanRefused: a layer has no grid that is known.
    """
    _mark(model)
    for _, facade in facades(model):  # PEFT may merge before the next forward
        facade.keeps_scales = facade.has_grid
    tuner: Any = model.base_model
    for module in (tuner, tuner.model):  # each can be called by itself
        if not any(isinstance(hook, _Follow) for hook in module._forward_pre_hooks.values()):
            module.register_forward_pre_hook(_Follow())
    if (state := getattr(model, "quantadapt", None)) is not None:
        state.merge_aware = True


def rounded_layers(model: nn.Module) -> list[Any]:
    """Return PEFT's layers in `model` that compute with rounded weights."""
    return [layer for _, layer in _adapted(model) if getattr(layer, "merge_aware", False)]


def rounded_weights(model: nn.Module) -> list[QuantWeight]:
    """Return the quantized weights in `model` that are rounded with what an adapter adds."""
    found = map(_quantized, rounded_layers(model))
    return [weight for weight in found if weight is not None]


def forget_merge_aware(base: nn.Module, state: ModelState) -> None:
    """Have `base`, whose adapter was taken away, begin anew: what an earlier adapter was trained
    with is not what the next one is."""
    if state.merge_aware:
        state.merge_aware = False
        for _, facade in facades(base):
            facade.keeps_scales = False
        for key, hook in [*base._forward_pre_hooks.items()]:
            if isinstance(hook, _Follow):
                del base._forward_pre_hooks[key]


class _Follow:
    """A forward pre-hook of a model with adapters: PEFT's `add_adapter` and `load_adapter` put
    layers into it and tell nobody. It looks for them when the model's adapters are others."""

    def __init__(self) -> None:
        self.known: list[Any] = []

    def __call__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        configs = [*getattr(model, "peft_config", {}).values()]
        if len(configs) != len(self.known) or any(map(is_not, configs, self.known)):
            _mark(model)
            self.known = configs


def _mark(model: nn.Module) -> None:
    layers = list(_adapted(model))
    if problems := _problems(layers):
        raise PlanRefused(problems)
    for _, layer in layers:
        weight = _quantized(layer)
        if weight is None or getattr(layer, "merge_aware", False):
            continue
        weight.keeps_scales = True
        # Some ask in their own forward, and experts where they are lent their adapter.
        if isinstance(weight, QuantLinear) and not hasattr(layer, "merge_aware"):
            layer.register_forward_hook(_rounded)
        layer.merge_aware = True


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def _quantized(layer: Any) -> QuantWeight | None:
    """Return the quantized weight that a layer of PEFT's adapts, of experts the stack."""
    base = layer.get_base_layer()
    if isinstance(base, QuantExperts):
        return base.quantized_stacks.get(getattr(layer, "parameter_name", ""))
    return base if isinstance(base, QuantLinear) else None


def _problems(layers: list[tuple[str, Any]]) -> list[Problem]:
    for name, layer in layers:
        weight = _quantized(layer)
        if weight is not None and not weight.has_grid:
            what = f"it is not known what values the scales of {name} allow"
            return [Problem(what, "leave train.merge_aware out", WHERE, "merge-aware-grid")]
    return []


def _rounded(layer: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """The forward hook of a layer of PEFT's that has no fused path."""
    found: Tensor = rounded_output(layer, args[0], output)
    return found


@torch.compiler.disable  # type: ignore[untyped-decorator]
def rounded_output(layer: Any, x: Tensor, output: Tensor) -> Tensor:
    """Return what the layer gives with rounded merged weights.

    Args:
        layer: PEFT's, around a facade.
        x: its input, [..., in_features].
        output: what PEFT's own forward gives, [..., out_features].
    """
    if layer.disable_adapters or layer.merged:
        return output
    facade: QuantLinear = layer.base_layer
    with torch.no_grad(), no_autocast(x.device.type):
        weight, merged, bias = _merged(layer)
        change = merged - weight
        rounded = facade.moved(change).float() if output.requires_grad else None
    if rounded is None:
        return _exact(facade, x, change, bias)
    lost = (rounded - merged).to(facade.compute_dtype_for(x.device.type))
    output = output + nn.functional.linear(x.to(lost.dtype), lost).to(output.dtype)
    # PEFT's own forward has activations rounded for the base alone.
    if not facade.rounds_activations or _drops_out(layer):
        return output
    return output + (_exact(facade, x, change, bias) - output).detach()


@torch.no_grad()
def _exact(facade: QuantLinear, x: Tensor, change: Tensor, bias: Tensor | None) -> Tensor:
    """Return what the merged model computes, with activations rounded where it rounds them."""
    y = facade.vendor_forward(x, change)
    return y if bias is None else y + (bias - facade.bias).to(y.dtype)


def _drops_out(layer: nn.Module) -> bool:
    """Say whether dropout is at work, so that the layer gives more than its merged weight does."""
    return any(isinstance(m, nn.Dropout) and m.p > 0 and m.training for m in layer.modules())


def _merged(layer: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the base's weight and what PEFT merges it to, in float32, and the merged bias."""
    facade: QuantLinear = layer.base_layer
    with facade.computing_in(torch.float32):  # what merging begins with
        weight = facade.dequantize()
    bias = None if facade.bias is None else facade.bias.detach().float().clone()
    dense = linear_of(weight.clone(), bias)
    with standing_in(layer, dense):
        layer.merge(safe_merge=False)
    return weight, dense.weight.data, None if bias is None else dense.bias.data


@contextmanager
def standing_in(layer: Any, replacement: nn.Module) -> Iterator[None]:
    """Let `layer` work on `replacement` for a moment, then forget that it merged."""
    before = layer.base_layer
    layer.base_layer = replacement
    try:
        yield
    finally:
        layer.base_layer = before
        layer.merged_adapters.clear()
