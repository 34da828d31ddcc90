"""What an adapter's targets come to in a model: the modules that PEFT would adapt, and what is
wrong with them. Looks at names and sizes alone, as `targets` does."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from ..capabilities import KEEP
from ..errors import Problem
from ..facade import QuantLinear
from ..inputs.likely_names import did_you_mean
from ..planning.names import ends, module_target_problems, router_problems
from .injecting import matched
from .targets import all_parameters

if TYPE_CHECKING:
    from peft import PeftConfig

_OF_SINGULAR_VECTORS = ("pissa", "olora", "corda", "orthogonal", "mica", "lora_ga", "loftq")
"""Starts of LoRA that take a singular vector for each rank; a longer name may follow."""


def adapted_problems(
    model: nn.Module,
    config: PeftConfig,
    layers: list[str],
    stacks: list[str],
    *,
    start: Any = None,
    own_method: bool = False,
    embeddings: bool = False,
) -> list[Problem]:
    """Return what is wrong with the modules that `config` comes to.

    Args:
        layers, stacks: the linear layers and stacks of experts that may be named instead.
        start: what `init_lora_weights` says.
        own_method: whether PEFT does not ship the method, which may adapt anything.
        embeddings: whether it goes onto embeddings.
    """
    chosen = {name: model.get_submodule(name) for name in matched(model, config)}
    parameters = getattr(config, "target_parameters", None) or ()
    adapted = [*chosen, *(n for n in all_parameters(model) if any(ends(n, p) for p in parameters))]
    found: list[Problem] = []
    if not own_method:
        routers = [name for name, module in chosen.items() if _is_router(module)]
        others = [n for n in _no_layers(chosen, [*layers, *stacks]) if n not in routers]
        if not embeddings:
            others += [name for name, m in chosen.items() if isinstance(m, nn.Embedding)]
        found = module_target_problems(others, layers, stacks) + router_problems(routers)
    found += _layer_problems(model, config)
    for option in ("rank_pattern", "alpha_pattern"):
        found += _pattern_problems(option, getattr(config, option, None) or {}, adapted)
    if isinstance(start, str):
        found += _rank_problems(start, config, chosen)
    found += _conv1d_problems(config, chosen)
    found += [_named_twice(p, n) for p in parameters for n in chosen if ends(f"{n}.weight", p)]
    if not (found or chosen or parameters):
        what = "nothing is left to adapt: what is named is excluded, or trained whole"
        fix = "look at target_modules, exclude_modules and modules_to_save"
        found.append(Problem(what, fix, "adapter.target_modules"))
    return found


def _is_router(module: nn.Module) -> bool:
    """Say whether a module chooses experts, and is a parameter and no layer."""
    return "Router" in type(module).__name__


def _named_twice(parameter: str, layer: str) -> Problem:
    what = f"target_modules names {layer}, so {parameter} is adapted already"
    fix = "name it in one place; target_modules is the same for a linear layer, and faster"
    return Problem(what, fix, "adapter.target_parameters")


def bias_problem(model: nn.Module, config: Any) -> Problem | None:
    """Return what keeps an adapter with `lora_bias` from being merged: layers without a bias."""
    if not getattr(config, "lora_bias", False):
        return None
    named = ((name, model.get_submodule(name)) for name in matched(model, config))
    return lost_biases([name for name, layer in named if getattr(layer, "bias", None) is None])


def lost_biases(without: list[str]) -> Problem | None:
    """Return why an adapter with `lora_bias` cannot be merged into the layers called so, none of
    which has a bias; None where there is no such layer."""
    if not without:
        return None
    what = f"lora_bias trains a bias for layers that have none, e.g. {without[0]}"
    return Problem(what, f"{KEEP}, or train without lora_bias", "adapter.lora_bias", "lora-bias")


def _no_layers(chosen: Mapping[str, nn.Module], known: Iterable[str]) -> Iterator[str]:
    """Yield what is named and no layer: it holds some of the `known` ones or others, or vectors
    alone."""
    known = [*known]
    for name, module in chosen.items():
        own = [*module.parameters(recurse=False)]
        vectors = bool(own) and all(parameter.ndim < 2 for parameter in own)
        parts = any(next(child.parameters(), None) is not None for child in module.children())
        holds = any(other.startswith(f"{name}.") for other in known)
        layer = isinstance(module, (nn.Linear, QuantLinear, nn.MultiheadAttention))
        if not layer and (vectors or parts or holds):
            yield name


def _layer_problems(model: nn.Module, config: Any) -> Iterator[Problem]:
    """Yield what is wrong with `layers_to_transform` and `layers_pattern`."""
    wanted = getattr(config, "layers_to_transform", None)
    if wanted is None or wanted == [] or isinstance(config.target_modules, str):
        return
    given = getattr(config, "layers_pattern", None) or []
    patterns = [given] if isinstance(given, str) else given
    targets = [
        n for n, _ in model.named_modules() if any(ends(n, t) for t in config.target_modules)
    ]
    counted = {(m[1], int(m[2])) for n in targets if (m := re.match(r".*?([^.]+)\.(\d+)\.", n))}
    known = sorted({stack for stack, _ in counted})
    if patterns:
        if not any(re.fullmatch(p, stack) for p in patterns for stack in known):
            what = f"no layers are called {', '.join(map(repr, patterns))}"
            yield Problem(what, did_you_mean(patterns[0], known), "adapter.layers_pattern")
            return
        counted = {(s, i) for s, i in counted if any(re.fullmatch(p, s) for p in patterns)}
    there = {index for _, index in counted}
    asked = [wanted] if isinstance(wanted, int) else wanted
    if missing := [index for index in asked if index not in there]:
        what = f"there is no layer {', '.join(map(str, missing))} that is named"
        fix = f"use {min(there)} to {max(there)}" if there else "leave it out: no layer is counted"
        yield Problem(what, fix, "adapter.layers_to_transform")


def _pattern_problems(
    option: str, patterns: Mapping[str, Any], names: list[str]
) -> Iterator[Problem]:
    for key in patterns:
        if not any(_of_pattern(key, name) for name in names):
            known = sorted({name.rpartition(".")[2] for name in names})
            what = f"{key!r} matches no layer that is adapted"
            yield Problem(what, f"adapted are {', '.join(known)}", f"adapter.{option}")


def _of_pattern(key: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", name) is not None  # as PEFT does


def _conv1d_problems(config: Any, chosen: Mapping[str, nn.Module]) -> Iterator[Problem]:
    """Yield a problem where PEFT would read the adapter otherwise in the model's own class, without
    a word: it takes a `Conv1D`, which keeps its weight transposed, as it is."""
    name = next((name for name, module in chosen.items() if getattr(module, "conv1d", False)), "")
    what = f"{name} is a Conv1D in the model's own class: PEFT alone reads"
    if name and config.peft_type == "OSF":
        yield Problem(f"{what} OSF there as something else", "use another adapter", "adapter")
    elif name and getattr(config, "init_lora_weights", None) == "olora":
        fix, where = "use pissa, which is started alike", "adapter.init_lora_weights"
        yield Problem(f"{what} the start olora there as something else", fix, where)


def _rank_problems(start: str, config: Any, chosen: Mapping[str, nn.Module]) -> Iterator[Problem]:
    """Yield a problem for the first layer that has fewer singular vectors than ranks are wanted,
    and where there is nothing to take them of."""
    if not start.startswith(_OF_SINGULAR_VECTORS):
        return
    if start == "lora_ga" and not any(hasattr(m, "_peft_loraga_grad") for m in chosen.values()):
        what = "LoRA-GA starts from gradients, and none were taken"
        fix = "call PEFT's preprocess_loraga first, or use init_lora_weights: true"
        yield Problem(what, fix, "adapter.init_lora_weights")
    for name, module in chosen.items():
        if not isinstance(module, (nn.Linear, QuantLinear)):
            continue
        key = next((k for k in config.rank_pattern or {} if _of_pattern(k, name)), None)
        rank = config.r if key is None else config.rank_pattern[key]
        side = min(module.in_features, module.out_features)
        if rank > side:
            what = f"{start} needs a singular vector for each rank; {name} has {side}, not {rank}"
            fix = f"use {side} or less, or init_lora_weights: true"
            where = "adapter.r" if key is None else f"adapter.rank_pattern.{key}"
            yield Problem(what, fix, where)
            return
