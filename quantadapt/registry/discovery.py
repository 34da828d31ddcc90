"""Finds plugins and answers by name: `registry().backend("hqq")`.

Plugins come from entry points in the group `quantadapt`; the core names none of them. A plugin
that is broken is kept, with the reason, and everything else goes on working. Two plugins that
claim one name are both told apart in the error; neither wins silently. A plugin of others is first
imported in a process of its own (`trial`), and here only once that went well: in a thread, with a
time limit, and without what it writes to stdout.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Container, Iterable, Mapping
from concurrent.futures import Future
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib.metadata import Distribution, EntryPoint, distributions, entry_points
from io import StringIO
from typing import Any

import pluggy

from .. import hookspecs
from ..errors import ModelError, PlanRefused, PluginError, Problem, QuantadaptError, warn
from ..inputs.likely_names import did_you_mean
from ..protocols import Quantizer
from ..records import KINDS, Adapter, Backend, R, Record, kind_of
from .checks import Contents, contents
from .trial import Verdict, hangs, load, reason, verdicts

BUILTIN = {
    "builtin": "quantadapt.registry.adapters",
    "sft": "quantadapt.objectives.sft",
    "dpo": "quantadapt.objectives.dpo",
    "classify": "quantadapt.objectives.classify",
    "reward": "quantadapt.objectives.reward",
    "orpo": "quantadapt.objectives.orpo",
    "simpo": "quantadapt.objectives.simpo",
    "distill": "quantadapt.objectives.distill",
    "kto": "quantadapt.objectives.kto",
    "grpo": "quantadapt.objectives.grpo",
    "rloo": "quantadapt.objectives.rloo",
    "pretrain": "quantadapt.objectives.pretrain",
    "embed": "quantadapt.objectives.embed",
    "rerank": "quantadapt.objectives.rerank",
    "perplexity": "quantadapt.evaluation.perplexity",
    "tasks": "quantadapt.benchmarking.tasks",
    "preferences": "quantadapt.evaluation.preferences",
    "desirability": "quantadapt.evaluation.desirability",
    "rewarded": "quantadapt.rewarding.evaluation",
    "classification": "quantadapt.evaluation.classification",
    "rewards": "quantadapt.evaluation.rewards",
    "agreement": "quantadapt.evaluation.dense_agreement",
    "retrieval": "quantadapt.evaluation.retrieval",
    "exports": "quantadapt.exporting.exports",
}
"""Plugins that are always there, whatever QUANTADAPT_PLUGINS says: name -> module."""
GROUP = "quantadapt"
ONLY = "QUANTADAPT_PLUGINS"
TIME_LIMIT = "QUANTADAPT_PLUGIN_TIMEOUT"
DEFAULT_TIME_LIMIT = 10.0


class PluginWarning(UserWarning):
    """A plugin made everybody wait, in vain."""


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
    """A plugin that could not be used, why, and the traceback (or the stack, where it hangs)."""

    provenance: Provenance
    reason: str
    details: str = ""


@dataclass(frozen=True)
class _Entry:
    record: Record
    provenance: Provenance


@dataclass
class Registry:
    """All plugins that were found, and what they provide.

    Attributes:
        manager: calls the hooks.
        plugins: the plugins that work, by name.
        broken: those that do not.
        seconds: how long each of `plugins` took to import.
        remarks: what the authors of some of `plugins` should mend.
    """

    manager: pluggy.PluginManager
    plugins: dict[str, Provenance] = field(default_factory=dict)
    broken: list[BrokenPlugin] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)
    _tables: dict[str, dict[str, list[_Entry]]] = field(
        default_factory=lambda: {kind: {} for kind in KINDS}
    )

    def records(self, kind: type[R]) -> list[R]:
        """Return every record of a kind whose name is claimed once, by name."""
        table: dict[str, list[Any]] = self._tables[kind_of(kind)]
        return [entries[0].record for _, entries in sorted(table.items()) if len(entries) == 1]

    def record(self, kind: type[R], name: str) -> R:
        """Return the record of a kind called `name`. Raises PlanRefused, saying what to do."""
        found: Any = self._only(kind_of(kind), name).record
        return found  # type: ignore[no-any-return]

    def backends(self) -> list[Backend]:
        """Return every backend whose name is claimed once, by name."""
        return self.records(Backend)

    def adapters(self) -> list[Adapter]:
        """Return every adapter whose name is claimed once, by name."""
        return self.records(Adapter)

    def backend(self, name: str) -> Backend:
        """Return the backend called `name`. Raises PlanRefused, saying what to do."""
        return self.record(Backend, name)

    def adapter(self, name: str) -> Adapter:
        """Return the adapter called `name`. Raises PlanRefused, saying what to do."""
        return self.record(Adapter, name)

    def readers(self, found: Mapping[str, Any]) -> tuple[list[Backend], list[QuantadaptError]]:
        """Return the backends that read a checkpoint with that `quantization_config`, and what went
        wrong with those whose plugin fails over it."""
        readers: list[Backend] = []
        failures: list[QuantadaptError] = []
        for backend in self.backends():
            try:
                readers += [backend] if adopted(backend, found) is not None else []
            except (PluginError, ModelError) as error:
                failures.append(error)
        return readers, failures

    def provenance(self, record: Record) -> Provenance:
        """Say which plugin provided `record`."""
        return self._only(kind_of(record), record.name).provenance

    def claims(self, name: str, kind: str = "backend") -> list[Provenance]:
        """Return the plugins, broken ones included, that go by `name` or have such a record of a
        kind."""
        broken = {plugin.provenance.plugin: plugin.provenance for plugin in self.broken}
        records = [entry.provenance for entry in self._tables[kind].get(name, [])]
        return [table[name] for table in (self.plugins, broken) if name in table] + records

    def clashes(self) -> list[str]:
        """Return a sentence for each name that several plugins claim."""
        return [
            _clash(kind, name, entries)
            for kind, table in self._tables.items()
            for name, entries in sorted(table.items())
            if len(entries) > 1
        ]

    def only_of(self, plugins: Container[str]) -> Registry:
        """Return a registry that has the records of `plugins` alone."""
        tables = {
            kind: {
                name: kept
                for name, entries in table.items()
                if (kept := [e for e in entries if e.provenance.plugin in plugins])
            }
            for kind, table in self._tables.items()
        }
        return replace(self, _tables=tables)

    def _only(self, kind: str, name: str) -> _Entry:
        table = self._tables[kind]
        entries = table.get(name, [])
        if len(entries) == 1:
            return entries[0]
        if entries:
            fix = f"uninstall one of them, or name the plugins to load in {ONLY}"
            raise PlanRefused([Problem(_clash(kind, name, entries), fix, where=kind)])
        hint = did_you_mean(name, table)
        hint += " " if hint.endswith("?") else "; " if hint else ""
        hint += f"`quantadapt {kind}s` lists what is here, `quantadapt doctor` what is installed"
        if only := os.environ.get(ONLY):
            hint += f"; {ONLY} loads {only} alone"
        if broken := ", ".join(str(plugin.provenance) for plugin in self.broken):
            hint += f"; these plugins are broken, `quantadapt doctor` says why: {broken}"
        raise PlanRefused([Problem(f"no {kind} is called {name!r}", hint, where=kind)])

    def add(self, name: str, load: Callable[[], Any], provenance: Provenance) -> None:
        """Register one plugin; whatever goes wrong with it is recorded, not raised."""
        limit, started = _time_limit(), time.perf_counter()
        thread, future = _in_thread(lambda: contents(load(), name))
        thread.join(limit)
        if not future.done():
            self._leave_behind(provenance, thread, limit)
            return
        if error := future.exception():  # be it SystemExit: it is the plugin's
            self._keep_broken(provenance, error)
            return
        found = future.result()
        try:
            self.manager.register(found.module, name)
        except ValueError as error:  # the name is taken, or the module is registered already
            self._keep_broken(provenance, error)
            return
        self.plugins[name], self.seconds[name] = provenance, time.perf_counter() - started
        for record in found.records:
            table = self._tables[kind_of(record)]
            table.setdefault(record.name, []).append(_Entry(record, provenance))

    def _keep_broken(self, provenance: Provenance, error: BaseException) -> None:
        details = "".join(traceback.format_exception(error))
        self.broken.append(BrokenPlugin(provenance, reason(error), details))

    def _leave_behind(self, provenance: Provenance, thread: threading.Thread, limit: float) -> None:
        frame = sys._current_frames().get(thread.ident or 0)
        details = "".join(traceback.format_stack(frame)) if frame else ""
        self.broken.append(BrokenPlugin(provenance, hangs(limit), details))
        _warn_of_waiting(provenance, limit)


def adopted(backend: Backend, found: Mapping[str, Any]) -> Any:
    """Return the quantizer that made a checkpoint with that `quantization_config`; None where it
    is another backend's.

    Raises:
        PluginError: the backend fails over it. ModelError: it is one that the backend cannot read,
            in the backend's own words.
    """
    try:
        quantizer = backend.quantizer.from_checkpoint(dict(found))
    except ModelError:
        raise
    except (Exception, SystemExit) as error:
        what = f"it cannot make anything of the checkpoint's quantization_config: {reason(error)}"
        fix = "restore config.json, or start from the unquantized model"
        raise PluginError(what, fix=fix, where=f"backend {backend.name}") from error
    if quantizer is not None and not isinstance(quantizer, Quantizer):
        what = f"from_checkpoint returned {quantizer!r}, which is no quantizer"
        raise PluginError(what, fix="tell its authors", where=f"backend {backend.name}")
    return quantizer


def _clash(kind: str, name: str, entries: Iterable[_Entry]) -> str:
    providers = " and ".join(str(entry.provenance) for entry in entries)
    return f"the {kind} name {name!r} is claimed by {providers}"


def _warn_of_waiting(provenance: Provenance, limit: float) -> None:
    fix = f"uninstall it, or name the plugins to load in {ONLY}, or allow more in {TIME_LIMIT}"
    warn(f"plugin {provenance}: {hangs(limit)}; {fix}", PluginWarning, stacklevel=4)


def _in_thread(work: Callable[[], Contents]) -> tuple[threading.Thread, Future[Contents]]:
    """Begin `work` in a thread that does not keep the process alive."""
    future: Future[Contents] = Future()

    def body() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=body, name="quantadapt-plugin", daemon=True)
    thread.start()
    return thread, future


def _time_limit() -> float:
    """Return the seconds that a plugin has for its import, from QUANTADAPT_PLUGIN_TIMEOUT."""
    text = os.environ.get(TIME_LIMIT, "")
    try:
        seconds = float(text) if text else DEFAULT_TIME_LIMIT
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        what, fix = f"{text!r} is no number of seconds above 0", "set it to 30, say, or unset it"
        raise PlanRefused([Problem(what, fix, where=TIME_LIMIT)])
    return min(seconds, threading.TIMEOUT_MAX)


def _provenance(plugin: str, module: str, dist: Distribution | None) -> Provenance:
    return Provenance(plugin, module, *(_name_and_version(dist) if dist else ("", "")))


@cache
def _name_and_version(dist: Distribution) -> tuple[str, str]:
    """Read a distribution's METADATA, which takes long, once for all of its plugins."""
    try:
        found: Any = dist.metadata
        return found["Name"] or "", found["Version"] or ""
    except Exception:  # there is none, or it cannot be read
        return "", ""


