"""The towers of a model that reads more than text: which of its modules are of the language model,
which see pictures, and which stand between. The model itself is asked, as transformers lets it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

from .linears import is_linear

LANGUAGE, VISION, PROJECTOR, AUDIO = "language", "vision", "projector", "audio"
Towers = Mapping[str, tuple[str, ...]]
"""Tower -> names of its outermost modules. They do not overlap."""


def towers_of(model: Any) -> Towers:
    """Return the towers of a model; empty for one that reads text alone, and for encoder-decoders.

    The projector turns what a tower sees into hidden states of the language model. Where it is a
    part of the vision tower (`visual.merger` of Qwen-VL), it is found by what it gives.
    """
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    if text is config or getattr(config, "is_encoder_decoder", False):
        return {}
    if not hasattr(model, "get_encoder") or (decoder := model.get_decoder()) in (
        model,
        model.base_model,
    ):
        return {}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    seen = {VISION: _encoder(model, "image"), AUDIO: _encoder(model, "audio")}
    if not any(seen.values()):
        return {}
    names = {module: name for name, module in model.named_modules()}
    found = {LANGUAGE: tuple(names[m] for m in (decoder, head) if m in names)}
    found |= {tower: (names[module],) for tower, module in seen.items() if module is not None}
    known = {decoder, head, *seen.values()} - {None}
    beside = tuple(names[module] for module in _beside(model, known))
    vision: Any = seen[VISION]
    if beside:
        found[PROJECTOR] = beside
    elif vision is not None:
        width = getattr(text, "hidden_size", 0)
        inner = [part for part in vision.children() if _gives(part, width)]
        rest = [part for part in vision.children() if part not in inner and _holds_weights(part)]
        if inner and rest and not any(True for _ in vision.parameters(recurse=False)):
            found[VISION] = tuple(names[part] for part in rest)
            found[PROJECTOR] = tuple(names[part] for part in inner)
    return found


def other_towers(model: nn.Module, chosen: Collection[str] = (LANGUAGE,)) -> tuple[str, ...]:
    """Return the modules of the towers that are not `chosen`; none of a model without towers."""
    towers = towers_of(model)
    return tuple(name for tower, names in towers.items() if tower not in chosen for name in names)


def _encoder(model: Any, modality: str) -> nn.Module | None:
    """Return the tower for "image" or "audio", if there is one."""
    found = model.get_encoder(modality=modality)
    none = found is model or found is model.base_model or not isinstance(found, nn.Module)
    return None if none or not _holds_weights(found) else found


def _beside(module: nn.Module, known: Collection[Any]) -> Iterator[nn.Module]:
    """Yield the outermost modules with weights that are neither among `known` nor hold one."""
    for child in module.children():
        if child in known or not _holds_weights(child):
            continue
        if any(part in known for part in child.modules()):
            yield from _beside(child, known)
        else:
            yield child


def _holds_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _gives(part: nn.Module, width: int) -> bool:
    """Say whether a part of a tower ends in hidden states of the language model, and is not the
    stack of the tower's own blocks."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    modules = list(part.modules())
    blocks = any(isinstance(module, GradientCheckpointingLayer) for module in modules)
    layers: list[Any] = [module for module in modules if is_linear(module)]
    return not blocks and any(layer.out_features == width for layer in layers)
