"""Methods that PEFT does not ship: PEFT is told of one before it attaches or loads it.

PEFT finds the classes of a method in three tables, under the name that adapter_config.json has for
it. Its own `register_peft_method` fills them for members of its enum `PeftType` alone, to which
nothing can be added; so they are filled here. Nothing that is in them is ever replaced.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import PluginError
from ..records import Adapter

if TYPE_CHECKING:
    from peft import PeftConfig


def config_class(adapter: Adapter) -> type[PeftConfig]:
    """Return the class of the adapter's options; PEFT knows its method then.

    Raises:
        PluginError: a class is not there or is none of PEFT's, or another method has its name.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING as PREFIXES
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as METHODS
    from peft.tuners.tuners_utils import BaseTuner

    name: Any = adapter.peft_type
    if adapter.method:
        config = _imported(adapter, "config", PeftConfig)
        method = _imported(adapter, "method", BaseTuner)
        for table, wanted in ((CONFIGS, config), (METHODS, method)):
            if (known := table.setdefault(name, wanted)) is not wanted:
                what = f"PEFT knows another method {name}, {known.__module__}.{known.__qualname__}"
                raise PluginError(what, fix="give it another peft_type", where=_where(adapter))
        PREFIXES[name] = method.prefix
    found: type[PeftConfig] = CONFIGS[name]
    return found


def made_config(adapter: Adapter, values: dict[str, Any]) -> PeftConfig:
    """Return the adapter's config with these options. Raises PluginError, and what PEFT raises."""
    config = config_class(adapter)(**values)
    if adapter.method:
        if config.peft_type not in (None, adapter.peft_type):
            what = f"its config says peft_type {config.peft_type}, its record {adapter.peft_type}"
            raise PluginError(what, fix="leave it out of the config", where=_where(adapter))
        config.peft_type = adapter.peft_type
    return config


def _imported(adapter: Adapter, field: str, base: type[Any]) -> Any:
    place = getattr(adapter, field)
    module, _, name = place.partition(":")
    try:
        found = getattr(import_module(module), name)
    except Exception as error:
        what = f"its {field} {place} cannot be imported: {type(error).__name__}: {error}"
        raise PluginError(what, where=_where(adapter)) from error
    if not (isinstance(found, type) and issubclass(found, base)):
        what = f"its {field} {place} is no subclass of {base.__module__}.{base.__name__}"
        raise PluginError(what, where=_where(adapter))
    return found


def _where(adapter: Adapter) -> str:
    return f"adapter {adapter.name}"