def _wanted() -> set[str] | None:
    """Return the plugin names in QUANTADAPT_PLUGINS (comma-separated); None means all."""
    value = os.environ.get(ONLY)
    return None if value is None else {name.strip() for name in value.split(",") if name.strip()}


def _entry_points(broken: list[BrokenPlugin]) -> list[tuple[Provenance, EntryPoint]]:
    """Return the entry points of our group by name; of equal ones, this distribution's is first."""
    try:
        found = list(entry_points(group=GROUP))
    except Exception:  # one unreadable entry_points.txt spoils the list of all
        found = [e for d in distributions() if not _torn(d) for e in d.entry_points]
        found = [entry_point for entry_point in found if entry_point.group == GROUP]
        broken += torn_distributions()
    known = [(_provenance(e.name, e.value.partition(":")[0].strip(), e.dist), e) for e in found]
    return sorted(known, key=lambda item: _order(item[0]))


def torn_distributions() -> list[BrokenPlugin]:
    """Return what is installed and has an entry_points.txt that cannot be read: torch, pydantic and
    others read all of them, and fail at one."""
    return [
        BrokenPlugin(_provenance("unknown", "", dist), f"its entry_points.txt {why}")
        for dist in distributions()
        if (why := _torn(dist))
    ]


def _torn(dist: Distribution) -> str:
    try:
        _ = dist.entry_points
    except Exception as error:
        return f"cannot be read: {error}"
    return ""


