"""Record what the blocks of a model are called with, so that each can be run by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_any, tree_map, tree_map_only


@dataclass(frozen=True)
class Pass:
    """One run of a part of a model.

    Attributes:
        run: computes it and returns the output.
        mask: the example's attention mask, [1, length]; None if all of its tokens count.
    """

    run: Callable[[], Any]
    mask: Tensor | None


_STATES = object()
"""Stands for the hidden states that come out of the block before, among recorded arguments."""


@dataclass(frozen=True)
class _Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: Tensor | None

    def on(self, block: nn.Module, device: str, states: Tensor | None) -> Any:
        """Call `block` with these hidden states."""
        given = tree_map(lambda x: states if x is _STATES else x, (self.args, self.kwargs))
        args, kwargs = _on(device, given)
        return block(*args, **kwargs)


class Enough(Exception):
    """Raised in a forward pass once everything that was wanted of it is known."""


class _NoChain(Exception):
    """The blocks are not called one after the other, each with what the last one returned."""


class Recorder:
    """Stands in for all blocks while the model is run, and notes what they are called with.

    In a `chain` only what is around the blocks is computed: what they are called with, beside the
    hidden states, does not depend on the other blocks. Elsewhere the blocks compute, as they are
    before anything is done to them, and only what comes from the block right before is replaced.
    """

    def __init__(self, blocks: list[nn.Module], device: str, *, chain: bool) -> None:
        self.blocks, self.device, self.chain = blocks, device, chain
        self.calls: list[list[_Call]] = [[] for _ in blocks]
        self.states: dict[int, Tensor] = {}
        """What the next block to be run is fed, by the number of its call."""
        self.turn = 0
        self.last: Any = None
        """What the block whose turn it is gets from the one before; the first, from the model."""
        self.beside: tuple[Any, ...] | None = None
        """What blocks return after the hidden states; None if they return a bare tensor."""

    def record(self, model: nn.Module, example: Mapping[str, Any]) -> None:
        """Add the calls for one example. Raises _NoChain."""
        self.turn, self.last = 0, None
        with ExitStack() as undo:
            for number, block in enumerate(self.blocks):
                before = vars(block).get("forward")
                real, mask = block.forward, example.get("attention_mask")
                block.forward = partial(self._call, number, real, mask)
                undo.callback(_restore, block, before)
            try:
                run(model, example)
            except Enough:
                return
        if self.chain:
            raise _NoChain

    def _call(self, number: int, real: Any, mask: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if self.chain:
            self._check(number, hidden, (args, kwargs))
        calls = self.calls[number]
        if number == 0 and isinstance(hidden, Tensor):
            self.turn, self.last = 0, hidden
            self.states[len(calls)] = hidden
        # A call is fed by the one of the same number; what is called more often keeps what it got.
        fed = number == 0 or len(self.calls[number - 1]) == len(calls) + 1
        last = self.last if fed and number == self.turn else None
        calls.append(_noted(last, mask, args, kwargs))
        if self.chain and number + 1 == len(self.blocks):
            raise Enough
        computed = partial(self._computed, self.blocks[number], real, args, kwargs)
        output = self._imitated(hidden, computed) if self.chain else computed()
        self.turn, self.last = number + 1, first(output)
        return output

    def _check(self, number: int, hidden: Any, given: Any) -> None:
        """Raise _NoChain where a block is called with something else than the chain allows."""
        in_turn = number == self.turn and isinstance(hidden, Tensor)
        if not in_turn or (number and hidden is not self.last):
            raise _NoChain
        beside = [value for value in self.beside or () if isinstance(value, Tensor)]
        if tree_any(lambda value: any(value is other for other in beside), given):
            raise _NoChain

    def _imitated(self, hidden: Any, computed: Callable[[], Any]) -> Any:
        """Return what looks like the output; the very first call shows what blocks return."""
        if sum(map(len, self.calls)) == 1:
            output = computed()
            self.beside = tuple(output[1:]) if isinstance(output, tuple) else None
        states = torch.zeros_like(hidden)
        return states if self.beside is None else (states, *self.beside)

    def _computed(self, block: nn.Module, real: Any, args: Any, kwargs: Any) -> Any:
        """Return the output, computed on the device, where the block stays for this only."""
        home = next((p.device for p in block.parameters()), torch.device(self.device))
        block.to(self.device)
        args, kwargs = _on(self.device, (args, kwargs))
        output = _on(home, real(*args, **kwargs))
        block.to(home)
        return output

    def passes(self, number: int) -> list[Pass]:
        """Return the passes of one block, with the hidden states as they are when they are run."""
        return [
            Pass(partial(self._run_call, number, index), call.mask)
            for index, call in enumerate(self.calls[number])
        ]

    def _run_call(self, number: int, index: int) -> Any:
        call, states = self.calls[number][index], self.states.get(index)
        return call.on(self.blocks[number], self.device, states)

    def advance(self, passes: list[Pass]) -> None:
        """Replace the hidden states by what comes out of a block."""
        kept_on = _storage(self.states.values(), self.device)
        for index, one in enumerate(passes):
            self.states[index] = first(one.run()).to(kept_on)


def _noted(last: Any, mask: Tensor | None, args: Any, kwargs: dict[str, Any]) -> _Call:
    """Return a call with `_STATES` for `last`, and without caches, which would grow."""
    kwargs = {n: None if "Cache" in type(v).__name__ else v for n, v in kwargs.items()}
    args, kwargs = tree_map(
        lambda x: _STATES if last is not None and x is last else x, (args, kwargs)
    )
    return _Call(args, kwargs, mask)


def _restore(block: nn.Module, forward: Any) -> None:
    if forward is None:
        del block.forward
    else:
        block.forward = forward


def record_blocks(
    model: nn.Module,
    blocks: list[nn.Module],
    examples: list[Mapping[str, Any]],
    device: str,
    *,
    chain: bool,
) -> Recorder:
    """Return what the blocks are called with for every example."""
    if not chain and _fits(model, device):
        model.to(device)
    recorder = Recorder(blocks, device, chain=chain)
    try:
        for example in examples if blocks else ():
            recorder.record(model, example)
    except _NoChain:
        return record_blocks(model, blocks, examples, device, chain=False)
    return recorder


def run(model: nn.Module, example: Mapping[str, Any]) -> Any:
    """Run the model on one example, on its own device."""
    device = next(model.parameters()).device
    given = dict(_on(device, dict(example)))
    config = getattr(model, "config", None)
    if hasattr(config, "use_cache"):
        given["use_cache"] = False
    if getattr(config, "is_encoder_decoder", False) and "input_ids" in given:
        given.setdefault("decoder_input_ids", given["input_ids"])
    return model(**given)


def _on(device: torch.device | str, given: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), given)


def _fits(model: nn.Module, device: str) -> bool:
    """Say whether all of the model may be on a GPU, with as much again for what is computed; else
    its blocks come there one at a time, which is slower."""
    if not device.startswith("cuda"):
        return False
    size = sum(parameter.nbytes for parameter in model.parameters())
    return 2 * size < torch.cuda.mem_get_info(torch.device(device))[0]


def _storage(states: Iterable[Tensor], device: str) -> str:
    """Return where hidden states wait: on the device as long as they take little of it."""
    if not device.startswith("cuda"):
        return "cpu"
    free, _ = torch.cuda.mem_get_info(torch.device(device))
    return device if sum(tensor.nbytes for tensor in states) < free // 8 else "cpu"


def first(output: Any) -> Any:
    """Return what a block hands on to the next one: the first of what it returns."""
    if isinstance(output, Mapping):
        return next(iter(output.values()))
    return output[0] if isinstance(output, (tuple, list)) else output
