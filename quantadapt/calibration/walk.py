"""Show a model calibration data block by block, and measure what each linear layer is fed.

For quantizers that choose a layer's weights by what becomes of its outputs. `walk_blocks` hands
over one linear layer after the other with the second moment of its inputs, X^T X, which is all that
the squared error of the outputs depends on: ||X (W - V)^T||^2 = tr((W - V) X^T X (W - V)^T). A
layer's inputs are what comes out of the layers before it as those are *then*: quantize a layer in
the callback, and the later ones see its error and can make up for it. `beside` is another model,
which is not changed: what its layer is fed tells what the error of the layers before has done.

    def on_layer(name, linear, inputs):
        linear.weight.data = my_rounding(linear.weight, inputs.second_moment)

    walk_blocks(model, examples, on_layer=on_layer, device="cuda")

A quantizer that works on whole blocks, or measures something else, takes `each_block`. Only one
block has to fit on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from ..model.modules import decoder_blocks, set_submodule
from .blocks import Block, Linears, each_block
from .recording import Enough, Pass

__all__ = ["Block", "LayerInputs", "Pass", "decoder_blocks", "each_block", "walk_blocks"]


@dataclass(frozen=True)
class LayerInputs:
    """What calibration showed one linear layer.

    Attributes:
        second_moment: X^T X, [in_features, in_features], float32, where the layer is.
        rows: how many inputs X holds; 0 where no example reached the layer.
        cross_moment: X^T Y, like the second moment, where Y is what the layer of the model beside
            was fed at the same tokens; None without one, and for experts, which other tokens reach.
    """

    second_moment: Tensor
    rows: int
    cross_moment: Tensor | None = None


OnLayer = Callable[[str, nn.Linear, LayerInputs], nn.Module | None]


@torch.no_grad()
def walk_blocks(
    model: nn.Module,
    examples: Iterable[Mapping[str, Any]],
    *,
    on_layer: OnLayer,
    names: Iterable[str] | None = None,
    on_block: Callable[[str], None] | None = None,
    device: str = "cpu",
    beside: nn.Module | None = None,
) -> None:
    """Call `on_layer` for each linear layer, in the order of computation.

    A decoder is walked block by block. Inside a block, layers that share an input (q, k and v) come
    together, before the next ones are measured. What is outside of blocks comes last, all of it
    measured at once, with the blocks as they are then.

    Args:
        model: in eval mode. It is run without a cache and changed by nobody but the callbacks.
        examples: keyword arguments of its forward, such as `{"input_ids": ...}`; tokens that an
            `attention_mask` of [1, length] hides do not count.
        on_layer: gets name, layer and inputs. It may change the layer in place, or return a module
            to put where it stood.
        names: the layers to hand over; by default those of `each_block`.
        on_block: gets the name of a block that is done with, and at last "" for the whole model.
        device: where to compute; what was walked stays there.
        beside: a model with the same layers under the same names, shown the same examples.
    """
    tell = on_block or (lambda name: None)
    shown, names = list(examples), None if names is None else list(names)
    blocks = each_block(model, shown, names=names, device=device)
    others: Iterator[Block | None] = repeat(None)
    if beside is not None:
        others = each_block(beside, shown, names=names, device=device)
    walked = ""
    for block, other in zip(blocks, others, strict=False):
        if walked:  # it has fed this one by now
            tell(walked)
        walked = block.name
        if walked:
            _walk_block(model, block, other, on_layer)
        else:
            _hand_over_all(model, block, other, block.linears, on_layer)
    if walked:
        tell(walked)
    tell("")


# Measuring -------------------------------------------------------------------------------------


def _walk_block(model: nn.Module, block: Block, other: Block | None, on_layer: OnLayer) -> None:
    linears = block.linears
    experts = block.of_experts
    reached = _stages(linears, experts, block.passes[0]) if linears and block.passes else []
    for stage in reached:
        # What shares its input is measured once: gate and up of one expert, say.
        alike = {name: name.rpartition(".")[0] if name in experts else "" for name in stage}
        first = {like: name for name, like in reversed(alike.items())}
        measured = {name: linears[name] for name in first.values()}
        same_tokens = None if experts & measured.keys() else other
        found = _measure(measured, block, same_tokens, stop=len(measured) == 1)
        for name in stage:
            _hand_over(model, name, linears[name], found[first[alike[name]]], on_layer)
    missed = {name: linears[name] for name in linears.keys() - set().union(*reached)}
    _hand_over_all(model, block, other, missed, on_layer)


def _hand_over_all(
    model: nn.Module, block: Block, other: Block | None, linears: Linears, on_layer: OnLayer
) -> None:
    """Hand over layers that are all measured at once."""
    for name, inputs in (_measure(linears, block, other) if linears else {}).items():
        _hand_over(model, name, linears[name], inputs, on_layer)


def _hand_over(
    model: nn.Module, name: str, linear: nn.Linear, inputs: LayerInputs, on_layer: OnLayer
) -> None:
    made = on_layer(name, linear, inputs)
    if made is not None:
        set_submodule(model, name, made)


def _stages(linears: Linears, experts: set[str], one: Pass) -> list[list[str]]:
    """Return the layers that a pass reaches, in its order, those with one input together; and so
    the layers of all experts of a module, reached or not: first what they begin with, then what
    they end with."""
    inputs: list[Tensor] = []
    stages: list[list[str]] = []
    seen: set[str] = set()

    def note(name: str, x: Tensor) -> None:
        if name in seen:
            return
        if name in experts:
            stages.append([other for other in linears if _kind(other) == _kind(name)])
            seen.update(stages[-1])
            return
        seen.add(name)
        if not inputs or inputs[-1] is not x:
            inputs.append(x)
            stages.append([])
        stages[-1].append(name)

    with _watched(linears, note):
        one.run()
    return stages


def _kind(name: str) -> tuple[str, bool]:
    """Return which experts' layer this is: of which module, and whether it is the last one."""
    expert, _, part = name.rpartition(".")
    return expert.rpartition(".")[0], part == "down_proj"


