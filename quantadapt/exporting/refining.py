"""Train a tuned model on for a few steps through the quantizer, so that what it becomes, merged and
rounded, says what it said.

The adapter learns to make up for its own rounding: each step lowers the KL divergence of the model
that computes with rounded weights from the tuned one, on an example. Nothing new is learned, and no
labels are needed.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..adapting.merge_aware import make_merge_aware, rounded_layers
from ..evaluation.predictions import evaluating
from ..quantizing.state import state_of
from .merging import bare_base, merged_model

if TYPE_CHECKING:
    from peft import PeftModel

    from ..quantizing.examples import Examples

STEPS = 30
"""Of one example each."""
LEARNING_RATE = 1e-4
RATE = 0.01
"""At the first step a parameter learns at that, or at this share of its own size (root mean square)
where that is more, as of IA3 and VeRA; it falls to 0 in a line."""


def refined_model(model: PeftModel, examples: Examples) -> nn.Module:
    """Return the base with the adapter merged in and rounded onto its scales, after the adapter, or
    rather a copy of it, was trained for that.

    Args:
        model: a PeftModel over facades; it stays as it is.
        examples: keyword arguments of its forward, as for `quantize`.
    """
    copied = _copied(model)
    make_merge_aware(copied)
    trained = _trained(model, copied)
    if trained:
        shown = [examples[step % len(examples)] for step in range(STEPS)]
        with torch.enable_grad(), evaluating(model), evaluating(copied):  # without dropout
            _train(model, copied, trained, shown)
    return merged_model(copied, "requantize")


def _copied(model: PeftModel) -> Any:
    """Return a copy with adapters of its own and the tensors of the base."""
    base, state = bare_base(model), state_of(model)
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    return copy.deepcopy(model, {**memo, id(state): replace(state)})


def _trained(model: PeftModel, copied: Any) -> list[nn.Parameter]:
    """Return the parameters of the active adapters on quantized layers of the copy, and freeze all
    others."""
    copied.base_model.set_adapter(copied.active_adapters)
    shared = {id(parameter) for parameter in bare_base(model).parameters()}
    found = {
        id(parameter): parameter
        for layer in rounded_layers(copied)
        for parameter in layer.parameters()
        if parameter.requires_grad and id(parameter) not in shared
    }
    for parameter in copied.parameters():
        if id(parameter) not in found and id(parameter) not in shared:
            parameter.requires_grad_(False)
    return [*found.values()]


def _train(
    model: nn.Module, copied: nn.Module, trained: list[nn.Parameter], shown: Examples
) -> None:
    sizes = [float(p.detach().float().square().mean().sqrt()) for p in trained]
    rates = [max(LEARNING_RATE, RATE * size) for size in sizes]
    groups = [{"params": [p], "lr": rate} for p, rate in zip(trained, rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, len(shown))
    device = next(copied.parameters()).device
    for example in shown:
        inputs = {name: value.to(device) for name, value in example.items()}
        with torch.no_grad():
            wanted = _scores(model, inputs)
        found = _scores(copied, inputs)
        loss = (wanted.exp() * (wanted - found)).sum(-1).mean()
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        falling.step()


def _scores(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    scores: Tensor = model(**inputs).logits.float().log_softmax(-1)
    return scores
