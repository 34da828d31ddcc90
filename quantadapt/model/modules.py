"""What a model is made of: its linear layers, its decoder blocks, and what is left dense."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn


def skipped_modules(model: nn.Module, skip: tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the names that stay dense: `skip`, or the output head and what is tied to it."""
    if skip is not None:
        return skip
    if not hasattr(model, "get_output_embeddings"):
        return ()  # no transformers model
    from transformers.quantizers.base import get_keys_to_not_convert

    return tuple(get_keys_to_not_convert(model))


def linear_layers(model: nn.Module, skip: tuple[str, ...]) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the plain linear layers that are to be quantized."""
    for name, module in model.named_modules():
        if type(module) is nn.Linear and not is_skipped(name, skip):
            yield name, module


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
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
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
