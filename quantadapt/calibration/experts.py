"""Stacks of experts taken apart for calibration: a linear layer for each expert, which sees the
tokens that are routed to it.

    opened = open_experts(model, skip, quantizer.misfit)
    ...  # quantize what `linear_layers` finds, experts' layers too
    close_experts(model, opened, lambda _, layers: quantizer.join_rows(layers))

An expert that sees fewer tokens than it has inputs is shown all tokens of its block as well.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..errors import warn
from ..model.experts import Stack, expert_stacks, is_dispatched, layers_of, set_stack
from ..model.linears import linear_of

IMPLEMENTATION = "quantadapt-opened"
"""What our function is called in transformers' registry of experts' functions."""
OWN_WAY = "the model runs them in a way of its own, or the experts' sizes do not fit one by one"


class ExpertsWarning(UserWarning):
    """Experts are not calibrated as other layers are."""


class StackQuantizer(Protocol):
    """What is wanted of a quantizer here, as `protocols.LayerwiseQuantizer` says it."""

    def quantize_linear(self, linear: nn.Linear) -> nn.Module:
        """Return the vendor module for a dense layer, made without data."""
        ...


class Opened(NamedTuple):
    """A stack that is taken apart.

    Attributes:
        stack: what it is.
        layers: names of the layers that hold its rows, in their order.
    """

    stack: Stack
    layers: tuple[str, ...]


class _Seen:
    """What calibration shows the experts of one module.

    Attributes:
        counts: tokens routed to each expert, [experts]; None while they are not counted.
        few: experts that are shown all tokens.
    """

    def __init__(self) -> None:
        self.counts: Tensor | None = None
        self.few: frozenset[int] = frozenset()


Misfit = Callable[[int, int], str | None]
"""Says why a layer of (in_features, out_features) cannot be quantized; None: it can."""


def open_experts(model: nn.Module, skip: tuple[str, ...], misfit: Misfit) -> list[Opened]:
    """Take apart the stacks that are not skipped, in place. Those stay as they are whose experts
    do not fit one by one, or which the model runs in a way of its own."""
    opened = []
    for stack in list(expert_stacks(model, skip)):
        owner_name, _, key = stack.name.rpartition(".")
        owner: Any = model.get_submodule(owner_name)
        parts = _fitting_parts(owner, key, stack, misfit) if is_dispatched(owner) else ()
        if not parts:
            continue
        tall = stack.tall(owner._parameters.pop(key).data)
        rows = torch.split(tall, stack.out_features // len(parts))
        layers = layers_of(stack, parts)
        for name, weight in zip(layers, rows, strict=True):
            _put(model, owner_name, name, linear_of(weight))
        if not is_opened(owner):
            _register()
            owner.__dict__["_seen"] = _Seen()
            owner.__dict__["_config_before"] = owner.config
            owner.config = copy.copy(owner.config)
            owner.config._experts_implementation_internal = IMPLEMENTATION
        opened.append(Opened(stack, layers))
    return opened


def is_opened(module: nn.Module) -> bool:
    """Say whether a module holds experts that are taken apart."""
    return isinstance(vars(module).get("_seen"), _Seen)


def _fitting_parts(owner: Any, key: str, stack: Stack, misfit: Misfit) -> tuple[str, ...]:
    """Return what an expert's rows of the stack are taken apart into; () where nothing fits."""
    halves = key == "gate_up_proj" and owner.has_gate and owner.is_concatenated
    choices: list[tuple[str, ...]] = [("gate_proj", "up_proj")] if halves else []
    for parts in [*choices, (key,)]:
        if misfit(stack.in_features, stack.out_features // len(parts)) is None:
            return parts
    return ()


def _put(model: nn.Module, owner: str, name: str, layer: nn.Module) -> None:
    """Put the layer of an expert into the module of that expert, which may be new."""
    expert, _, part = name.removeprefix(f"{owner}.").partition(".")
    parent = model.get_submodule(owner)
    if expert not in parent._modules:
        parent.add_module(expert, nn.Module())
    parent.get_submodule(expert).add_module(part, layer)


def close_experts(
    model: nn.Module,
    opened: Iterable[Opened],
    join: Callable[[Opened, list[nn.Module]], nn.Module],
) -> None:
    """Put quantized stacks in the place of those that were taken apart, in place; `join` makes
    each from its layers, as they have become."""
    for one in opened:
        stack, layers = one
        owner: Any = model.get_submodule(stack.name.rpartition(".")[0])
        made = join(one, [model.get_submodule(name) for name in layers])
        set_stack(model, stack, made.eval())
        for name in layers:
            expert, part = name.split(".")[-2:]
            module = owner._modules[expert]
            del module._modules[part]
            if not module._modules:
                del owner._modules[expert]
        if is_opened(owner) and not any(key.isdigit() for key in owner._modules):
            del owner.__dict__["_seen"]
            owner.config = owner.__dict__.pop("_config_before")


def round_experts(
    model: nn.Module,
    skip: tuple[str, ...],
    quantizer: StackQuantizer,
    device: str,
    why: str = OWN_WAY,
) -> None:
    """Quantize the stacks that are dense and not skipped without data, in place, and say `why`."""
    stacks = list(expert_stacks(model, skip))
    for stack in stacks:
        linear = stack.as_linear(model.get_parameter(stack.name).data.to(device))
        set_stack(model, stack, quantizer.quantize_linear(linear).eval())
    if stacks:
        what = f"{len(stacks)} stacks of experts are rounded without calibration data: {why}"
        warn(what, ExpertsWarning, stacklevel=1)


# Running ---------------------------------------------------------------------------------------


def opened_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Run experts that are taken apart, as transformers' functions of that registry do."""
    seen: _Seen = self._seen
    output = torch.zeros_like(hidden_states)
    for expert in range(self.num_experts):
        token, place = torch.where(top_k_index == expert)
        if seen.counts is not None:
            seen.counts[expert] += len(token)
        if len(token):
            y = _run_expert(self, expert, hidden_states[token])
            y = y * top_k_weights[token, place].unsqueeze(-1)
            output = output.index_add(0, token, y.to(output.dtype))
        if expert in seen.few:
            _run_expert(self, expert, hidden_states)  # for whoever watches the layers
    return output


def _run_expert(experts: Any, expert: int, x: Tensor) -> Tensor:
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    x = _apply(experts, first, expert, x)
    x = experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)
    y: Tensor = _apply(experts, "down_proj", expert, x)
    if getattr(experts, "has_post_expert_norm", False):
        y = experts.post_expert_norm(y)
    return y


