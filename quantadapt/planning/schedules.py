"""Schedules of the learning rate: which there are, what they can be told, and whether they go with
that. Read from the source of transformers and torch, as importing those takes seconds; where
options are given, transformers itself is asked, too."""

from __future__ import annotations

import ast
import math
import warnings
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import Problem
from ..inputs.likely_names import did_you_mean
from ..spec import TrainSpec
from .peft_options import Option

WHERE = "train.lr_scheduler_kwargs"
FOLLOWS_LOSS = ("reduce_lr_on_plateau", "greedy")
"""What lowers the rate where the loss on held-out data does not fall."""
_GIVEN = {"self", "optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
"""What trainers pass themselves."""
_STEPS = 100
"""Of a run of which nobody knows how many it has."""


def schedule_problems(train: TrainSpec) -> list[Problem]:
    """Return why the schedule of `train` does not work with its options; nothing where the sources
    are not what they were."""
    name, given, known = train.lr_scheduler_type, train.lr_scheduler_kwargs, _functions()
    if not known:
        return []
    if name not in known:
        fix = did_you_mean(name, known)
        return [Problem(f"there is no {name!r}", fix, "train.lr_scheduler_type")]
    options = schedule_options(name)
    missing = [key for key, option in options.items() if not option.default and key not in given]
    fitting = {
        key: given[key] for key in given if key in options and options[key].accepts(given[key])
    }
    found = [_unknown(name, key, options) for key in given if key not in options]
    found += [
        Problem(f"the schedule {name!r} needs it", f"give {_kind(options[key])}", f"{WHERE}.{key}")
        for key in missing
    ]
    found += [
        Problem(f"{given[key]!r} does not fit", f"give {_kind(options[key])}", f"{WHERE}.{key}")
        for key in given
        if key in options and key not in fitting
    ]
    found += [*_rising(train, options), *_longer(train, fitting)]
    if why := _refused(train, dict.fromkeys(missing, 1) | fitting):
        what = f"the schedule {name!r} does not work so: {why}"
        found.append(Problem(what, f"its options: {', '.join(options)}", WHERE))
    if follows_loss(train) and train.validates == "no":
        what = f"the schedule {name!r} follows the loss on held-out data, and nothing measures it"
        fix = "set train.eval_steps, or train.eval_strategy: epoch"
        found.append(Problem(what, fix, "train.lr_scheduler_type"))
    return found


def _rising(train: TrainSpec, options: Mapping[str, Option]) -> list[Problem]:
    """Return whether the lowest rate would be above the one that it begins at."""
    lowest = train.lr_scheduler_kwargs.get("min_lr")
    if lowest is None and "min_lr" in options:
        lowest = ast.literal_eval(options["min_lr"].default or "None")
    if not isinstance(lowest, int | float) or lowest <= train.learning_rate:
        return []
    what = f"min_lr is {lowest:g}, above the learning rate of {train.learning_rate:g}"
    return [Problem(what, "set it below train.learning_rate", f"{WHERE}.min_lr")]


def _longer(train: TrainSpec, options: Mapping[str, Any]) -> list[Problem]:
    """Return whether the parts of a schedule that are given in steps are more than the run has,
    where that is known: transformers would begin in the middle of one."""
    counts = {k: v for k, v in options.items() if k.endswith("_steps") and isinstance(v, int)}
    warmup = math.ceil(train.max_steps * train.warmup_ratio)
    if not counts or not 0 < train.max_steps < warmup + sum(counts.values()):
        return []
    what = f"{' and '.join(counts)} and {warmup} of warmup are more than the run's steps"
    fix = f"let them come to {train.max_steps} at most, or set train.max_steps higher"
    return [Problem(what, fix, f"{WHERE}.{next(iter(counts))}")]


def follows_loss(train: TrainSpec) -> bool:
    """Say whether the schedule is told each loss on held-out data, and not each step."""
    return train.lr_scheduler_type in FOLLOWS_LOSS


def _kind(option: Option) -> str:
    """Return what an option takes, in words."""
    kinds = option.choices or option.annotation.replace("None", "").split("|")
    return " or ".join(kind.strip() for kind in kinds if kind.strip())


def _unknown(name: str, key: str, options: Mapping[str, Option]) -> Problem:
    what = f"the schedule {name!r} has no option {key!r}"
    fix = did_you_mean(key, options) if options else "leave it out: it takes none"
    return Problem(what, fix, f"{WHERE}.{key}")


@cache
def schedule_options(name: str) -> dict[str, Option]:
    """Return name -> Option of what a schedule of transformers can be told; the default of one that
    has to be given is empty. Empty for a schedule that is not known."""
    if (function := _functions().get(name)) is None:
        return {}
    if function.args.kwarg is not None:  # it makes an object of a class, which says
        function = _constructor(function) or function
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args]
    missing: list[ast.expr | None] = [None] * (len(every) - len(arguments.defaults))
    pairs = [*zip(every, [*missing, *arguments.defaults], strict=True)]
    pairs += zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    return {
        argument.arg: Option(argument.arg, *_facts(argument, default), "")
        for argument, default in pairs
        if argument.arg not in _GIVEN
    }


