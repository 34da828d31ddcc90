"""Weights that layers share, such as an embedding and the head that is tied to it, and what becomes
of them once a merge has made them differ."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..facade import facades


def tied_groups(model: nn.Module) -> list[tuple[str, ...]]:
    """Return the parameters that transformers ties, group by group, the one that it saves first.

    Names are those of the model without any adapter. None where a layer of them is quantized: it
    has a weight of its own.
    """
    expanded: Callable[..., dict[str, str]] | None
    expanded = getattr(model, "get_expanded_tied_weights_keys", None)
    if expanded is None:
        return []
    quantized = tuple(f"{name}." for name, _ in facades(model))
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    groups: dict[str, list[str]] = {}
    for target, source in expanded(all_submodels=True).items():
        groups.setdefault(source, [source]).append(target)
    found = [[n for n in group if n in known and not n.startswith(quantized)]
             for group in groups.values()]  # fmt: skip
    return [tuple(group) for group in found if len(group) > 1]


def all_equal(tensors: Sequence[Tensor]) -> bool:
    """Say whether tensors hold the same numbers."""
    first = tensors[0]
    return all(other is first or torch.equal(other, first) for other in tensors[1:])


def settle_ties(model: nn.Module) -> None:
    """Tie what a merge has left equal; where something differs, untie all, in the config too.

    A file holds one tensor for tied layers, and its config says that they are; both have to be of
    the merged model.
    """
    groups, parameters = tied_groups(model), dict(model.named_parameters(remove_duplicate=False))
    if all(all_equal([parameters[name] for name in group]) for group in groups):
        for first, *others in groups:
            for name in others:
                _put(model, name, parameters[first])
        return
    for name in [name for group in groups for name in group]:
        value = parameters[name]
        _put(model, name, nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad))
    untie(model.config)


def untie(config: Any) -> bool:
    """Have a config say that nothing is tied; return whether it can. T5's cannot: it ties whatever
    its file does not hold, and takes `tie_word_embeddings` for something else."""
    can = False
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        if getattr(part, "tie_word_embeddings", False):
            values = {**copy.deepcopy(part.to_dict()), "tie_word_embeddings": False}
            if not type(part).from_dict(values).tie_word_embeddings:
                part.tie_word_embeddings, can = False, True
    return can


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, key = name.rpartition(".")
    setattr(model.get_submodule(owner), key, parameter)