def _measure(
    linears: Linears, block: Block, other: Block | None, *, stop: bool = False
) -> dict[str, LayerInputs]:
    """Return the inputs of each layer, of `other` beside those of `block`; `stop` says that nothing
    after the first one matters."""
    seconds = {name: _zeros(linear) for name, linear in linears.items()}
    crosses = {} if other is None else {name: _zeros(linear) for name, linear in linears.items()}
    rows = dict.fromkeys(linears, 0)
    for number, one in enumerate(block.passes):
        theirs: dict[str, Tensor] = {}
        if other is not None:
            named = {name: other.linears[name] for name in linears}
            theirs = dict(_inputs_in(named, other.passes[number], stop))
        for name, x in _inputs_in(linears, one, stop):
            seconds[name].addmm_(x.t(), x)
            rows[name] += len(x)
            y = theirs.get(name)
            if y is None or y.shape != x.shape:
                crosses.pop(name, None)
            elif name in crosses:
                crosses[name].addmm_(x.t(), y.to(x.device))
    return {name: LayerInputs(seconds[name], rows[name], crosses.get(name)) for name in linears}


def _zeros(linear: nn.Linear) -> Tensor:
    return torch.zeros(linear.in_features, linear.in_features, device=linear.weight.device)


def _inputs_in(linears: Linears, one: Pass, stop: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield what each layer is fed in a pass, [rows, in_features], float32, of tokens that count;
    what is not reached is left out."""
    found: dict[str, list[Tensor]] = {}

    def note(name: str, x: Tensor) -> None:
        hides = one.mask is not None and one.mask.shape == x.shape[:-1]
        counted = x[one.mask.to(x.device).bool()] if hides else x  # type: ignore[union-attr]
        found.setdefault(name, []).append(counted.reshape(-1, x.shape[-1]).float())
        if stop:
            raise Enough

    with _watched(linears, note), suppress(Enough):
        one.run()
    for name, parts in found.items():
        yield name, torch.cat(parts)


@contextmanager
def _watched(linears: Linears, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `see(name, x)` whenever one of the layers gets an input."""
    with ExitStack() as hooks:
        for name, linear in linears.items():
            hook = linear.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0]))
            hooks.callback(hook.remove)
        yield