def _order(provenance: Provenance) -> tuple[str, bool, str]:
    foreign = provenance.distribution != hookspecs.PROJECT
    return provenance.plugin, foreign, provenance.distribution


def discover() -> Registry:
    """Look for plugins afresh. Most callers want `registry()`."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    found = Registry(manager)
    seen = {name: Provenance(name, module) for name, module in BUILTIN.items()}
    for name, provenance in seen.items():
        found.add(name, partial(importlib.import_module, provenance.module), provenance)
    _add_installed(found, seen)
    return found


def _add_installed(found: Registry, seen: dict[str, Provenance]) -> None:
    """Add the plugins of entry points; `seen` has the names that are taken."""
    wanted, chosen = _wanted(), []
    for provenance, entry_point in _entry_points(found.broken):
        name = provenance.plugin
        if wanted is not None and name not in wanted:
            continue
        if name in seen:
            why = f"{provenance} has the same plugin name as {seen[name]}"
            found.broken.append(BrokenPlugin(provenance, why))
            continue
        seen[name] = provenance
        chosen.append((provenance, entry_point))
    limit = _time_limit()
    foreign = [point for origin, point in chosen if origin.distribution != hookspecs.PROJECT]
    known = dict(zip((p.name for p in foreign), verdicts(foreign, limit), strict=True))
    for provenance, entry_point in chosen:
        verdict, fresh = known.get(entry_point.name, (Verdict(), False))
        if verdict.problem:
            found.broken.append(BrokenPlugin(provenance, verdict.problem, verdict.details))
            if fresh and verdict.problem == hangs(limit):
                _warn_of_waiting(provenance, limit)
            continue
        if verdict.remark:
            found.remarks[entry_point.name] = verdict.remark
        with redirect_stdout(StringIO()):  # which belongs to the command
            found.add(entry_point.name, partial(load, entry_point), provenance)


def registry() -> Registry:
    """Return the plugins of this process, discovered once, whatever thread asks first."""
    with _LOCK:
        return _registry()


_LOCK = threading.RLock()
_registry = cache(discover)
registry.cache_clear = _registry.cache_clear  # type: ignore[attr-defined]
