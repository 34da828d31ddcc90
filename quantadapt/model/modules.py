"""What a model is made of: its linear layers, its decoder blocks, and what is left dense."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from .linears import as_conv1d, as_linear, is_linear, other_linears


def not_converted(model: nn.Module, skip: tuple[str, ...]) -> tuple[str, ...]:
    """Return the linear layers that transformers' loaders of quantized checkpoints take for dense,
    beside those of `skip`: what the model's class wants in float32 (`wo` of T5), and what a name in
    `skip` happens to match."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    patterns = [*skip, *(getattr(model, "_keep_in_fp32_modules", None) or ())]
    layers = (name for name, _ in linear_layers(model, skip))
    return tuple(name for name in layers if not should_convert_module(name, patterns))


def wanted_dtype(model: nn.Module, dtype: torch.dtype) -> Callable[[str], torch.dtype]:
    """Return what says for the name of a dense parameter which dtype transformers gives it where a
    checkpoint is loaded in `dtype`: some classes want float32 for some."""
    wanted = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        wanted |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if not wanted or dtype not in (torch.float16, torch.bfloat16):
        return lambda name: dtype
    kept = re.compile("|".join(pattern.replace("*", ".*") for pattern in sorted(wanted)))
    return lambda name: torch.float32 if kept.search(name) else dtype


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Give the parameters that are floats `dtype`, in place; buffers keep theirs."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def linear_layers(model: nn.Module, skip: tuple[str, ...]) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the dense linear layers that are to be quantized, each as `nn.Linear`: itself, or one
    over the same tensors."""
    for name, module in model.named_modules():
        if is_linear(module) and not is_skipped(name, skip):
            yield name, as_linear(module)


def make_linear(model: nn.Module, skip: tuple[str, ...] = ()) -> nn.Module:
    """Put an `nn.Linear` in the place of each linear layer that is none, in place: for backends
    that look for that class alone."""
    for name, module in list(other_linears(model)):
        if not is_skipped(name, skip):
            set_submodule(model, name, as_linear(module))
    return model


def in_own_layout(model: nn.Module, conv1d: Iterable[str]) -> nn.Module:
    """Put a `Conv1D` in the place of each `nn.Linear` that is named, in place: the model's own
    class has one there, and so has its checkpoint."""
    for name in conv1d:
        if type(module := model.get_submodule(name)) is nn.Linear:
            set_submodule(model, name, as_conv1d(module))
    return model


def set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at `name` and tell transformers that it needs no initialization."""
    for part in module.modules():
        part._is_hf_initialized = True  # type: ignore[assignment]
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    setattr(parent, child, module)
    # Some (T5) initialize the weights of their children, others (GPT-J) buffers that no file holds.
    if not parent._parameters and not parent._buffers:
        parent._is_hf_initialized = True  # type: ignore[assignment]


def is_skipped(name: str, skip: tuple[str, ...]) -> bool:
    """Say whether module `name` is one of `skip`, lies below one, or ends in one."""
    return any(f".{s}." in f".{name}." for s in skip)


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module] | None:
    """Return name -> block, where the linear layers stand in one list of blocks, else None."""
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or is_linear(module)
    ]
    found = stacks(model, linears)
    return found[0] if len(found) == 1 else None


def stacks(model: nn.Module, linears: Iterable[str]) -> list[dict[str, nn.Module]]:
    """Return the outermost lists of modules that hold some of `linears`, as name -> member."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in found)
        holds = any(linear.startswith(f"{name}.") for linear in linears)
        if isinstance(module, nn.ModuleList) and holds and not nested:
            found[name] = module
    return [
        {f"{name}.{index}": block for index, block in enumerate(blocks)}
        for name, blocks in found.items()
    ]