def _apply(experts: Any, key: str, expert: int, x: Tensor) -> Tensor:
    if (weight := experts._parameters.get(key)) is not None:  # one that is skipped
        y: Tensor = x @ (weight[expert] if experts.is_transposed else weight[expert].t())
    else:
        layers = experts._modules[str(expert)]._modules
        parts = (key,) if key in layers else ("gate_proj", "up_proj")
        y = torch.cat([layers[part](x) for part in parts], -1)
    if experts.has_bias:
        y = y + getattr(experts, f"{key}_bias")[expert].to(y.dtype)
    return y


@cache
def _register() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, opened_forward)


# Counting --------------------------------------------------------------------------------------


class Tokens:
    """Counts the tokens that are routed to the experts of a model, and tells of those that see few
    of them."""

    def __init__(self, *, show_all: bool = True) -> None:
        self.show_all = show_all
        self.experts = self.few = self.none = 0

    def count(self, module: nn.Module, run_all: Callable[[], Any]) -> None:
        """Look at the opened experts in `module` while `run_all` runs it on all examples: those
        that see few tokens are shown all of them from then on, where that is wanted."""
        found: list[Any] = [m for m in module.modules() if is_opened(m)]
        for experts in found:
            experts._seen.counts = torch.zeros(experts.num_experts, dtype=torch.long)
        if found:
            run_all()
        for experts in found:
            counts, experts._seen.counts = experts._seen.counts, None
            few = (counts < _inputs(experts)).nonzero().flatten().tolist()
            experts._seen.few = frozenset(few if self.show_all else ())
            self.experts += len(counts)
            self.few += len(few)
            self.none += int((counts == 0).sum())

    def tell(self) -> None:
        """Warn, once, of what was counted."""
        if self.few:
            helped = "they are calibrated on all tokens of their block; "
            what = (
                f"{self.few} of {self.experts} experts see fewer calibration tokens than they have"
                f" inputs ({self.none} see none): {helped if self.show_all else ''}give more or"
                " longer examples"
            )
            warn(what, ExpertsWarning, stacklevel=1)


def _inputs(experts: Any) -> int:
    """Return how many inputs the layers of one expert have, at most."""
    modules = next(m for key, m in experts._modules.items() if key.isdigit()).children()
    return max(int(layer.in_features) for layer in modules)
