"""Adapters that PEFT itself put onto a model, `PeftModel.from_pretrained(model, folder)` for one:
which record and which options they are of."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from contextlib import suppress
from enum import Enum
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from ..planning.peft_options import INTERNAL, peft_options
from ..records import Adapter
from ..registry.discovery import registry

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

_KEEPS_BASE = (True, False, "gaussian", "orthogonal", "eva", "mica")
"""Values of LoRA's `init_lora_weights` that take nothing from the base."""
_FROM_ZERO = re.compile(
    r"(.*)\.(?:lora_B|lora_embedding_A|lora_E|vera_lambda_b)\.([^.]+)(\.weight)?"
)
"""Layer and adapter in the names of factors that are zero where LoRA, AdaLoRA and VeRA begin."""


def config_by_peft(model: nn.Module) -> PeftConfig | None:
    """Return PEFT's config of the first adapter that a PeftModel computes with; None of others."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping) or not hasattr(model, "get_base_model"):
        return None
    active = getattr(model, "active_adapters", ())
    names = [name for name in ([] if callable(active) else active) if name in configs]
    return next((configs[name] for name in (*names, *configs)), None)


def recognized(config: PeftConfig) -> tuple[Adapter, dict[str, Any]]:
    """Return the record that fits a config best, and the options that differ from PEFT's defaults,
    JSON-ready. Raises ModelError where there is no such method."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    values = {n: _plain(v) for n, v in config.to_dict().items() if n not in INTERNAL}
    records = [record for record in registry().adapters() if record.peft_type == kind]
    if not records:
        what = f"the model has an adapter of PEFT's method {kind}, which is not known here"
        raise ModelError(what, fix="use one of those that `quantadapt adapters` lists")
    # Ranks and scales are anybody's; flags and names of starts make one method of another.
    fitting = [r for r in records if all(values.get(n) == v for n, v in _marks(r).items())]
    record = max(fitting or records, key=lambda found: len(_marks(found)))
    return record, {n: v for n, v in values.items() if not _is_default(record, n, v)}


def rewrites(adapter: Adapter, options: Mapping[str, Any]) -> bool:
    """Say whether attaching this adapter may have put other values into the base."""
    return adapter.peft_type == "LORA" and options.get("init_lora_weights", True) not in _KEEPS_BASE


def is_new(model: nn.Module) -> bool:
    """Say whether an adapter adds nothing yet, as `get_peft_model` makes it, where that shows."""
    zero: dict[tuple[str, str], bool] = {}
    for name, weight in model.named_parameters():
        if found := _FROM_ZERO.fullmatch(name):
            zero[found[1], found[2]] = zero.get((found[1], found[2])) or not weight.any()
    return bool(zero) and all(zero.values())


def _marks(record: Adapter) -> dict[str, Any]:
    return {n: v for n, v in record.defaults.items() if isinstance(v, bool | str)}


def _is_default(record: Adapter, name: str, value: Any) -> bool:
    option = peft_options(record).get(name)
    if option is None or not option.accepts(value):
        return True  # PEFT's own notes, or nothing that could be noted
    with suppress(ValueError, SyntaxError):
        return bool(ast.literal_eval(option.default) == value)
    return value in (None, {}, [])  # made by a call


def _plain(value: Any) -> Any:
    """Return an option as JSON has it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(_plain(part) for part in value)
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value
