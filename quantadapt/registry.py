"""Finds plugins and answers by name: `registry().backend("hqq")`.

Plugins come from entry points in the group `quantadapt`; the core names none of them. A plugin
that is broken is kept, with the reason, and everything else goes on working. Two plugins that
claim one name are both told apart in the error; neither wins silently.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

import pluggy

from . import adapters as builtin_adapters
from . import hookspecs
from .errors import PlanRefused, PluginError, Problem, did_you_mean
from .records import Adapter, Backend

GROUP = "quantadapt"
ONLY = "QUANTADAPT_PLUGINS"

Record = TypeVar("Record", Backend, Adapter)


@dataclass(frozen=True)
class Provenance:
    """Where a record came from: the plugin's name, module, distribution and its version."""

    plugin: str
    module: str = ""
    distribution: str = ""
    version: str = ""

    def __str__(self) -> str:
        origin = f"{self.distribution} {self.version}".strip() or self.module
        return f"{self.plugin} ({origin})" if origin else self.plugin


@dataclass(frozen=True)
class BrokenPlugin:
    """A plugin that could not be used, why, and the traceback for its author."""

    provenance: Provenance
    reason: str
    details: str = ""


@dataclass(frozen=True)
class _Entry(Generic[Record]):
    record: Record
    provenance: Provenance


@dataclass
class Registry:
    """All plugins that were found, and what they provide."""

    manager: pluggy.PluginManager
    plugins: dict[str, Provenance] = field(default_factory=dict)
    broken: list[BrokenPlugin] = field(default_factory=list)
    _backends: dict[str, list[_Entry[Backend]]] = field(default_factory=dict)
    _adapters: dict[str, list[_Entry[Adapter]]] = field(default_factory=dict)

    def backends(self) -> list[Backend]:
        """Return every backend whose name is claimed once, by name."""
        return [e[0].record for _, e in sorted(self._backends.items()) if len(e) == 1]

    def adapters(self) -> list[Adapter]:
        """Return every adapter whose name is claimed once, by name."""
        return [e[0].record for _, e in sorted(self._adapters.items()) if len(e) == 1]

    def backend(self, name: str) -> Backend:
        """Return the backend called `name`. Raises PlanRefused, saying what to do."""
        backend: Backend = self._only("backend", name, self._backends).record
        return backend

    def adapter(self, name: str) -> Adapter:
        """Return the adapter called `name`. Raises PlanRefused, saying what to do."""
        adapter: Adapter = self._only("adapter", name, self._adapters).record
        return adapter

    def provenance(self, record: Backend | Adapter) -> Provenance:
        """Say which plugin provided `record`."""
        table: Any = self._backends if isinstance(record, Backend) else self._adapters
        found: Provenance = self._only("record", record.name, table).provenance
        return found

    def clashes(self) -> list[str]:
        """Return a sentence for each name that several plugins claim."""
        tables: list[tuple[str, dict[str, Any]]] = [
            ("backend", self._backends),
            ("adapter", self._adapters),
        ]
        return [
            _clash(kind, name, entries)
            for kind, table in tables
            for name, entries in sorted(table.items())
            if len(entries) > 1
        ]

    def _only(self, kind: str, name: str, table: dict[str, list[_Entry[Any]]]) -> _Entry[Any]:
        entries = table.get(name, [])
        if len(entries) == 1:
            return entries[0]
        if entries:
            fix = f"uninstall one of them, or name the plugins to load in {ONLY}"
            raise PlanRefused([Problem(_clash(kind, name, entries), fix, where=kind)])
        hint = did_you_mean(name, table)
        if broken := ", ".join(str(plugin.provenance) for plugin in self.broken):
            hint += f"; these plugins are broken, `quantadapt doctor` says why: {broken}"
        raise PlanRefused([Problem(f"no {kind} is called {name!r}", hint, where=kind)])

    def add(self, name: str, load: Callable[[], Any], provenance: Provenance) -> None:
        """Register one plugin; whatever goes wrong with it is recorded, not raised."""
        try:
            module = load()
            _check_hooks(module, name)
            backends = _records(module, "quantadapt_backends", Backend)
            adapters = _records(module, "quantadapt_adapters", Adapter)
            self.manager.register(module, name)
        except Exception as error:
            reason = str(error) if isinstance(error, PluginError) else repr(error)
            self.broken.append(BrokenPlugin(provenance, reason, traceback.format_exc()))
            return
        self.plugins[name] = provenance
        for backend in backends:
            self._backends.setdefault(backend.name, []).append(_Entry(backend, provenance))
        for adapter in adapters:
            self._adapters.setdefault(adapter.name, []).append(_Entry(adapter, provenance))


def _clash(kind: str, name: str, entries: Iterable[_Entry[Any]]) -> str:
    providers = " and ".join(str(entry.provenance) for entry in entries)
    return f"the {kind} name {name!r} is claimed by {providers}"


def _check_hooks(module: Any, name: str) -> None:
    """Raise PluginError for a hook that the core does not know (misspelt, or of a newer core)."""
    scratch = pluggy.PluginManager(hookspecs.PROJECT)
    scratch.add_hookspecs(hookspecs)
    known = [n for n in vars(hookspecs) if n.startswith("quantadapt_")]
    scratch.register(module, name)
    try:
        scratch.check_pending()
    except pluggy.PluginValidationError:
        mine = [
            hook.name for hook in scratch.get_hookcallers(module) or [] if hook.name not in known
        ]
        hints = "; ".join(f"unknown hook {hook!r}, {did_you_mean(hook, known)}" for hook in mine)
        raise PluginError(hints) from None


def _records(module: Any, hook: str, kind: type[Record]) -> list[Record]:
    implementation = getattr(module, hook, None)
    records = list(implementation()) if implementation else []
    for record in records:
        if not isinstance(record, kind):
            raise PluginError(f"{hook} returned {record!r}, which is no {kind.__name__} record")
    return records


def _provenance(entry_point: EntryPoint) -> Provenance:
    dist = entry_point.dist
    return Provenance(
        entry_point.name,
        entry_point.module,
        dist.name if dist else "",
        dist.version if dist else "",
    )


def _wanted() -> set[str] | None:
    """Return the plugin names in QUANTADAPT_PLUGINS (comma-separated); None means all."""
    value = os.environ.get(ONLY)
    return None if value is None else {name.strip() for name in value.split(",") if name.strip()}


def discover() -> Registry:
    """Look for plugins afresh. Most callers want `registry()`."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    found = Registry(manager)
    found.add("builtin", lambda: builtin_adapters, Provenance("builtin", builtin_adapters.__name__))
    wanted = _wanted()
    seen: dict[str, Provenance] = {}
    for entry_point in sorted(entry_points(group=GROUP), key=lambda e: e.name):
        if wanted is not None and entry_point.name not in wanted:
            continue
        provenance = _provenance(entry_point)
        if entry_point.name in seen:
            reason = f"{provenance} has the same plugin name as {seen[entry_point.name]}"
            found.broken.append(BrokenPlugin(provenance, reason))
            continue
        seen[entry_point.name] = provenance
        found.add(entry_point.name, entry_point.load, provenance)
    return found


@cache
def registry() -> Registry:
    """Return the plugins of this process, discovered once."""
    return discover()
