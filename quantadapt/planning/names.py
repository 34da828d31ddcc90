"""How an adapter's options name layers and stacks of experts, and what is said of names that
nothing has. Pure: looks at names alone, whether a model has them or the files of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import Problem
from ..inputs.likely_names import did_you_mean

ALL_LINEAR = "all-linear"
TARGETS = "adapter.target_modules"


def ends(name: str, ending: str) -> bool:
    """Say whether `ending` is the last parts of `name`, which is how PEFT compares them."""
    return f".{name}".endswith(f".{ending}")


def is_all_linear(wanted: Any) -> bool:
    """Say whether `target_modules` stands for every quantized layer."""
    return wanted is None or (isinstance(wanted, str) and wanted.lower() == ALL_LINEAR)


def is_in_layers(options: Mapping[str, Any]) -> Callable[[str], bool]:
    """Return what says whether a stack is in one of `layers_to_transform`, which PEFT looks at for
    modules alone."""
    wanted = options.get("layers_to_transform")
    if wanted is None or wanted == []:
        return lambda name: True
    layers = {wanted} if isinstance(wanted, int) else set(wanted)
    given = options.get("layers_pattern") or []
    patterns = "|".join([given] if isinstance(given, str) else given) or r"[^.]*"
    counted = re.compile(rf"(?:^|.*?\.)(?:{patterns})\.(\d+)\.")
    return lambda name: (found := counted.match(name)) is not None and int(found[1]) in layers


def stacks_left(stacks: Iterable[str], options: Mapping[str, Any]) -> list[str]:
    """Return the `stacks` that no option leaves out."""
    excluded, layer = options.get("exclude_modules"), is_in_layers(options)
    left = [n for n in stacks if not (_is_excluded(n, excluded) or _is_trained_whole(n, options))]
    return [name for name in left if layer(name)]


def _is_excluded(name: str, excluded: str | Iterable[str] | None) -> bool:
    """Say whether `exclude_modules` names a stack of experts, or the module that owns it."""
    if not excluded:
        return False
    return names_stack(excluded if isinstance(excluded, str) else list(excluded), name)


def _is_trained_whole(name: str, options: Mapping[str, Any]) -> bool:
    """Say whether `modules_to_save` names a module that a stack of experts is in."""
    whole = options.get("modules_to_save") or ()
    return any(re.match(rf"(.*\.)?({module})($|\..*)", name) for module in whole)  # as PEFT does


def names_stack(wanted: str | list[str], stack: str) -> bool:
    """Say whether a stack, or the module that owns it, is named."""
    both = (stack, stack.rpartition(".")[0])
    if isinstance(wanted, str):
        return any(re.fullmatch(wanted, name) for name in both)
    return any(ends(name, ending) for ending in wanted for name in both)


def target_problems(
    names: Iterable[str], targets: str | list[str], known: Iterable[str]
) -> list[Problem]:
    """Return what of `target_modules` matches nothing.

    Args:
        names: full names of all modules and stacks of experts.
        known: those that may be named instead.
    """
    names, endings = [*names], _endings(known)
    if isinstance(targets, str):
        if any(re.fullmatch(targets, name) for name in names):
            return []
        parts = [part.strip() for part in targets.strip("[]").split(",")]
        if all(any(ends(name, part) for name in names) for part in parts):
            what = f"{targets!r} is text, so a regular expression for whole names; none matches"
            return [Problem(what, f"write a list: [{', '.join(parts)}]", TARGETS)]
        what = f"no layer of the model matches {targets!r}"
        return [Problem(what, _hint(targets, endings), TARGETS)]
    if not targets:
        what = "it names no layer"
        return [Problem(what, f"use {ALL_LINEAR}, or some of {', '.join(endings)}", TARGETS)]
    return [
        Problem(f"no layer of the model matches {target!r}", _hint(target, endings), TARGETS)
        for target in targets
        if not any(ends(name, target) for name in names)
    ]


def _endings(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _hint(name: str, known: list[str]) -> str:
    hint, layers = did_you_mean(name, known), ", ".join(known)
    return f"name one of its layers: {layers}" if layers in hint else f"{hint} (layers: {layers})"


def module_target_problems(
    chosen: Iterable[str], layers: Iterable[str], stacks: Iterable[str]
) -> list[Problem]:
    """Return a problem for each kind of module among `chosen`, full names of targets that are no
    layers: they hold some, or nothing that an adapter goes onto.

    Args:
        layers, stacks: full names of the linear layers and stacks of experts to name instead.
    """
    found: dict[str, Problem] = {}
    named = [*layers, *(stack.removesuffix(".weight") for stack in stacks)]
    for name in chosen:
        kind, inside = name.rpartition(".")[2], [n for n in named if n.startswith(f"{name}.")]
        what = f"target_modules names {kind}, which is no layer that the adapter goes onto"
        fix = "leave it out; modules_to_save trains a module whole"
        if inside:
            what = f"{name} is no layer, but a module of several"
            fix = f"name its layers: {', '.join(_endings(inside))}"
        found.setdefault(kind, Problem(what, fix, TARGETS))
    return [*found.values()]


def router_problems(routers: Iterable[str]) -> list[Problem]:
    """Return a problem for each kind of router among `routers`, full names that are targets: they
    hold a weight, and are no layers."""
    found = []
    for kind in _endings(routers):
        what = f"{kind} is the router of experts, a parameter and no layer"
        weight = f"target_parameters: [{kind}.weight]"
        fix = f"name its weight, {weight}, or train it whole, modules_to_save: [{kind}]"
        found.append(Problem(what, fix, TARGETS, "no-routers"))
    return found


def module_problems(names: Iterable[str], options: Mapping[str, Any]) -> list[Problem]:
    """Return what of `exclude_modules` and `modules_to_save` matches none of `names`."""
    names = [*names]
    known = [n for n in _endings(names) if not n.isdigit()]
    found = []
    for option in ("exclude_modules", "modules_to_save"):
        wanted = options.get(option) or ()
        if isinstance(wanted, str):
            missing = [] if any(re.fullmatch(wanted, name) for name in names) else [wanted]
        else:
            missing = [w for w in wanted if not any(ends(name, w) for name in names)]
        for one in missing:
            what = f"no module of the model matches {one!r}"
            found.append(Problem(what, did_you_mean(one, known), f"adapter.{option}"))
    return found


def parameter_problems(names: Iterable[str], wanted: Iterable[str] | None) -> list[Problem]:
    """Return what of `target_parameters` matches none of `names`, those of all parameters."""
    names = [*names]
    known = sorted({".".join(name.split(".")[-2:]) for name in names})
    return [
        Problem(
            f"no parameter of the model matches {one!r}",
            did_you_mean(one, known),
            "adapter.target_parameters",
        )
        for one in wanted or ()
        if not any(ends(name, one) for name in names)
    ]
