"""Is a plugin's module what it says it is? Asked once, when the plugin is loaded, so that a mistake
in one plugin is told in its author's words and never fails a table or a plan of everybody."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import pluggy

from .. import hookspecs
from ..capabilities import Merge, Rule
from ..errors import PluginError
from ..inputs.likely_names import did_you_mean
from ..protocols import Evaluator, Exporter, Quantizer, Task
from ..records import KINDS, OPTIONS, Adapter, Backend, Record, kind_of

HOOKS = tuple(name for name in vars(hookspecs) if name.startswith("quantadapt_"))


class Contents(NamedTuple):
    """A plugin's module, and the records that its hooks returned."""

    module: Any
    records: list[Record]


def contents(module: Any, name: str) -> Contents:
    """Check a plugin's module and ask it for its records."""
    _check_hooks(module, name)
    records = [
        record for kind in KINDS for record in _records(module, f"quantadapt_{kind}s", KINDS[kind])
    ]
    for record in records:
        _check_record(record)
    return Contents(module, records)


def _check_hooks(module: Any, name: str) -> None:
    """Raise PluginError for a hook that the core does not know (misspelt, or of a newer core), one
    with wrong arguments, one without its mark, or where there is none at all."""
    scratch = pluggy.PluginManager(hookspecs.PROJECT)
    scratch.add_hookspecs(hookspecs)
    try:
        scratch.register(module, name)
        scratch.check_pending()
    except pluggy.PluginValidationError as error:
        unknown = [h.name for h in scratch.get_hookcallers(module) or [] if h.name not in HOOKS]
        hints = [f"unknown hook {hook!r}, {did_you_mean(hook, HOOKS)}" for hook in unknown]
        raise PluginError("; ".join(hints) or " ".join(str(error).split())) from None
    found = [hook.name for hook in scratch.get_hookcallers(module) or []]
    if unmarked := [hook for hook in HOOKS if hasattr(module, hook) and hook not in found]:
        raise PluginError(f"{', '.join(unmarked)} lacks the decorator @quantadapt.hookimpl")
    if not found:
        raise PluginError(f"it has no hook; a plugin is a module with {' or '.join(HOOKS)}")


def _records(module: Any, hook: str, kind: type[Record]) -> list[Record]:
    """Call a hook that returns records. Raises PluginError if it returns anything else."""
    implementation = getattr(module, hook, None)
    if implementation is None:
        return []
    returned = implementation()
    if isinstance(returned, str) or not isinstance(returned, Iterable):
        raise PluginError(f"{hook} returned {returned!r}, not a list of {kind.__name__} records")
    records = list(returned)
    for record in records:
        if not isinstance(record, kind):
            raise PluginError(f"{hook} returned {record!r}, which is no {kind.__name__} record")
    return records


_BASES: dict[str, type[Any]] = {
    "quantizer": Quantizer,
    "task": Task,
    "evaluator": Evaluator,
    "exporter": Exporter,
}
"""What the options' class of a record has to be, by its field."""
_TUPLES = {"requires": str, "imports": str, "devices": str, "dtypes": str, "rules": Rule}


def _check_record(record: Record) -> None:
    """Raise PluginError for a field that would make every table and plan fail."""
    where = f"{kind_of(record)} {record.name!r}"
    if not isinstance(record.name, str) or not record.name:
        raise PluginError("its name is no text", where=where)
    if not isinstance(merge := getattr(record, "merge", Merge.NEVER), Merge):
        raise PluginError(f"merge is {merge!r}, not one of Merge", where=where)
    for name in _TUPLES.keys() & vars(record).keys():
        values, wanted = getattr(record, name), _TUPLES[name]
        if not isinstance(values, tuple | list) or not all(isinstance(v, wanted) for v in values):
            what = f"{name} is {values!r}, not a tuple of {wanted.__name__}"
            raise PluginError(what, where=where)
    _check_requires(record.requires, where)
    if isinstance(record, Adapter):
        _check_method(record, where)
    if field := OPTIONS.get(kind_of(record)):
        given, base = getattr(record, field), _BASES[field]
        if not (isinstance(given, type) and issubclass(given, base)):
            what = f"{field} is {given!r}, not a subclass of {base.__name__}"
            raise PluginError(what, where=where)
        missing = ", ".join(sorted(getattr(given, "__abstractmethods__", ())))
        if missing and not isinstance(record, Backend):  # of which the conformance suite tells it
            raise PluginError(f"{given.__name__} lacks {missing}", where=where)


def _check_method(adapter: Adapter, where: str) -> None:
    """Raise PluginError where the record does not say which method it is, or not where that is."""
    places = {"config": adapter.config, "method": adapter.method}
    if any(places.values()):
        for name, place in places.items():
            if not (isinstance(place, str) and re.fullmatch(r"[\w.]+:\w+", place)):
                what = f"{name} is {place!r}; a method of its own has both config and method, "
                raise PluginError(f'{what}each as "module:Class"', where=where)
    elif not isinstance(adapter.peft_type, str) or not adapter.peft_type:
        what = "it names no method; give it peft_type, or config and method"
        raise PluginError(what, where=where)


def _check_requires(texts: Iterable[str], where: str) -> None:
    from packaging.requirements import InvalidRequirement, Requirement

    for text in texts:
        try:
            Requirement(text)
        except InvalidRequirement as error:
            what = f"requires holds {text!r}: {str(error).splitlines()[0]}"
            raise PluginError(what, where=where) from None
