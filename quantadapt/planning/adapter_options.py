"""The values of an adapter's options: made plain, and looked at before any work.

What the options name in a model, its layers and tokens, is looked at where a model is there, in
`adapting.targets`. Pure, and without PEFT, which takes seconds to import.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import PurePath
from typing import Any

from ..errors import Problem
from ..inputs.likely_names import did_you_mean
from ..inputs.patterns import pattern_problems
from ..records import Adapter
from .peft_options import Option, peft_options

MAX_RANK = 2**16
"""Above the sizes of all layers that there are; such a rank is a slip, and takes all memory."""

_LEAST = {"r": 1, "init_r": 1, "target_r": 1, "deltaT": 1, "total_step": 1, "tinit": 0, "tfinal": 0}
_SHARES = ("beta1", "beta2")

_STACKED = "PEFT stacks layers again that share their weights, which cannot be saved or merged"
_NOT_HERE = {
    "layer_replication": (_STACKED, "save the deeper model first, and start from that"),
    "use_qalora": (
        "PEFT computes QA-LoRA in its own layers for GPTQ only, not over these",
        "leave it out; every backend takes plain LoRA",
    ),
    "arrow_config": (
        "Arrow routes between adapters that are trained already, and this is a new one",
        "train plain LoRA adapters first, and join them with PEFT's create_arrow_model",
    ),
}
"""Options that PEFT has and that lead nowhere here -> why, and what to do instead."""

_ADALORA_LACKS = ("r", "init_lora_weights", "use_dora", "use_rslora", "lora_bias", "alpha_pattern",
                  "rank_pattern", "layer_replication", "loftq_config", "eva_config",
                  "corda_config", "lora_ga_config", "velora_config", "kasa_config",
                  "monteclora_config", "use_bdlora", "arrow_config", "alora_invocation_tokens",
                  "use_qalora", "qalora_group_size", "target_parameters")  # fmt: skip
"""Fields that AdaLoRA's config has from LoRA's and that AdaLoRA does not read, or writes itself."""


def checked_options(
    adapter: Adapter, given: Mapping[str, Any]
) -> tuple[dict[str, Any], list[Problem]]:
    """Return the adapter's options, its defaults and what is given, and what is wrong with them.

    Sets, tuples and the like become lists, numpy's numbers and PEFT's own options in options plain
    values, so that they can be saved. A value that cannot be used is left out.
    """
    options, problems = dict(adapter.defaults), []
    known = peft_options(adapter)
    for name, value in given.items():
        value = plain(value)
        if name in known and isinstance(value, str) and known[name].takes_list:
            value = [value]
        if problem := _problem(adapter, name, value, known):
            problems.append(problem)
        elif value is not None or known[name].default == "None":  # else it means the default
            options[name] = value
    for problem in pattern_problems(options):
        problems.append(problem)
        options.pop(problem.where.split(".")[1], None)
    return options, problems + _joint_problems(adapter, options)


def plain(value: Any) -> Any:
    """Return `value` in types that JSON has, as far as it is made of such."""
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, PurePath):
        return str(value)
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a number of numpy or torch
        return value.item()
    if isinstance(value, (set, frozenset)):
        return sorted(map(plain, value), key=str)
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        return [plain(item) for item in value]
    return value


def _problem(
    adapter: Adapter, name: str, value: Any, known: Mapping[str, Option]
) -> Problem | None:
    where = f"adapter.{name}"
    if name not in known:
        what = f"adapter {adapter.name!r} has no option {name!r}"
        return Problem(what, did_you_mean(name, known), where)
    if name == "loftq_config" and not _is_loftq_config(value):
        return Problem(f"{value!r} has another form", "write {loftq_iter: 1}", where)
    if not (known[name].accepts(value) and _fits_json(value)):
        return _wrong_type(adapter, known[name], value)
    if value != adapter.defaults.get(name) and (found := _unread(adapter, name, value)):
        return found
    return _out_of_range(name, value)


def _wrong_type(adapter: Adapter, option: Option, value: Any) -> Problem:
    where, choices = f"adapter.{option.name}", option.choices
    if isinstance(value, str) and choices:
        return Problem(f"{value!r} is not possible", did_you_mean(value, choices), where)
    default = adapter.defaults.get(option.name, option.default)
    what = f"{value!r} is not of type {option.annotation}"
    return Problem(what, f"the default is {default}", where)


def _fits_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _is_loftq_config(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("loftq_iter", 1), int)


def _unread(adapter: Adapter, name: str, value: Any) -> Problem | None:
    """Return why an option would have no effect, or one that nothing can be made of."""
    where = f"adapter.{name}"
    if not value:
        return None
    starts = name == "init_lora_weights" and isinstance(value, bool)
    if adapter.peft_type == "ADALORA" and name in _ADALORA_LACKS and not starts:
        what = f"AdaLoRA does not take {name} over from LoRA"
        fix = "leave it out; its ranks are init_r and target_r"
        return Problem(what, fix, where)
    if adapter.peft_type in ("LORA", "ADALORA") and name in _NOT_HERE:
        return Problem(*_NOT_HERE[name], where)
    return None


def _out_of_range(name: str, value: Any) -> Problem | None:
    where = f"adapter.{name}"
    if isinstance(value, float) and not math.isfinite(value):
        return Problem(f"{value} is no number to compute with", "use a finite number", where)
    if name in ("rank_pattern", "alpha_pattern"):
        values = (value or {}).values()
        if name == "rank_pattern":
            wrong, fix = [v for v in values if not _is_rank(v)], f"use 1 to {MAX_RANK}"
        else:
            wrong, fix = [v for v in values if not (_is_number(v) and v > 0)], "use 1 or more"
        return Problem(f"{wrong[0]!r} is no value for a layer", fix, where) if wrong else None
    if not _is_number(value):
        return None
    if name in ("r", "init_r", "target_r") and not _is_rank(value):
        fix = "use 1 or more" if value < 1 else f"use {MAX_RANK} or less"
        return Problem(f"{value} is no rank", fix, where)
    if name in _LEAST and value < _LEAST[name]:
        return Problem(f"{value} is too small", f"use {_LEAST[name]} or more", where)
    if name.endswith("dropout") and not 0 <= value < 1:
        return Problem(f"{value} is no share to drop", "use 0 or more, and less than 1", where)
    if name in _SHARES and not 0 < value < 1:
        return Problem(f"{value} is not possible", "use a value between 0 and 1", where)
    if name == "lora_alpha" and not value > 0:
        what = f"{value} leaves the adapter without effect, or turns it round"
        return Problem(what, "use 1 or more; twice the rank is usual", where)
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return _is_number(value) and isinstance(value, int) and 1 <= value <= MAX_RANK


def _joint_problems(adapter: Adapter, options: Mapping[str, Any]) -> list[Problem]:
    """Return what is wrong with options that are right each by itself."""
    found, targets = [], options.get("target_modules")
    if isinstance(targets, str) and targets.lower() != "all-linear":
        for name in ("layers_to_transform", "layers_pattern"):
            if options.get(name) not in (None, []):
                what = f"{name} does not go with target_modules that are a regular expression"
                fix = "say it in the expression, or list the layers' names"
                found.append(Problem(what, fix, f"adapter.{name}"))
    if options.get("layers_pattern") and options.get("layers_to_transform") is None:
        what = "layers_pattern says where layers are counted, and none is named"
        found.append(Problem(what, "set layers_to_transform too", "adapter.layers_pattern"))
    if adapter.peft_type == "ADALORA" and options.get("target_r", 8) > options.get("init_r", 12):
        what = f"target_r {options['target_r']} is above init_r, so no rank would be given up"
        found.append(Problem(what, "use a target_r below init_r", "adapter.target_r"))
    if options.get("lora_bias") and options.get("use_dora"):
        what = "PEFT has no biases in DoRA's update"
        found.append(Problem(what, "leave lora_bias out", "adapter.lora_bias"))
    return found
