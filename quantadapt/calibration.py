"""Show a model calibration data block by block, and measure what each linear layer is fed.

For quantizers that choose a layer's weights by what becomes of its outputs. `walk_blocks` hands
over one linear layer after the other with the second moment of its inputs, X^T X, which is all that
the squared error of the outputs depends on: ||X (W - V)^T||^2 = tr((W - V) X^T X (W - V)^T). A
layer's inputs are what comes out of the layers before it as those are *then*: quantize a layer in
the callback, and the later ones see its error and can make up for it.

    def on_layer(name, linear, inputs):
        linear.weight.data = my_rounding(linear.weight, inputs.second_moment)

    walk_blocks(model, examples, on_layer=on_layer, device="cuda")

Only one block has to fit on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .loading import set_submodule

Linears = dict[str, nn.Linear]


@dataclass(frozen=True)
class LayerInputs:
    """What calibration showed one linear layer.

    Attributes:
        second_moment: X^T X, [in_features, in_features], float32, where the layer is.
        rows: how many inputs X holds; 0 where no example reached the layer.
    """

    second_moment: Tensor
    rows: int


@torch.no_grad()
def walk_blocks(
    model: nn.Module,
    examples: Iterable[Mapping[str, Any]],
    *,
    on_layer: Callable[[str, nn.Linear, LayerInputs], nn.Module | None],
    names: Iterable[str] | None = None,
    on_block: Callable[[str], None] | None = None,
    device: str = "cpu",
) -> None:
    """Call `on_layer` for each linear layer, in the order of computation.

    A decoder is walked block by block. Inside a block, layers that share an input (q, k and v) come
    together, before the next ones are measured. A model without such blocks is run as a whole:
    all of its layers are measured as the model was before.

    Args:
        model: in eval mode. It is run without a cache and changed by nobody but the callbacks.
        examples: keyword arguments of its forward, such as `{"input_ids": ...}`; tokens that an
            `attention_mask` of [1, length] hides do not count.
        on_layer: gets name, layer and inputs. It may change the layer in place, or return a module
            to put where it stood.
        names: the layers to hand over; by default every `nn.Linear`, of a decoder those in blocks.
        on_block: gets the name of a block that is done with, and at last "" for the whole model.
        device: where to compute; what was walked stays there.
    """
    shown = list(examples)
    blocks = decoder_blocks(model) or {}
    linears = {n: m for n, m in model.named_modules() if type(m) is nn.Linear}
    if names is not None:
        linears = {name: linears[name] for name in names}
    elif blocks:
        linears = {n: m for block in blocks for n, m in _inside(linears, block).items()}
    recorded = _record(model, list(blocks.values()), shown) if blocks else None
    if recorded:
        for number, (name, block) in enumerate(blocks.items()):
            block.to(device)
            passes = recorded.passes(number, block, device)
            if inside := _inside(linears, name):
                _walk_block(model, passes, inside, on_layer)
                linears = {n: m for n, m in linears.items() if n not in inside}
            if number + 1 < len(blocks):
                recorded.advance(passes, device)
            if on_block:
                on_block(name)
    if linears:  # there are no blocks; or a head, which is fed what comes out of them
        _walk_whole(model, shown, linears, on_layer, device)
    if on_block:
        on_block("")


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module] | None:
    """Return name -> block, where the linear layers stand in one list of blocks, else None."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and not nested and _has_linears(module):
            found[name] = module
    if len(found) != 1:
        return None
    ((name, blocks),) = found.items()
    return {f"{name}.{index}": block for index, block in enumerate(blocks)}


def _has_linears(module: nn.Module) -> bool:
    return any(isinstance(part, nn.Linear) for part in module.modules())


def _inside(linears: Linears, block: str) -> Linears:
    return {name: linear for name, linear in linears.items() if name.startswith(f"{block}.")}


# Measuring -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pass:
    """Something to run for one example, and which of its tokens count."""

    run: Callable[[], Any]
    mask: Tensor | None


class _Enough(Exception):
    """Raised in a forward pass once everything that was wanted of it is known."""


def _walk_block(model: nn.Module, passes: list[_Pass], linears: Linears, on_layer: Any) -> None:
    reached = _stages(linears, passes[0])
    for stage in reached:
        (inputs,) = _measure({stage[0]: linears[stage[0]]}, passes, stop=True).values()
        for name in stage:
            _hand_over(model, name, linears[name], inputs, on_layer)
    missed = {name: linears[name] for name in linears.keys() - set().union(*reached)}
    for name, inputs in (_measure(missed, passes) if missed else {}).items():  # experts, say
        _hand_over(model, name, linears[name], inputs, on_layer)


def _walk_whole(
    model: nn.Module,
    examples: list[Mapping[str, Any]],
    linears: Linears,
    on_layer: Any,
    device: str,
) -> None:
    model.to(device)
    passes = [_Pass(partial(_run, model, e), e.get("attention_mask")) for e in examples]
    for name, inputs in _measure(linears, passes).items():
        _hand_over(model, name, linears[name], inputs, on_layer)


def _hand_over(
    model: nn.Module, name: str, linear: nn.Linear, inputs: LayerInputs, on_layer: Any
) -> None:
    made = on_layer(name, linear, inputs)
    if made is not None:
        set_submodule(model, name, made)


def _stages(linears: Linears, one: _Pass) -> list[list[str]]:
    """Return the layers that a pass reaches, in its order, those with one input together."""
    inputs: list[Tensor] = []
    stages: list[list[str]] = []
    seen: set[str] = set()

    def note(name: str, x: Tensor) -> None:
        if name in seen:
            return
        seen.add(name)
        if not inputs or inputs[-1] is not x:
            inputs.append(x)
            stages.append([])
        stages[-1].append(name)

    with _watched(linears, note):
        one.run()
    return stages


