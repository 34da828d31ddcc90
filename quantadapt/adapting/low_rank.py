"""VeRA and AdaLoRA over facades, computed as LoRA is while their model trains.

Both add B A x, of factors that are made from what is trained: VeRA scales the rows of fixed random
matrices (https://arxiv.org/abs/2310.11454), AdaLoRA those of A (https://arxiv.org/abs/2303.10512).
PEFT goes through inputs and outputs several times for that, in float32. Here the factors are made
once a pass, which is little beside a batch, and go to `fused_lora`; autograd takes their gradients
on to what they were made from. Layers stay PEFT's own, and where no model trains, or on few tokens,
they compute as PEFT has it: factors would be most of the work, and of what is kept for backward.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from peft.tuners.adalora.layer import SVDLinear
from peft.tuners.vera.layer import Linear as VeraLinear
from torch import Tensor, nn

from ..memory.passes import FACTORS_FROM
from .fused_lora import LoraTerm, fused_lora
from .lent_forwards import Way, lent_forwards


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


def _fused(factors_of: Callable[[Any, str], _Factors]) -> Callable[[Any, str, Tensor], Tensor]:
    def forward(layer: Any, adapter: str, x: Tensor) -> Tensor:
        a, b, dropout = factors_of(layer, adapter)
        dtype = layer.base_layer.compute_dtype_for(x.device.type)
        casts = a.detach().to(dtype), b.detach().to(dtype)
        term = LoraTerm(layer.base_layer, a, b, 1.0, *casts, made=True)
        dropped = x if isinstance(dropout, nn.Identity) else dropout(x)
        (output,) = fused_lora(x, None if dropped is x else dropped, [term])
        return output

    return forward


def _has_many_tokens(held_in: str) -> Callable[[Any, str, Tensor], bool]:
    def takes(layer: Any, adapter: str, x: Tensor) -> bool:
        ranks = len(getattr(layer, held_in)[adapter])
        return bool(x.numel() >= FACTORS_FROM * ranks * x.shape[-1])

    return takes


def _way(held_in: str, factors_of: Callable[[Any, str], _Factors]) -> Way:
    return Way(held_in, _fused(factors_of), _has_many_tokens(held_in))


_WAYS: dict[type[nn.Module], Way] = {
    VeraLinear: _way("vera_lambda_d", _of_vera),
    SVDLinear: _way("lora_A", _of_adalora),
}


def low_rank_layers(model: nn.Module) -> AbstractContextManager[int]:
    """Inside, passes that train compute these layers of `model` as LoRA; yield how many."""
    return lent_forwards(model, _WAYS)
