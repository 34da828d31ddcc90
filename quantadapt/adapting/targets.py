"""What an adapter's options name in a model: layers, patterns for them, parameters and tokens.

Looks at names and sizes alone, so a model without weights (on the meta device) is as good, and what
is wrong is told before any work, all of it at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from ..errors import PlanRefused, Problem, warn
from ..facade import linear_facades, stack_facades
from ..inputs.likely_names import did_you_mean
from ..model.dense import skipped_modules
from ..model.experts import expert_stacks
from ..model.modules import is_skipped, linear_layers
from ..model.towers import towers_of
from ..planning.names import (
    TARGETS,
    ends,
    is_all_linear,
    module_problems,
    names_stack,
    parameter_problems,
    stacks_left,
    target_problems,
)
from ..quantizing.dense import nothing_quantized
from .expert_names import EXPERTS, StacksWarning, parts_of_stacks, stack_endings


class Targets(NamedTuple):
    """What PEFT is to adapt.

    Attributes:
        modules: `target_modules`.
        stacks: full names of the stacks of experts among what is named.
        parameters: `target_parameters`: those, and what was asked for.
    """

    modules: list[str] | str
    stacks: list[str]
    parameters: list[str]


def resolve_targets(
    model: nn.Module, options: Mapping[str, Any], layers: list[str], stacks: list[str]
) -> Targets:
    """Return what `target_modules` and `target_parameters` come to.

    Args:
        layers: the linear layers that "all-linear" stands for.
        stacks: the stacks of experts that it stands for. Those, and others, are named as modules
            are.

    Raises:
        PlanRefused: one of `target_modules` matches nothing.
    """
    wanted = options.get("target_modules")
    asked = [*(options.get("target_parameters") or ())]
    if wanted is None or is_all_linear(wanted):
        if not layers and not stacks:
            raise nothing_quantized(model)
        there = stacks_left(stacks, options)
        return _targets(_endings(model, layers), there, stacks_in(model), asked)
    stacks = stacks_in(model)
    there = stacks_left(stacks, options)
    targets = _in_chosen_towers(model, wanted if isinstance(wanted, str) else list(wanted), layers)
    if not isinstance(targets, str) and stacks:
        targets = _of_parts(model, targets, stacks, there)
    if targets == [] and asked:
        return Targets([], [n for n in stacks if any(ends(n, a) for a in asked)], asked)
    names = [*(name for name, _ in model.named_modules()), *stacks]
    if problems := target_problems(names, targets, [*layers, *stacks]):
        raise PlanRefused(problems)
    if isinstance(targets, str):
        named = [n for n in there if names_stack(targets, n)]
        return _targets(_beside(model, targets, stacks), named, stacks, asked)
    owners = {name.rpartition(".")[0] for name in stacks}
    modules = [n for n, _ in model.named_modules() if n not in owners and n not in stacks]
    # Of a name that both have, as down_proj where experts are shared, it is the layers, as in PEFT.
    of_layers = [target for target in targets if any(ends(name, target) for name in modules)]
    of_stacks = [target for target in targets if target not in of_layers]
    only = [name for name in there if not names_stack(of_stacks, name)]
    if both := [name for name in only if names_stack(of_layers, name)]:
        text = f"target_modules names layers; {both[0]}, called the same, stays as it is"
        warn(f"{text}: add {EXPERTS!r} to adapt experts, too", StacksWarning, stacklevel=6)
    return _targets(of_layers, [n for n in there if names_stack(of_stacks, n)], stacks, asked)


def _in_chosen_towers(
    model: nn.Module, targets: str | list[str], layers: list[str]
) -> str | list[str]:
    """Return `targets` without what they name in towers of which nothing is quantized: layers of
    the vision tower are often called as those of the language model are.

    Raises:
        PlanRefused: some name nothing else.
    """
    towers = towers_of(model)
    outside = tuple(
        name
        for tower, names in towers.items()
        if not any(f"{layer}.".startswith(tuple(f"{n}." for n in names)) for layer in layers)
        for name in names
    )
    each = [targets] if isinstance(targets, str) else targets
    found = {target: _named(model, target, isinstance(targets, str)) for target in each}
    left = {t: [n for n in names if not is_skipped(n, outside)] for t, names in found.items()}
    if left == found:
        return targets
    if only := [target for target in found if found[target] and not left[target]]:
        what = f"{only[0]!r} names layers of a part of the model that stays as it is"
        fix = f"name layers of others, or set towers: {_towers_fix(towers, found[only[0]])}"
        raise PlanRefused([Problem(what, fix, TARGETS)])
    return [name for target in found for name in left[target] or [target]]


def _named(model: nn.Module, target: str, is_pattern: bool) -> list[str]:
    names = [name for name, _ in model.named_modules() if name]
    if is_pattern:
        return [name for name in names if re.fullmatch(target, name)]
    return [name for name in names if ends(name, target)]


def _towers_fix(towers: Mapping[str, tuple[str, ...]], names: list[str]) -> str:
    """Return the value of `towers` with which modules called `names` are chosen, too."""
    wanted = [t for t, modules in towers.items() if any(is_skipped(n, modules) for n in names)]
    return f"[{', '.join(dict.fromkeys(['language', *wanted]))}]"


def stacks_in(model: nn.Module, skip: tuple[str, ...] = ()) -> list[str]:
    """Return the names of the stacks of experts: the quantized ones, and those that are dense
    though they are not in `skip`."""
    names = [name for name, _ in stack_facades(model)]
    return names + [stack.name for stack in expert_stacks(model, skip)]


def _of_parts(
    model: nn.Module, targets: list[str], stacks: list[str], there: list[str]
) -> list[str]:
    """Return `targets` with stacks of experts in the place of names that only parts of them have:
    many lists name the layers of experts as checkpoints do."""
    names = [*(name for name, _ in model.named_modules()), *stacks]
    unknown = [target for target in targets if not any(ends(name, target) for name in names)]
    parts = parts_of_stacks(model, stacks) if unknown else {}
    found: dict[str, list[str]] = {}
    for target in unknown:
        if stack := parts.get(target.rpartition(".")[2]):
            found.setdefault(stack, []).append(target)
    adapted = {name.rpartition(".")[2] for name in there}
    for stack, named in found.items():
        if stack not in adapted:
            continue
        text = f"target_modules names {' and '.join(named)}, of which experts here are made as one"
        warn(f"{text}: {stack} is adapted, name that", StacksWarning, stacklevel=7)
    as_one = {target: stack for stack, named in found.items() for target in named}
    return list(dict.fromkeys(as_one.get(target, target) for target in targets))


def _beside(model: nn.Module, pattern: str, stacks: list[str]) -> str | list[str]:
    """Return a regular expression as it is, or where it matches modules that own stacks, which PEFT
    does not adapt, the other modules that it matches."""
    owners = tuple({name.rpartition(".")[0] for name in stacks})
    found = [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]
    inside = [n for n in found if n in owners or n.startswith(tuple(f"{o}." for o in owners))]
    return [name for name in found if name not in inside] if inside else pattern


def _targets(
    modules: list[str] | str, named: list[str], stacks: list[str], asked: list[str]
) -> Targets:
    named += [name for name in stacks if any(ends(name, a) for a in asked) and name not in named]
    covered = [name for name in named if not any(ends(name, ending) for ending in asked)]
    return Targets(modules, named, asked + stack_endings(covered, stacks))


def quantizable(model: nn.Module, skip: tuple[str, ...] | None) -> list[str]:
    """Return the names of the layers of a dense model that will be quantized."""
    return [name for name, _ in linear_layers(model, skipped_modules(model, skip))]


def quantizable_stacks(model: nn.Module, skip: tuple[str, ...] | None) -> list[str]:
    """Return the names of the stacks of experts of a dense model that will be quantized."""
    return [stack.name for stack in expert_stacks(model, skipped_modules(model, skip))]


def _endings(model: nn.Module, names: list[str]) -> list[str]:
    """Return the shortest name endings that match `names` and nothing else."""
    wanted = set(names)
    endings = {name.rpartition(".")[2] for name in names}
    found = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in endings}
    if found == wanted and not any(ending.isdigit() for ending in endings):
        return sorted(endings)
    return sorted(wanted)


# Options that name other things -------------------------------------------------------------------


def name_problems(model: nn.Module, options: Mapping[str, Any], stacks: list[str]) -> list[Problem]:
    """Return what is named by options beside `target_modules` and is not in `model`, whose stacks
    of experts are called `stacks`."""
    names = [*(name for name, _ in model.named_modules() if name), *stacks]
    found = parameter_problems(all_parameters(model), options.get("target_parameters"))
    found += _token_problems(model, options.get("trainable_token_indices"))
    found += _whole_problems(model, options)
    return found + module_problems(names, options)


def all_parameters(model: nn.Module) -> list[str]:
    """Return the names of all parameters, the quantized ones, too."""
    names = [name for name, _ in (*model.named_parameters(), *stack_facades(model))]
    return names + [f"{name}.weight" for name, _ in linear_facades(model)]


def _token_problems(model: nn.Module, wanted: Any) -> Iterator[Problem]:
    """Yield what is wrong with `trainable_token_indices`: ids, or the ids of each embedding."""
    where = "adapter.trainable_token_indices"
    if wanted is None:
        return
    embeddings = {n: m for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    if not isinstance(wanted, Mapping):
        embedding: Any = getattr(model, "get_input_embeddings", lambda: None)
        yield from _id_problems(wanted, embedding(), where)
        return
    for name, ids in wanted.items():
        there = [module for key, module in embeddings.items() if ends(key, name)]
        if not there:
            known = sorted({key.rpartition(".")[2] for key in embeddings})
            yield Problem(f"the model has no embedding {name!r}", did_you_mean(name, known), where)
        else:
            yield from _id_problems(ids, there[0], f"{where}.{name}")


def _whole_problems(model: Any, options: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what is trained whole of which single tokens are trained, too, or of what is tied to
    it: PEFT fails, and does not say why."""
    tokens, whole = options.get("trainable_token_indices"), options.get("modules_to_save") or ()
    if not tokens or isinstance(whole, str):
        return
    named = tokens if isinstance(tokens, Mapping) else ()
    modules = dict(model.named_modules())
    first = getattr(model, "get_input_embeddings", lambda: None)()
    parts = [m for n, m in modules.items() if any(ends(n, name) for name in named)] or [first]
    text = getattr(getattr(model, "config", None), "get_text_config", lambda: None)()
    if first in parts and getattr(text, "tie_word_embeddings", False):
        parts.append(model.get_output_embeddings())
    for name, module in modules.items():
        if module in parts and any(ends(name, each) for each in whole):
            what = f"modules_to_save trains {name} whole, which holds the tokens that are named"
            fix = "leave one of both out"
            yield Problem(what, fix, "adapter.trainable_token_indices")


def _id_problems(ids: list[int], embedding: Any, where: str) -> Iterator[Problem]:
    if embedding is None:
        yield Problem("the model has no token embedding", "leave it out", where)
        return
    rows = embedding.weight.shape[0]
    if not ids:
        yield Problem("it names no token", "leave it out, or name token ids", where)
    elif outside := [i for i in ids if not 0 <= i < rows]:
        fix = "resize the embedding first (model.resize_token_embeddings) where tokens are new"
        yield Problem(f"token {outside[0]} is outside of the embedding of {rows}", fix, where)
    elif len(set(ids)) < len(ids):
        yield Problem("it names a token twice", "name each once", where)