def _facts(argument: ast.arg, default: ast.expr | None) -> tuple[str, str]:
    """Return annotation and default as written; the type of the default where there is no
    annotation."""
    text = "" if default is None else ast.unparse(default)
    if argument.annotation is not None:
        return ast.unparse(argument.annotation), text
    value = ast.literal_eval(default) if isinstance(default, ast.Constant) else None
    return "Any" if value is None else type(value).__name__, text


@cache
def _functions() -> dict[str, ast.FunctionDef]:
    """Return by name the functions that make schedules; empty if they cannot be found."""
    optimization = _source("transformers", "optimization.py")
    names = _members(_source("transformers", "trainer_utils.py"), "SchedulerType")
    functions = {n.name: n for n in optimization.body if isinstance(n, ast.FunctionDef)}
    tables = _assigned(optimization, "TYPE_TO_SCHEDULER_FUNCTION")
    return {
        names[key.attr]: functions[value.id]
        for table in tables
        if isinstance(table, ast.Dict)
        for key, value in zip(table.keys, table.values, strict=True)
        if isinstance(key, ast.Attribute) and isinstance(value, ast.Name)
        if key.attr in names and value.id in functions
    }


def _constructor(function: ast.FunctionDef) -> ast.FunctionDef | None:
    """Return the constructor of the class whose object a function returns."""
    made = [n.value.func for n in ast.walk(function) if _returns_call(n)]  # type: ignore[attr-defined]
    places = (("transformers", "optimization.py"), ("torch", "optim/lr_scheduler.py"))
    bodies = [node for place in places for node in _source(*place).body]
    return next(
        (
            method
            for call in made
            for node in bodies
            if isinstance(node, ast.ClassDef) and node.name == ast.unparse(call)
            for method in node.body
            if isinstance(method, ast.FunctionDef) and method.name == "__init__"
        ),
        None,
    )


def _refused(train: TrainSpec, options: Mapping[str, Any]) -> str:
    """Let transformers make the schedule, and return why it does not want to; empty where it does.
    One without options works, and is not worth the seconds that importing torch takes."""
    asks = any(
        option.default == "None" for option in schedule_options(train.lr_scheduler_type).values()
    )
    if not asks and not train.lr_scheduler_kwargs:
        return ""
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=train.learning_rate)
    total = train.max_steps if train.max_steps > 0 else _STEPS
    steps = {"num_warmup_steps": math.ceil(total * train.warmup_ratio), "num_training_steps": total}
    name, own = train.lr_scheduler_type, dict(options)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            get_scheduler(name, optimizer, **steps, scheduler_specific_kwargs=own)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


@cache
def _source(package: str, file: str) -> ast.Module:
    """Return what a file of an installed package says; nothing where it is not there."""
    found = find_spec(package)
    if found is None or found.origin is None:
        return ast.Module([], [])
    try:
        return ast.parse((Path(found.origin).parent / file).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ast.Module([], [])


def _members(module: ast.Module, name: str) -> dict[str, str]:
    """Return name -> value of the texts of an enumeration."""
    classes = [n for n in module.body if isinstance(n, ast.ClassDef) and n.name == name]
    return {
        node.targets[0].id: node.value.value
        for enumeration in classes
        for node in enumeration.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }


def _assigned(module: ast.Module, name: str) -> list[ast.expr]:
    """Return what a module assigns to a name."""
    found = [node for node in module.body if isinstance(node, ast.Assign)]
    return [node.value for node in found if ast.unparse(node.targets[0]) == name]


def _returns_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Return) and isinstance(node.value, ast.Call)
