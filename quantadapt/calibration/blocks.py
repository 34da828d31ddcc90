"""Take a model apart into blocks and run them one after the other on calibration examples.

Each block is fed by the ones before it as those are *then*: whatever was done to them is seen. Only
one block has to fit on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..model.modules import stacks
from .experts import Tokens, is_opened
from .recording import Pass, record_blocks, run

Linears = dict[str, nn.Linear]


@dataclass(frozen=True)
class Block:
    """A part of a model, ready to be run on the examples.

    Attributes:
        name: its name in the model; "" is the model itself, with what is outside of every block.
        module: a decoder layer, say.
        linears: the layers in it that were asked for, by their names in the model.
        passes: its runs, in the order of the examples.
    """

    name: str
    module: nn.Module
    linears: Linears
    passes: list[Pass]

    @property
    def of_experts(self) -> set[str]:
        """The names of the layers that are experts', taken apart."""
        owners = [name for name, module in self.module.named_modules() if is_opened(module)]
        prefixes = tuple(f"{self.name}.{owner}.".lstrip(".") for owner in owners)
        return {name for name in self.linears if name.startswith(prefixes)}

    def run(self, count: int | None = None) -> Iterator[Any]:
        """Yield the output of each pass, or of the first `count`."""
        for one in self.passes[:count]:
            yield one.run()

    def run_all(self) -> None:
        """Run every pass, for the hooks on the layers to see."""
        for _ in self.run():
            pass


def _run_all(passes: list[Pass]) -> None:
    for one in passes:
        one.run()


@torch.no_grad()
def each_block(
    model: nn.Module,
    examples: Iterable[Mapping[str, Any]],
    *,
    names: Iterable[str] | None = None,
    device: str = "cpu",
) -> Iterator[Block]:
    """Yield the blocks of a model in the order of computation, each on `device`, where it stays.

    When the caller is done with one and asks for the next, it is run as it has then become, and
    the next one gets what comes out. At last comes the model as a whole, if layers that were asked
    for are in no block.

    Args:
        model: in eval mode. It is run without a cache and changed by nobody but the caller.
        examples: keyword arguments of its forward, such as `{"input_ids": ...}`.
        names: the linear layers that matter; by default every `nn.Linear` that is in a block, or
            every one where there are no blocks.
        device: where to compute.
    """
    shown = list(examples)
    linears = {n: m for n, m in model.named_modules() if type(m) is nn.Linear}
    if names is not None:
        linears = {name: linears[name] for name in names}
    found = stacks(model, linears)
    blocks = {name: block for stack in found for name, block in stack.items()}
    rest = {n: m for n, m in linears.items() if not any(n.startswith(f"{b}.") for b in blocks)}
    chain = len(found) == 1
    tokens = Tokens()
    recorder = record_blocks(model, list(blocks.values()), shown, device, chain=chain)
    for number, (name, block) in enumerate(blocks.items()):
        block.to(device)
        passes = recorder.passes(number)
        inside = {n: m for n, m in linears.items() if n.startswith(f"{name}.")}
        tokens.count(block, partial(_run_all, passes))
        yield Block(name, block, inside, passes)
        if number + 1 < len(blocks):
            recorder.advance(passes)
        recorder.calls[number].clear()
    tokens.tell()
    if rest and (names is not None or not blocks):
        model.to(device)
        passes = [Pass(partial(run, model, e), e.get("attention_mask")) for e in shown]
        yield Block("", model, rest, passes)
