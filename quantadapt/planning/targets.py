"""Why an adapter does not go where its options say: names that no layer has, routers, and stacks
of experts that it does not go onto. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import Problem
from ..records import Adapter
from .layers import Layers
from .names import (
    TARGETS,
    ends,
    is_all_linear,
    module_problems,
    module_target_problems,
    names_stack,
    parameter_problems,
    router_problems,
    stacks_left,
    target_problems,
)
from .peft_options import peft_options
from .refusals import wants_loftq

EXCLUDED = "adapter.exclude_modules"
_ON_EMBEDDINGS = ("HIRA", "LORA", "OFT", "TINYLORA")
"""PEFT's methods that go onto embeddings; LoftQ compares weights of layers."""
_NOT_ON_EXPERTS = {
    "lora_dropout": "has no dropout on stacks of experts",
    "lora_bias": "has no bias on stacks of experts",
    "velora_config": "has no VeLoRA on stacks of experts",
    "kasa_config": "has no KaSA on stacks of experts",
}
"""Options of LoRA that PEFT does not take for parameters."""


def on_embeddings(adapter: Adapter, options: Mapping[str, Any]) -> bool:
    """Say whether an adapter goes onto embeddings, too, where one is named."""
    return adapter.peft_type in _ON_EMBEDDINGS and not wants_loftq(options)


def experts_problems(
    adapter: Adapter, options: Mapping[str, Any], layers: Iterable[str] = ()
) -> list[Problem]:
    """Return why an adapter does not go onto stacks of experts; empty if it does.

    Args:
        layers: the linear layers that it can go onto.
    """
    rule = f"{adapter.name}-experts"
    without = "leave them out, exclude_modules: [experts]"
    if "exclude_modules" not in peft_options(adapter):
        names = ", ".join(sorted({name.rpartition(".")[2] for name in layers}) or ["q_proj", "..."])
        without = f"name the layers, target_modules: [{names}]"
    if not adapter.experts:
        what = f"{adapter.name} adapts layers alone, and the model's experts are stacked parameters"
        return [Problem(what, f"{without}; or use lora", TARGETS, rule)]
    found = [
        Problem(f"PEFT {why}", f"leave {name} out, or {without}", f"adapter.{name}", rule)
        for name, why in _NOT_ON_EXPERTS.items()
        if options.get(name)
    ]
    start = options.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() != "gaussian":
        what = f"{start} starts from the weights of layers, not of stacked experts"
        fix = f"use init_lora_weights: true, or {without}"
        found.append(Problem(what, fix, "adapter.init_lora_weights", rule))
    return found


def named_problems(
    adapter: Adapter, options: Mapping[str, Any], layers: Layers, skip: Iterable[str] = ()
) -> list[Problem]:
    """Return what an adapter's options name and `layers` has not, and why it does not go onto the
    stacks of experts that they name.

    Args:
        skip: what is left dense, so that "all-linear" leaves it out.
    """
    wanted, found = options.get("target_modules"), []
    left = stacks_left(layers.stacks, options)
    if is_all_linear(wanted):
        named = [name for name in left if name in layers.without(skip)]
    elif not layers.names:
        return []
    else:
        found = _target_problems(wanted, options.get("target_parameters"), layers)
        if not (found or adapter.method):  # a plugin's may go onto anything
            others = (
                *layers.others,
                *(() if on_embeddings(adapter, options) else layers.embeddings),
            )
            others = tuple(name for name in others if _names(wanted, name))
            found = module_target_problems(others, layers.linears, layers.stacks)
        named = _named_stacks(wanted, left, layers)
    if layers.names:
        found += parameter_problems(layers.parameters, options.get("target_parameters"))
        # No file tells of modules without parameters: what is like no other name may be one.
        said = module_problems(layers.names, options)
        found += [p for p in said if p.where != EXCLUDED or p.fix.startswith("did you mean")]
    return found + (experts_problems(adapter, options, layers.linears) if named else [])


def _target_problems(wanted: Any, parameters: Any, layers: Layers) -> list[Problem]:
    if wanted == [] and parameters:
        return []
    there: Any = wanted
    if not isinstance(wanted, str):
        names = layers.names
        there = [
            target
            for target in wanted
            if target.rpartition(".")[2] not in layers.parts or any(ends(n, target) for n in names)
        ]
        if wanted and not there:
            return []
    found = target_problems(layers.names, there, [*layers.linears, *layers.stacks])
    return found + router_problems(name for name in layers.routers if _names(wanted, name))


def _named_stacks(wanted: Any, stacks: Iterable[str], layers: Layers) -> list[str]:
    """Return those of `stacks` that are named; what layers are called, too, stands for those."""
    if isinstance(wanted, str):
        return [name for name in stacks if names_stack(wanted, name)]
    modules = [*layers.linears, *layers.routers]
    parts = [layers.parts.get(target.rpartition(".")[2], target) for target in wanted]
    both = zip(wanted, parts, strict=True)
    own = [part for target, part in both if not any(ends(name, target) for name in modules)]
    return [name for name in stacks if names_stack(own, name)]


def _names(wanted: Any, name: str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(ends(name, target) for target in wanted)
