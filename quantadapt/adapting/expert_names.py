"""How options of adapters name stacks of experts: by the parameter, by the module that owns it, or
by what the checkpoint calls the layers that it is made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..planning.names import ends

EXPERTS = "experts"
"""What models call the module that owns stacks of experts."""


_PARTS = (("gate_proj", "gate_up_proj"), ("up_proj", "gate_up_proj"))


class StacksWarning(UserWarning):
    """A name stands for layers and for stacks of experts, or for a part of a stack."""


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
