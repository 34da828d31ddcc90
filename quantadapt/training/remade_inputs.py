"""The input of every second recomputed layer, made again from that of the layer before.

Of very long rows, inputs of all layers are more than CPU memory holds. What a layer returned is the
input of the next: where it was not stored, the layer before runs once more in backward, from its
own input, which was (https://arxiv.org/abs/1604.06174, with segments of two layers). The numbers
are the same; a step takes half a forward more.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..facade import recomputed_later
from .cpu_inputs import CpuInputs, StoredTensor
from .random_state import RandomState

Layer = Callable[..., Any]


class _Before(NamedTuple):
    """A layer that has run: what it returned, as it was then, and what makes that again."""

    returned: weakref.ref[Tensor]
    version: int
    stored: weakref.ref[StoredTensor]
    run: Layer


class RemadeInputs:
    """Runs layers that are recomputed, and keeps their inputs: all, or every second.

    Args:
        inputs: where they are stored.
        draws: whether a pass draws random numbers, which a second run has to draw again.
    """

    def __init__(self, inputs: CpuInputs, draws: bool) -> None:
        self.inputs, self.draws, self.on = inputs, draws, False
        self._before: _Before | None = None

    def turn(self, on: bool) -> None:
        """Store every second input alone from here on, or all."""
        self.on, self._before = on, None

    def run(self, checkpoint: Layer, layer: Layer, args: tuple[Any, ...]) -> Any:
        """Return `checkpoint(layer, *args)`, which saves `args`; the first is the input."""
        remade, self._before = self._made_from_before(args[0]), None
        state = RandomState.of(args[0].device) if self.on and self.draws else None
        last = self.inputs.last
        with self.inputs.saving(args[0], remade):
            output = checkpoint(layer, *args)
        stored, returned = self.inputs.last, _hidden(output)
        if self.on and stored is not None and stored is not last:
            again = partial(_run, state, layer, args[1:])
            made = weakref.ref(returned, self._let_go), returned._version, weakref.ref(stored)
            self._before = _Before(*made, again)
        return output

    def _let_go(self, returned: weakref.ref[Tensor]) -> None:
        """Free what would make again what is gone: of the last layer nobody asks for it."""
        if self._before is not None and self._before.returned is returned:
            self._before = None

    def _made_from_before(self, hidden: Tensor) -> Callable[[], Tensor] | None:
        """Return what makes `hidden` again; None if it is not what the layer before, whose input
        is stored, returned, or was changed since."""
        before = self._before
        if before is None or before.returned() is not hidden:
            return None
        stored = before.stored()
        if stored is None or hidden._version != before.version:
            return None
        stored.let_go()
        return lambda: before.run(stored.kept())


def _run(state: RandomState | None, layer: Layer, rest: tuple[Any, ...], hidden: Tensor) -> Tensor:
    """Return what `layer` returned, by the very kernels: a gradient seems to be wanted."""
    hooks = saved_tensors_hooks(_nothing, _nothing)
    with _drawn_again(state), recomputed_later(), torch.enable_grad(), hooks:
        return _hidden(layer(hidden.detach().requires_grad_(), *rest)).detach()


def _nothing(_: Tensor) -> Any:
    """Stand for a tensor that no backward will ask for."""


def _hidden(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


@contextmanager
def _drawn_again(state: RandomState | None) -> Iterator[None]:
    if state is None:
        yield
        return
    now = RandomState.of(state.device)
    state.put_back()
    try:
        yield
    finally:
        now.put_back()
