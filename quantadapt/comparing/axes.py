"""Which `--set` assignments of a comparison are axes of its grid."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..inputs.plain_yaml import YAMLError, parse
from ..planning.peft_options import peft_options
from ..registry.discovery import registry
from ..spec import Spec


def lists_in(assignments: Iterable[str]) -> tuple[dict[str, list[Any]], list[str]]:
    """Part `key=value` assignments into axes, which have a list, and others. A list that a key of
    the spec takes itself is no axis; a list of such lists is."""
    axes: dict[str, list[Any]] = {}
    others = []
    for item in assignments:
        key, _, text = item.partition("=")
        try:
            value = parse(text)
        except YAMLError:
            value = text
        inner = isinstance(value, list) and all(isinstance(part, list) for part in value)
        if isinstance(value, list) and (inner or not _takes_list(key.strip())):
            axes[key.strip()] = value
        else:
            others.append(item)
    return axes, others


def _takes_list(key: str) -> bool:
    """Say whether a key of the spec, or an option of a backend or adapter, is itself a list."""
    section, _, name = key.partition(".")
    if section == "adapter":
        options = (peft_options(record).get(name) for record in registry().adapters())
        kinds = [option.annotation for option in options if option]
    else:
        owners: list[Any] = [Spec]
        if section == "backend" and name:
            owners = [record.quantizer for record in registry().backends()]
        elif name:
            owners = [getattr(Spec.model_fields.get(section), "annotation", None)]
        fields = (getattr(owner, "model_fields", {}).get(name or section) for owner in owners)
        kinds = [str(field.annotation) for field in fields if field]
    return any("list" in kind.lower() or "tuple" in kind.lower() for kind in kinds)
