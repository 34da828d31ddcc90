"""Looks at an installation: what is there, what works, and what to install.

Vendors are imported in processes of their own, with a time limit, so that one that crashes or
hangs harms nothing. Nothing here raises. What takes no import is there at once; the backends follow
as their imports end.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement

from ..machine import installed_version, this_machine
from ..records import Backend
from .discovery import Registry, registry
from .imported import Imported
from .probing import Answer, Probe, probe_all

DISTRIBUTION = "quantadapt"
TIMEOUT = 120.0
PRELOAD = ("torch", "transformers.modeling_utils")
"""What most vendors import, and takes seconds; loaded once for all of them."""
_TORCH = "torch"
SLOW = 1.0
"""Seconds that a plugin may take to import: everybody waits for it, whatever they ask for."""

_PROBE = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\n"
_TORCH_PROBE = """
import json, torch
cuda = torch.cuda.is_available()
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
print("\\n" + json.dumps({"cuda_build": torch.version.cuda, "devices": names,
    "threads": torch.get_num_threads()}))
"""


@dataclass(frozen=True)
class Library:
    """A distribution: what is wanted, what is there, and the command that puts it right."""

    name: str
    wanted: str
    found: str | None
    fix: str = ""

    @property
    def fits(self) -> bool:
        """Whether it is there and new enough."""
        return not self.fix


@dataclass(frozen=True)
class PluginHealth:
    """A plugin.

    Attributes:
        origin: where it comes from.
        problem: what is wrong with it; empty where it works.
        seconds: how long its import took; None where it is broken.
        slow: whether that is more than a plugin should take.
        remark: what else its authors should mend.
        details: the traceback of a broken one, or where it hangs.
    """

    name: str
    origin: str
    problem: str = ""
    seconds: float | None = None
    slow: bool = False
    remark: str = ""
    details: str = ""


@dataclass(frozen=True)
class BackendHealth:
    """A backend: its libraries, whether they import, and what to do.

    Attributes:
        state: "ready", "not installed", "too old or new", "broken", "not checked" or
            "claimed twice".
        problem: why, where it is not ready.
        fix: what to do about it.
        experts: whether it quantizes stacks of experts, too.
    """

    name: str
    state: str
    libraries: tuple[Library, ...] = ()
    problem: str = ""
    fix: str = ""
    experts: bool = False


@dataclass(frozen=True)
class Diagnosis:
    """All that was found."""

    quantadapt: str
    python: str
    platform: str
    cpus: int
    torch: dict[str, Any]
    cuda: list[str]
    libraries: list[Library] = field(default_factory=list)
    plugins: list[PluginHealth] = field(default_factory=list)
    backends: list[BackendHealth] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """What keeps quantadapt itself from working."""
        found = [f"{lib.name}: {lib.found or 'not installed'}" for lib in self.libraries if lib.fix]
        return found + ([f"torch: {self.torch['problem']}"] if self.torch.get("problem") else [])

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-ready data."""
        return {**asdict(self), "problems": self.problems}


def diagnose(
    *,
    imports: bool = True,
    anew: bool = False,
    timeout: float = TIMEOUT,
    found: Registry | None = None,
    on_look: Callable[[Diagnosis], None] = lambda _: None,
    on_torch: Callable[[dict[str, Any]], None] = lambda _: None,
    on_backend: Callable[[BackendHealth], None] = lambda _: None,
) -> Diagnosis:
    """Look at everything.

    Args:
        imports: also import torch and each backend's libraries, in processes of their own.
        anew: import those, too, that were imported well before and have not changed since.
        timeout: seconds after which an import counts as hanging.
        found: the plugins; those installed by default.
        on_look: given what is known without any import, which takes no time.
        on_torch, on_backend: given torch's facts, and each backend, as soon as they are known.
    """
    found = found or registry()
    looked = Diagnosis(
        quantadapt=installed_version(DISTRIBUTION) or "not installed",
        python=platform.python_version(),
        platform=platform.platform(),
        cpus=os.cpu_count() or 1,
        torch={},
        cuda=_cuda(),
        libraries=required_libraries(),
        plugins=_plugins(found),
        commands=_commands(found),
    )
    on_look(looked)
    torch, health = dict[str, Any](), list[BackendHealth]()
    parts = _imported(found, timeout, anew=anew) if imports else _not_imported(found)
    for part in parts:
        if isinstance(part, BackendHealth):
            health.append(part)
            on_backend(part)
        else:
            torch = part
            on_torch(part)
    return replace(looked, torch=torch, backends=sorted(health, key=lambda backend: backend.name))


def required_libraries() -> list[Library]:
    """Return what quantadapt itself needs."""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # used from a checkout that is not installed
        return []
    wanted = [Requirement(line) for line in lines]
    return [_library(w) for w in wanted if w.marker is None or w.marker.evaluate({"extra": ""})]