def _measure(
    linears: Linears, passes: list[_Pass], *, stop: bool = False
) -> dict[str, LayerInputs]:
    """Return the inputs of each layer; `stop` says that nothing after the first one matters."""
    moments = {
        name: torch.zeros(linear.in_features, linear.in_features, device=linear.weight.device)
        for name, linear in linears.items()
    }
    rows = dict.fromkeys(linears, 0)
    mask: Tensor | None = None

    def add(name: str, x: Tensor) -> None:
        counted = x if mask is None or mask.shape != x.shape[:-1] else x[mask.to(x.device).bool()]
        flat = counted.reshape(-1, x.shape[-1]).float()
        moments[name].addmm_(flat.t(), flat)
        rows[name] += flat.shape[0]
        if stop:
            raise _Enough

    with _watched(linears, add):
        for one in passes:
            mask = one.mask
            with suppress(_Enough):
                one.run()
    return {name: LayerInputs(moments[name], rows[name]) for name in linears}


@contextmanager
def _watched(linears: Linears, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `see(name, x)` whenever one of the layers gets an input."""
    with ExitStack() as hooks:
        for name, linear in linears.items():
            hook = linear.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0]))
            hooks.callback(hook.remove)
        yield


# What blocks are called with -------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """What a block gets in one call beside the hidden states, which come first or are `key`."""

    key: str | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: Tensor | None

    def on(self, block: nn.Module, device: str, hidden: Tensor) -> Any:
        """Call `block` with these hidden states."""
        hidden, args, kwargs = tree_map_only(
            Tensor, lambda tensor: tensor.to(device), (hidden, self.args, self.kwargs)
        )
        if self.key is None:
            return block(hidden, *args, **kwargs)
        return block(*args, **kwargs, **{self.key: hidden})


class _NoChain(Exception):
    """The blocks are not called one after the other, each with what the last one returned."""


class _Recorder:
    """Stands in for all blocks, so that a pass of the model computes only what is around them.

    What a block is called with, beside the hidden states, does not depend on the other blocks.
    """

    def __init__(self, blocks: list[nn.Module]) -> None:
        self.blocks = blocks
        self.hidden: list[Tensor] = []
        self.calls: list[list[_Call]] = [[] for _ in blocks]
        self.turn = 0
        self.returned: Tensor | None = None
        self.beside: tuple[Any, ...] | None = None
        """What blocks return after the hidden states; None if they return a bare tensor."""

    def record(self, model: nn.Module, example: Mapping[str, Any]) -> None:
        """Add the calls for one example. Raises _NoChain."""
        self.turn, self.returned = 0, None
        with ExitStack() as undo:
            for number, block in enumerate(self.blocks):
                before = vars(block).get("forward")
                real = block.forward
                block.forward = partial(self._call, number, real, example.get("attention_mask"))
                undo.callback(_restore, block, before)
            try:
                _run(model, example)
            except _Enough:
                return
            raise _NoChain

    def _call(self, number: int, real: Any, mask: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        key = None if args else "hidden_states"
        hidden = args[0] if args else kwargs.get("hidden_states")
        if number != self.turn or not isinstance(hidden, Tensor):
            raise _NoChain
        if number and hidden is not self.returned:
            raise _NoChain
        others = {name: value for name, value in kwargs.items() if name != key}
        self.calls[number].append(_Call(key, args[1:], others, mask))
        if number == 0:
            self.hidden.append(hidden)
        if number + 1 == len(self.blocks):
            raise _Enough
        if number == 0 and len(self.hidden) == 1:  # the very first call shows what they return
            output = real(*args, **kwargs)
            self.beside = tuple(output[1:]) if isinstance(output, tuple) else None
        self.turn += 1
        self.returned = torch.zeros_like(hidden)
        return self.returned if self.beside is None else (self.returned, *self.beside)

    def passes(self, number: int, block: nn.Module, device: str) -> list[_Pass]:
        """Return a pass of one block for each example, with the hidden states as they are now."""
        pairs = zip(self.calls[number], self.hidden, strict=True)
        return [_Pass(partial(call.on, block, device, x), call.mask) for call, x in pairs]

    def advance(self, passes: list[_Pass], device: str) -> None:
        """Replace the hidden states by what comes out of a block."""
        kept_on = _storage(self.hidden, device)
        for index, one in enumerate(passes):
            output = one.run()
            states: Tensor = output[0] if isinstance(output, tuple) else output
            self.hidden[index] = states.to(kept_on)


def _restore(block: nn.Module, forward: Any) -> None:
    if forward is None:
        del block.forward
    else:
        block.forward = forward


def _record(
    model: nn.Module, blocks: list[nn.Module], examples: list[Mapping[str, Any]]
) -> _Recorder | None:
    """Return what the blocks are called with for every example; None where they are no chain."""
    recorder = _Recorder(blocks)
    try:
        for example in examples:
            recorder.record(model, example)
    except _NoChain:
        return None
    return recorder


def _run(model: nn.Module, example: Mapping[str, Any]) -> Any:
    """Run the model on one example, on its own device."""
    device = next(model.parameters()).device
    given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in example.items()}
    if hasattr(getattr(model, "config", None), "use_cache"):
        given["use_cache"] = False
    return model(**given)


def _storage(hidden: list[Tensor], device: str) -> str:
    """Return where hidden states wait: on the device as long as they take little of it."""
    if not device.startswith("cuda"):
        return "cpu"
    free, _ = torch.cuda.mem_get_info(torch.device(device))
    return device if sum(h.nbytes for h in hidden) < free // 8 else "cpu"
