"""Recompute only as many layers as memory demands, and keep their inputs in CPU memory if need be.

The first n decoder layers are recomputed (their activations are made again in backward), the rest
keep theirs: those of the last layers are the first to be freed. Checkpointing is
`torch.utils.checkpoint`, non-reentrant unless asked otherwise (https://arxiv.org/abs/1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..facade import read_in_parts, recomputed_later, recomputing
from ..facade.invocations import Invocations
from ..memory.setting import Setting
from ..model.attention import STOCK, configs_of
from ..model.modules import is_skipped
from ..model.towers import other_towers
from ..streaming import streamer_of
from .cpu_inputs import CpuInputs
from .kept_attention import InPlace, KeptAttention
from .remade_inputs import RemadeInputs
from .tiling import Tiles

# what transformers' GradientCheckpointingLayer reads
FLAG, FUNCTION = "gradient_checkpointing", "_gradient_checkpointing_func"


class Recomputer:
    """Sets how many layers of a model recompute, again and again if need be.

    Args:
        model: a PeftModel or transformers model.
        reentrant: which kind of `torch.utils.checkpoint`.
        draws: whether a pass draws random numbers, which a recomputation has to draw again.
        invocations: where adapters begin in each row, which a recomputation has to know again.
    """

    def __init__(
        self,
        model: nn.Module,
        reentrant: bool = False,
        draws: bool = True,
        invocations: Invocations | None = None,
    ) -> None:
        self.base: Any = getattr(model, "get_base_model", lambda: model)()  # type: ignore[operator]
        self.layers = decoder_layers(self.base)
        self.reentrant, self.draws = reentrant, draws
        self.invocations = invocations or Invocations()
        self.hidden = _hidden_size(self.base)
        self.inputs, self.tiles = CpuInputs(), Tiles(self.layers, self.hidden)
        self.remade = RemadeInputs(self.inputs, draws)
        self.attention = KeptAttention()
        self.keeps_attention = not reentrant and bool(configs_of(self.base, STOCK))
        """Whether what attention returns can be kept: torch's own kernels compute it, and know that
        there will be a backward."""
        self.turn_attention: Callable[[bool], None] = lambda on: None
        self.calls = 0
        """How often a layer has asked to be recomputed."""

    @property
    def count(self) -> int:
        """How many layers can be recomputed, one by one; 1 where it is all of them or none."""
        return max(len(self.layers), 1)

    @property
    def most(self) -> int:
        """How many layers can be recomputed with a gain: the activations of the last one are
        there in any case when its backward begins."""
        if self.layers:
            return len(self.layers) - 1
        return 1 if getattr(self.base, "supports_gradient_checkpointing", False) else 0

    def apply(self, setting: Setting) -> None:
        """Checkpoint the first `setting.recomputed_layers` layers. Raises ValueError where the
        model cannot checkpoint and has to."""
        self.remade.turn(setting.offload and setting.input_every > 1)
        function = self._function(setting.offload, setting.attention and self.keeps_attention)
        read_in_parts(self.base, setting.offload or streamer_of(self.base) is not None)
        self.tiles.turn(setting.offload)
        self.turn_attention(setting.offload or setting.attention)
        if not self.layers:
            self._apply_to_all(setting.recomputed_layers > 0, function)
        for index, layer in enumerate(self.layers):
            setattr(layer, FLAG, index < setting.recomputed_layers)
            setattr(layer, FUNCTION, function)

    def _apply_to_all(self, on: bool, function: Callable[..., Any]) -> None:
        """A model that checkpoints in loops of its own knows all layers or none."""
        if not on and not any(getattr(module, FLAG, False) for module in self.base.modules()):
            return
        if not getattr(self.base, "supports_gradient_checkpointing", False):
            raise ValueError(f"{type(self.base).__name__} cannot recompute its layers")
        self.base._set_gradient_checkpointing(enable=on, gradient_checkpointing_func=function)

    def _function(self, offload: bool, attention: bool) -> Callable[..., Any]:
        # Keeping weights from the recomputation to the backward is faster, but takes memory.
        contexts = {} if self.reentrant or offload else {"context_fn": _contexts}
        options = {"use_reentrant": self.reentrant, "preserve_rng_state": self.draws, **contexts}
        again = partial(checkpoint, **options)  # type: ignore[arg-type]
        return partial(self._recompute, again, offload, attention)

    def _recompute(
        self,
        function: Callable[..., Any],
        offload: bool,
        attention: bool,
        layer: Callable[..., Any],
        *args: Any,
    ) -> Any:
        self.calls += 1
        layer = self.invocations.again(layer)
        if attention and torch.is_grad_enabled():
            layer = self.attention.again(layer, self.inputs.beside if offload else InPlace)
        with recomputed_later():
            if offload:
                return self.remade.run(function, layer, args)
            return function(layer, *args)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers that transformers can checkpoint one by one, in the order of computation;
    empty for a model that knows all or none. Towers in which nothing is trained keep nothing."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    towers = [name for name in other_towers(model) if not _trains(model.get_submodule(name))]
    found: list[nn.Module] = []
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if is_skipped(name, tuple(towers)):
            continue
        if isinstance(module, GradientCheckpointingLayer) and not name.startswith(inside):
            found.append(module)
            inside = (*inside, f"{name}.")
    return found


def _hidden_size(base: nn.Module) -> int:
    config: Any = getattr(base, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(text, "hidden_size", None) or 0)


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return the contexts of a layer's forward and of its recomputation."""
    return nullcontext(), recomputing()


def require_grad(module: nn.Module, args: Any, output: Tensor) -> None:
    """Make a graph start at `output`; a hook of the embedding."""
    output.requires_grad_(True)