def _library(wanted: Requirement, extra: str = "") -> Library:
    found = installed_version(wanted.name)
    text = f"{wanted.name}{wanted.specifier}"
    fits = found is not None and wanted.specifier.contains(found, prereleases=True)
    fix = "" if fits else f"pip install '{extra or text}'"
    return Library(wanted.name, str(wanted.specifier), found, fix)


def _cuda() -> list[str]:
    try:
        return [f"compute capability {a}.{b}" for a, b in this_machine().cuda]
    except Exception as error:
        return [f"cannot be looked at: {error!r}"]


def _torch(answer: Answer) -> dict[str, Any]:
    if answer.problem:
        return {"problem": answer.problem}
    try:
        facts: dict[str, Any] = json.loads(answer.output.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return {"problem": "it imports, but prints nothing sensible"}
    return facts


def _plugins(found: Registry) -> list[PluginHealth]:
    good = [
        PluginHealth(
            name,
            str(origin),
            seconds=found.seconds[name],
            slow=found.seconds[name] > SLOW,
            remark=found.remarks.get(name, ""),
        )
        for name, origin in sorted(found.plugins.items())
    ]
    broken = [
        PluginHealth(b.provenance.plugin, str(b.provenance), b.reason, details=b.details)
        for b in found.broken
    ]
    return good + broken


def _commands(found: Registry) -> list[str]:
    hooks = found.manager.hook.quantadapt_commands.get_hookimpls()
    return [str(found.plugins.get(hook.plugin_name, hook.plugin_name)) for hook in hooks]


def _not_imported(found: Registry) -> Iterator[BackendHealth]:
    """Yield what is known of each backend without importing its libraries."""
    yield from _clashes(found)
    for backend in found.backends():
        yield _installed(backend) or _health(backend, "not checked")


def _imported(
    found: Registry, timeout: float, *, anew: bool
) -> Iterator[dict[str, Any] | BackendHealth]:
    """Yield torch's facts and each backend as soon as they are known; backends that import the same
    modules share one process. What was imported well before is not imported again, but `anew`."""
    yield from _clashes(found)
    groups: dict[str, list[Backend]] = {}
    for backend in found.backends():
        if known := _installed(backend):
            yield known
        else:
            groups.setdefault(" ".join(backend.imports), []).append(backend)
    memory = Imported()
    keys = {name: memory.key(group[0].imports) for name, group in groups.items()}
    fine = {name for name, key in keys.items() if not anew and memory.knows(key)}
    yield from (_tried(backend, "", timeout) for name in sorted(fine) for backend in groups[name])
    new = {name: group for name, group in groups.items() if name not in fine}
    probes = [Probe(_TORCH, _TORCH_PROBE)]
    probes += [Probe(name, _PROBE, group[0].imports) for name, group in new.items()]
    good = []
    for answer in probe_all(probes, timeout, PRELOAD if new else PRELOAD[:1]):
        if answer.name == _TORCH:
            yield _torch(answer)
        elif not answer.problem:
            good.append(keys[answer.name])
        for backend in new.get(answer.name, ()):
            yield _tried(backend, answer.problem, timeout)
    memory.remember(good)


def _clashes(found: Registry) -> Iterator[BackendHealth]:
    fix = "uninstall one of them, or restrict QUANTADAPT_PLUGINS"
    for text in found.clashes():
        yield BackendHealth(text, "claimed twice", problem=text, fix=fix)


def _libraries(backend: Backend) -> tuple[Library, ...]:
    return tuple(_library(Requirement(text), backend.extra) for text in backend.requires)


def _installed(backend: Backend) -> BackendHealth | None:
    """Return the health of a backend whose libraries are missing or do not fit, or that has none to
    import; None for one that has to be tried."""
    libraries = _libraries(backend)
    if wrong := [lib for lib in libraries if not lib.fits]:
        state = "not installed" if any(lib.found is None for lib in wrong) else "too old or new"
        reason = ", ".join(
            f"{lib.name}{lib.wanted} wanted, {lib.found or 'none'} found" for lib in wrong
        )
        return _health(backend, state, reason, wrong[0].fix)
    return None if backend.imports else _health(backend, "ready")


def _health(backend: Backend, state: str, problem: str = "", fix: str = "") -> BackendHealth:
    libraries, experts = _libraries(backend), backend.quantizes_experts()
    return BackendHealth(backend.name, state, libraries, problem, fix, experts)


def _tried(backend: Backend, problem: str, timeout: float) -> BackendHealth:
    if not problem:
        return _health(backend, "ready")
    fix = f"pip install --force-reinstall '{backend.extra or backend.imports[0]}'"
    if problem.startswith("no end"):  # a machine that is busy does not get faster by installing
        fix = f"wait longer, with --timeout {2 * timeout:g}; if that does not help, {fix}"
    return _health(backend, "broken", problem, fix)
