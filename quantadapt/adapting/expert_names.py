"""How options of adapters name stacks of experts: by the parameter, by the module that owns it, or
by what the checkpoint calls the layers that it is made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

EXPERTS = "experts"
"""What models call the module that owns stacks of experts."""


_PARTS = (("gate_proj", "gate_up_proj"), ("up_proj", "gate_up_proj"))


class StacksWarning(UserWarning):
    """A name stands for layers and for stacks of experts, or for a part of a stack."""


def ends(name: str, ending: str) -> bool:
    """Say whether `ending` is the last parts of `name`, which is how PEFT compares them."""
    return f".{name}".endswith(f".{ending}")


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


def is_excluded(name: str, excluded: str | Iterable[str] | None) -> bool:
    """Say whether `exclude_modules` names a stack of experts, or the module that owns it."""
    if not excluded:
        return False
    return names_stack(excluded if isinstance(excluded, str) else list(excluded), name)


def is_trained_whole(name: str, options: Mapping[str, Any]) -> bool:
    """Say whether `modules_to_save` names a module that a stack of experts is in."""
    whole = options.get("modules_to_save") or ()
    return any(re.match(rf"(.*\.)?({module})($|\..*)", name) for module in whole)  # as PEFT does


def names_stack(wanted: str | list[str], stack: str) -> bool:
    """Say whether a stack, or the module that owns it, is named."""
    both = (stack, stack.rpartition(".")[0])
    if isinstance(wanted, str):
        return any(re.fullmatch(wanted, name) for name in both)
    return any(ends(name, ending) for ending in wanted for name in both)


def stack_endings(wanted: list[str], stacks: list[str]) -> list[str]:
    """Return the shortest endings of two parts that match `wanted` and no other stack."""
    endings = sorted({".".join(name.split(".")[-2:]) for name in wanted})
    found = {name for name in stacks if any(ends(name, ending) for ending in endings)}
    return endings if found == set(wanted) else sorted(wanted)


def parts_of_stacks(model: nn.Module, stacks: list[str]) -> dict[str, str]:
    """Return how layers are called that one of the `stacks` is made of, in checkpoints of the model
    or in models like it -> how the stack is called: "gate_proj" and "up_proj" -> "gate_up_proj"."""
    known = {name.rpartition(".")[2] for name in stacks}
    return {part: stack for part, stack in (*_PARTS, *_converted(model)) if stack in known}


def _converted(model: Any) -> Iterator[tuple[str, str]]:
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping

    if not isinstance(model, PreTrainedModel):
        return
    for conversion in get_model_conversion_mapping(model):
        stack = conversion.target_patterns[0].rpartition(".")[2]
        for source in conversion.source_patterns:
            if ".experts." in source:
                yield source.removesuffix("$").removesuffix(".weight").rpartition(".")[2], stack
