"""What stays dense while a model is quantized: the head, routers, and what sees pictures."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from torch import nn

from .experts import experts_in
from .linears import is_linear
from .towers import LANGUAGE, other_towers

_ROUTER = re.compile(r"[._](gate|router)(\.|$)")


def skipped_modules(model: nn.Module, skip: tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the names that stay dense: `skip`, or what does by default; and the routers of
    mixtures of experts."""
    left = dense_by_default(model) if skip is None else skip
    return (*left, *(name for name in routers(model) if name not in left))


def dense_by_default(
    model: nn.Module,
    skip: tuple[str, ...] | None = None,
    towers: Collection[str] = (LANGUAGE,),
) -> tuple[str, ...]:
    """Return `skip`, or the head and linear layers tied to it; and the towers of an image-text
    model that are not among `towers`."""
    left = heads(model) if skip is None else skip
    return tuple(dict.fromkeys([*left, *other_towers(model, towers)]))


def heads(model: nn.Module) -> tuple[str, ...]:
    """Return the head, and linear layers tied to it."""
    if not hasattr(model, "get_output_embeddings"):
        return tuple(_tied_linears(model))  # no transformers model
    from transformers.quantizers.base import get_keys_to_not_convert

    head = set(get_keys_to_not_convert(model))
    base: nn.Module = model.base_model  # type: ignore[assignment]
    if base is not model and not model.can_generate():  # type: ignore[operator]
        # A classifier: all that it has beside the encoder or decoder.
        head |= {name for name, child in model.named_children() if child is not base}
    modules = dict(model.named_modules())  # norms and embeddings are dense in any case
    return tuple(
        name
        for name in sorted(head & modules.keys())
        if any(map(is_linear, modules[name].modules()))
    )


def _tied_linears(model: nn.Module) -> Iterator[str]:
    """Yield the names of linear layers whose weight is that of another module, say an embedding."""
    modules = dict(model.named_modules())
    others = {
        id(parameter)
        for module in modules.values()
        if not is_linear(module)
        for parameter in module._parameters.values()
    }
    for name, module in modules.items():
        if is_linear(module) and id(module.weight) in others:
            yield name


def routers(model: nn.Module) -> list[str]:
    """Return the linear layers that choose between experts, or weigh one: they stand beside the
    experts, have an output for each of them or a single one, and are called so."""
    found = []
    for name, experts in model.named_modules():
        if count := experts_in(experts):
            block = name.rpartition(".")[0]
            for inner, module in model.get_submodule(block).named_modules(prefix=block):
                outputs = getattr(module, "out_features", None)
                if outputs in (1, count) and _ROUTER.search(inner.removeprefix(block)):
                    found.append(inner)
    return list(dict.fromkeys(found))
