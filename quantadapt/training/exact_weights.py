"""Weights of 16 bits that are trained themselves: modules trained whole, biases, heads.

A step changes a weight by about the learning rate, often less than half of what lies between two
numbers of 16 bits: rounded after each step, a norm in bfloat16 never changes at all, nor do the
means of squared gradients that Adam keeps. So the optimizer sees and keeps float32, and the model
computes with these numbers rounded as a merge rounds them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..model.half_precision import HALF, rounded_to

FILE = "exact_weights.safetensors"


@dataclass
class ExactWeights:
    """What stands in the place of such weights while the optimizer works.

    Attributes:
        weights: those that are trained in 16 bits, by name.
        exact: their values in float32, from the first step on.
        stay: they, and their gradients, stay in place after a step until `make_room` is called, as
            somebody looks at them.
    """

    weights: Mapping[str, nn.Parameter]
    exact: dict[str, Tensor] = field(default_factory=dict)
    stay: bool = False
    _rounded: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, optimizer: Any) -> ExactWeights:
        """Return those of a model, which take part in each step of its optimizer from now on."""
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        made = cls({name: weight for name, weight in trained.items() if weight.dtype in HALF})
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        if made.weights:
            inner.register_step_pre_hook(lambda *_: made._take_place())
            inner.register_step_post_hook(lambda *_: made._after_step())
        return made

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let weights have 32 bits, as an optimizer loads its states in their dtype."""
        self._take_place()
        try:
            yield
        finally:
            self.make_room()

    def save(self, folder: Path) -> None:
        """Write the exact values into a checkpoint."""
        from safetensors.torch import save_file

        if self.exact:
            held = {n: exact.detach().cpu().contiguous() for n, exact in self.exact.items()}
            save_file(held, folder / FILE)

    def load(self, folder: Path) -> None:
        """Take the exact values of a checkpoint, where it has some."""
        from safetensors.torch import load_file

        if self.weights and (folder / FILE).is_file():
            stored = load_file(folder / FILE)
            self.exact = {name: stored[name].to(w.device) for name, w in self.weights.items()}

    def put_back(self) -> None:
        """Let the model compute with what it had before, where a step of the optimizer failed."""
        for name in [*self._rounded]:
            self.weights[name].grad = None
            self.weights[name].data = self._rounded.pop(name)

    def _take_place(self) -> None:
        for name, weight in self.weights.items():
            gradient, weight.grad = weight.grad, None
            self._rounded[name] = weight.data
            if name not in self.exact:
                self.exact[name] = weight.data.float()
            weight.data = self.exact[name]
            weight.grad = None if gradient is None else gradient.float()

    def _after_step(self) -> None:
        if not self.stay:
            self.make_room()

    def make_room(self) -> None:
        """Let the model compute with them rounded, where they are in place."""
        with torch.no_grad():
            for name in [*self._rounded]:
                weight, rounded = self.weights[name], self._rounded.pop(name)
                weight.grad = None
                rounded.copy_(rounded_to(rounded.dtype, weight.data))
                weight.data = rounded
