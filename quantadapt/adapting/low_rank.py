"""VeRA and AdaLoRA over facades, computed as LoRA is while their model trains.

Both add B A x, of factors that are made from what is trained: VeRA scales the rows of fixed random
matrices (https://arxiv.org/abs/2310.11454), AdaLoRA those of A (https://arxiv.org/abs/2303.10512).
PEFT goes through inputs and outputs several times for that, in float32. Here the factors are made
once a pass, which is little beside a batch, and go to `fused_lora`; autograd takes their gradients
on to what they were made from. Layers stay PEFT's own, and where no model trains, or on few tokens,
they compute as PEFT has it: factors would be most of the work, and of what is kept for backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft.tuners.adalora.layer import SVDLinear
from peft.tuners.vera.layer import Linear as VeraLinear
from torch import Tensor, nn

from ..facade import QuantLinear
from ..memory.workload import FACTORS_FROM
from .fused_lora import LoraTerm, fused_lora


class _Factors(NamedTuple):
    """A [r, in_features], B [out_features, r], in float32 or as trained, and the dropout of x."""

    a: Tensor
    b: Tensor
    dropout: nn.Module


def _of_vera(layer: Any, adapter: str) -> _Factors:
    d, b = layer.vera_lambda_d[adapter], layer.vera_lambda_b[adapter]
    fixed_a = layer.vera_A[adapter][: len(d), : layer.in_features].to(d.device)
    fixed_b = layer.vera_B[adapter][: layer.out_features, : len(d)].to(d.device)
    dropout = layer.vera_dropout[adapter]
    return _Factors(d.unsqueeze(1) * fixed_a, b.unsqueeze(1) * fixed_b, dropout)


def _of_adalora(layer: Any, adapter: str) -> _Factors:
    # As PEFT has it; in A, since reading the number of ranks would wait for the GPU.
    scale = layer.scaling[adapter] / (layer.ranknum[adapter] + 1e-5)
    a = layer.lora_A[adapter] * (layer.lora_E[adapter] * scale)
    return _Factors(a, layer.lora_B[adapter], layer.lora_dropout[adapter])


_KINDS: dict[type[nn.Module], tuple[str, Callable[[Any, str], _Factors]]] = {
    VeraLinear: ("vera_lambda_d", _of_vera),
    SVDLinear: ("lora_A", _of_adalora),
}
"""PEFT's layer -> what it has an entry in for each adapter, and what its factors are."""


@contextmanager
def low_rank_layers(model: nn.Module) -> Iterator[int]:
    """Inside, passes that train compute these layers of `model` as LoRA; yield how many."""
    layers = [m for m in model.modules() if type(m) in _KINDS and _is_over_facade(m)]
    for layer in layers:
        layer.__dict__["forward"] = _forward_of(layer)
    try:
        yield len(layers)
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _is_over_facade(layer: Any) -> bool:
    base = layer.base_layer
    trained = base.bias is not None and base.bias.requires_grad
    offloaded = any("_hf_hook" in part.__dict__ for part in (layer, base))
    changed = offloaded or "forward" in vars(layer)
    return type(base) is QuantLinear and not trained and not changed


def _forward_of(layer: Any) -> Callable[..., Tensor]:
    """Return the layer's forward: [..., in_features] -> [..., out_features]."""
    kind = type(layer)
    held_in, factors_of = _KINDS[kind]

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = [name for name in layer.active_adapters if name in getattr(layer, held_in)]
        plain = not (args or kwargs or layer.disable_adapters or layer.merged)
        trains = layer.training and torch.is_grad_enabled()
        ranks = sum(len(getattr(layer, held_in)[name]) for name in active)
        many = x.numel() >= FACTORS_FROM * ranks * x.shape[-1]
        if not (plain and trains and many and len(active) == 1):
            output: Tensor = kind.forward(layer, x, *args, **kwargs)
            return output
        a, b, dropout = factors_of(layer, active[0])
        dtype = layer.base_layer.compute_dtype_for(x.device.type)
        term = LoraTerm(layer.base_layer, a, b, 1.0, a.detach().to(dtype), b.detach().to(dtype))
        dropped = x if isinstance(dropout, nn.Identity) else dropout(x)
        (output,) = fused_lora(x, None if dropped is x else dropped, [term])
        return output

    return forward
