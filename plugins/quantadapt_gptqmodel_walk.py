"""Show calibration examples to a model and quantize it block by block.

gptqmodel's own pipeline is not used for this: it reads models from disk only, knows them by name,
and its AWQ, which needs CUDA, looks at the last example alone where lengths differ. What is here
asks for no more than blocks that call each other, and works on a live module as on one from disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantadapt.loading import set_submodule
from quantadapt.protocols import AdapterTarget

Linears = dict[str, nn.Linear]
Examples = list[dict[str, Tensor]]


@dataclass
class Block:
    """A part of a model that is quantized at once.

    Attributes:
        module: a decoder layer, say; the model itself for layers outside of every list of blocks.
        linears: the linear layers in it that are to be quantized, by their names in the model.
        calls: what it was called with, once for each example.
        inputs: outputs of the block before, for the calls that take over one of them.
    """

    module: nn.Module
    linears: Linears
    calls: list[Call]
    inputs: list[Tensor]

    def run(self, count: int | None = None) -> Iterator[Any]:
        """Yield the output of each call."""
        for call in self.calls[:count]:
            yield self.module(*call.args(self.inputs), **call.kwargs(self.inputs))

    def run_all(self) -> None:
        """Run every call, for the hooks on the layers to see."""
        for _ in self.run():
            pass


@dataclass
class Call:
    """Arguments of one call; `_Output` stands for an output of the block before."""

    given: tuple[tuple[Any, ...], dict[str, Any]]

    def args(self, inputs: list[Tensor]) -> tuple[Any, ...]:
        """Return the positional arguments."""
        return tuple(_filled(value, inputs) for value in self.given[0])

    def kwargs(self, inputs: list[Tensor]) -> dict[str, Any]:
        """Return the keyword arguments."""
        return {name: _filled(value, inputs) for name, value in self.given[1].items()}


@dataclass
class _Output:
    index: int


def _filled(value: Any, inputs: list[Tensor]) -> Any:
    return inputs[value.index] if isinstance(value, _Output) else value


@torch.no_grad()
def walk(
    model: nn.Module,
    linears: Linears,
    examples: Examples,
    device: str,
    quantize: Callable[[Block], dict[str, nn.Module]],
    target: AdapterTarget,
) -> None:
    """Replace the layers of one block after the other, each on `device` and fed by what the
    quantized blocks before it make of `examples`. Afterwards all of the model is on `device`.

    Args:
        model: changed in place.
        linears: the layers to quantize, by name.
        examples: arguments of the model's forward.
        device: where to compute.
        quantize: returns vendor modules for the layers of a block.
        target: reads them.
    """
    blocks = _blocks(model, linears)
    training = model.training
    model.eval()
    inside = {part for block in blocks for part in block.module.modules()}
    _move(model.modules() if _fits(model, device) else set(model.modules()) - inside, device)
    _record(model, blocks, examples, device)
    inputs: list[Tensor] = []
    for number, block in enumerate(blocks, 1):
        _move(block.module.modules(), device)
        block.inputs = inputs
        vendors = _quantized(block, quantize, target)
        inputs = [first(output) for output in block.run()] if number < len(blocks) else []
        _put(model, block, vendors)
        block.calls, block.inputs = [], []
    done = {name for block in blocks for name in block.linears}
    if rest := {name: linear for name, linear in linears.items() if name not in done}:
        calls = [Call(((), _forward_kwargs(model, example, device))) for example in examples]
        block = Block(model, rest, calls, [])
        _put(model, block, quantize(block))
    model.train(training)


def _quantized(
    block: Block, quantize: Callable[[Block], dict[str, nn.Module]], target: AdapterTarget
) -> dict[str, nn.Module]:
    """Return the vendor modules for a block, and give its dense layers, which are quicker to run,
    the new weights."""
    dtypes = {name: linear.weight.dtype for name, linear in block.linears.items()}
    vendors = quantize(block) if block.linears else {}
    for name, vendor in vendors.items():
        block.linears[name].weight.data = target.dequantize(vendor).to(dtypes[name])
    return vendors


def _put(model: nn.Module, block: Block, vendors: dict[str, nn.Module]) -> None:
    for name, vendor in vendors.items():
        set_submodule(model, name, vendor.train(block.linears[name].training))


def _blocks(model: nn.Module, linears: Linears) -> list[Block]:
    """Return the members of the outermost module lists that hold layers to quantize."""
    blocks: list[Block] = []
    done: list[str] = []
    for list_name, modules in model.named_modules():
        outermost = not any(list_name.startswith(prefix) for prefix in done)
        if not isinstance(modules, nn.ModuleList) or not outermost:
            continue
        if not any(name.startswith(f"{list_name}.") for name in linears):
            continue
        done.append(f"{list_name}.")
        for name, module in modules.named_children():
            prefix = f"{list_name}.{name}."
            mine = {n: linear for n, linear in linears.items() if n.startswith(prefix)}
            blocks.append(Block(module, mine, [], []))
    return blocks


def _record(model: nn.Module, blocks: list[Block], examples: Examples, device: str) -> None:
    """Note what each block is called with. A block is on `device` while it computes."""
    last: tuple[Block | None, Any] = None, None
    at_home: list[tuple[Tensor, Tensor]] = []

    def enter(block: Block, previous: Block | None) -> Callable[..., None]:
        def noted(value: Any) -> Any:
            if previous is not None and last[0] is previous and last[1] is value:
                return _Output(len(previous.calls) - 1)
            return None if "Cache" in type(value).__name__ else value

        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            at_home[:] = [(tensor, tensor.data) for tensor in _tensors(module.modules())]
            _move(module.modules(), device)
            given = {name: noted(value) for name, value in kwargs.items()}
            block.calls.append(Call((tuple(noted(value) for value in args), given)))

        return hook

    def leave(block: Block) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal last
            last = block, first(output)
            for tensor, data in at_home:
                tensor.data = data

        return hook

    with ExitStack() as hooks:
        for previous, block in zip([None, *blocks], blocks, strict=False):
            entered, module = enter(block, previous), block.module
            hooks.callback(module.register_forward_pre_hook(entered, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(leave(block)).remove)
        for example in examples:
            model(**_forward_kwargs(model, example, device))


def _forward_kwargs(model: nn.Module, example: dict[str, Tensor], device: str) -> dict[str, Any]:
    kwargs: dict[str, Any] = {name: value.to(device) for name, value in example.items()}
    config = getattr(model, "config", None)
    if hasattr(config, "use_cache"):
        kwargs["use_cache"] = False
    if getattr(config, "is_encoder_decoder", False) and "input_ids" in kwargs:
        kwargs.setdefault("decoder_input_ids", kwargs["input_ids"])
    return kwargs


def first(output: Any) -> Any:
    """Return what a block hands on to the next one."""
    return output[0] if isinstance(output, (tuple, list)) else output


def _fits(model: nn.Module, device: str) -> bool:
    """Say whether all of the model may be on `device`, with as much again for what is computed;
    else its blocks come there one at a time, which is slower."""
    if torch.device(device).type != "cuda":
        return True
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return 2 * size < torch.cuda.mem_get_info(device)[0]


def _tensors(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    for module in modules:
        for tensors in (module._parameters, module._buffers):
            yield from (tensor for tensor in tensors.values() if tensor is not None)


def _move(modules: Iterable[nn.Module], device: str) -> None:
    for tensor in _tensors(modules):
        tensor.data = tensor.data.to(device)
