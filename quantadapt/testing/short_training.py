"""Train one adapter for a few steps, and note everything that the tests ask about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .tensors import digest

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn

    from .bench import Bench

STEPS = 4
LEARNING_RATES = (5e-3, 0.1)
"""The second is for methods that hardly move in a few steps at the first."""
LEAST_GAIN = 0.01
"""Share by which the loss has to fall."""


@dataclass
class Trained:
    """One adapter, attached and trained for a few steps, and everything measured on the way.

    Attributes:
        model: the tuned PeftModel, in eval mode.
        facades: the base's facades; the same objects that PEFT wrapped.
        start, tuned: logits right after attaching, and after training.
        losses: before each step.
        base_at: digests of the base's tensors "before" attaching, at the "start" of training and
            at its "end".
        trainable: names of the parameters with requires_grad.
        of_base: names of those among them that belong to the base.
        moved: names of the parameters that training changed.
        with_gradient: names of the parameters that got a gradient.
        allocated: AdaLoRA's number of active directions after each step.
    """

    model: PeftModel
    start: Tensor
    tuned: Tensor
    losses: list[float]
    base_at: dict[str, dict[str, str]]
    trainable: set[str]
    of_base: set[str]
    moved: set[str]
    with_gradient: set[str]
    allocated: list[int] = field(default_factory=list)


def train(bench: Bench, adapter: str, **options: Any) -> Trained:
    """Attach `adapter` to a copy of the bench's base and take a few AdamW steps on demo data, at
    the first learning rate at which the loss falls."""
    for rate in LEARNING_RATES:
        trained = _train(bench, adapter, rate, **options)
        if trained.losses[-1] < trained.losses[0] * (1 - LEAST_GAIN):
            break
    return trained


def _train(bench: Bench, adapter: str, rate: float, **options: Any) -> Trained:
    import torch

    base = bench.fresh()
    held = _Held(base)
    digests = {"before": held.digests()}
    model = bench.attach(adapter, base, **options)
    digests["start"] = held.digests()
    start = bench.logits(model)
    before = {n: digest(p) for n, p in model.named_parameters()}
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    own = held.ids()
    of_base = {n for n, p in model.named_parameters() if id(p) in own and p.requires_grad}
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=rate,
    )
    losses: list[float] = []
    allocated: list[int] = []
    with_gradient: set[str] = set()
    model.train()
    for step in range(STEPS):
        loss = model(input_ids=bench.ids, labels=bench.ids).loss
        loss.backward()
        with_gradient |= {n for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        if hasattr(model.base_model, "update_and_allocate"):
            model.base_model.update_and_allocate(step)
            allocated.append(_directions(model))
        optimizer.zero_grad()
        losses.append(loss.item())
    tuned = bench.logits(model)
    losses.append(bench.loss(model))
    digests["end"] = held.digests()
    moved = {n for n, p in model.named_parameters() if digest(p) != before[n]}
    return Trained(
        model=model,
        start=start,
        tuned=tuned,
        losses=losses,
        base_at=digests,
        trainable=trainable,
        of_base=of_base,
        moved=moved,
        with_gradient=with_gradient,
        allocated=allocated,
    )


class _Held:
    """The tensors of a base model, held by the modules that own them, whatever PEFT wraps."""

    def __init__(self, base: nn.Module) -> None:
        from ..facade import QuantLinear

        self.facades = {n: m for n, m in base.named_modules() if isinstance(m, QuantLinear)}
        inside = {id(p) for facade in self.facades.values() for p in facade.parameters()}
        self.others = {n: p for n, p in base.named_parameters() if id(p) not in inside}

    def ids(self) -> set[int]:
        """Return the ids of the base's parameters as they are now."""
        packed = {id(p) for facade in self.facades.values() for p in facade.parameters()}
        return packed | {id(p) for p in self.others.values()}

    def digests(self) -> dict[str, str]:
        """Return name -> digest of the bytes of every tensor of the base."""
        packed = {
            f"{name}.{key}": digest(value)
            for name, facade in self.facades.items()
            for key, value in facade.state_dict().items()
        }
        return packed | {name: digest(value) for name, value in self.others.items()}


def _directions(model: PeftModel) -> int:
    """Return how many of AdaLoRA's singular directions are in use."""
    values = [p for n, p in model.named_parameters() if "lora_E" in n]
    return sum(int(value.count_nonzero()) for value in values)
