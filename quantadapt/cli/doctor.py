"""`quantadapt doctor`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .commands import TRACEBACK, add
from .flags import JsonOption
from .session import Session, session

if TYPE_CHECKING:
    from ..registry.doctor import BackendHealth, Diagnosis, PluginHealth


def register(app: typer.Typer, name: str) -> None:
    """Add the command to `app`."""
    add(
        app,
        name,
        doctor,
        "quantadapt doctor",
        "quantadapt doctor --no-imports --json",
    )


def doctor(
    imports: Annotated[
        bool,
        typer.Option("--imports/--no-imports", help="Also import every backend's libraries."),
    ] = True,
    anew: Annotated[
        bool,
        typer.Option("--anew", help="Also those that were imported well before."),
    ] = False,
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds after which an import counts as hanging.")
    ] = 120,
    json: JsonOption = False,
) -> None:
    """Check this installation and say what to install.

    What is installed is shown at once; the backends follow, as their libraries have been imported.
    Those that were imported well within a week, and have not changed since, are not imported again.
    Exits with 1 if something is missing that quantadapt itself needs. A backend that is missing
    or broken is named, and harms nothing.
    """
    with session(as_json=json) as shown:
        from ..registry.doctor import diagnose

        if json:
            found = diagnose(imports=imports, anew=anew, timeout=timeout)
            shown.print_json(found.to_dict())
        else:
            found = _told(shown, imports, anew, timeout)
        if found.problems:
            raise SystemExit(1)


def _told(shown: Session, imports: bool, anew: bool, timeout: float) -> Diagnosis:
    """Show what is found as soon as it is."""
    from ..registry.doctor import diagnose
    from .progress import Waiting

    with Waiting(shown.progress, "importing torch and every backend" if imports else "") as wait:

        def looked(found: Diagnosis) -> None:
            with wait.aside():
                _show(shown, found)
                _heading(shown, "Torch and backends")

        def torch(facts: dict[str, Any]) -> None:
            with wait.aside():
                problem = str(facts.get("problem", ""))
                _line(shown, "torch", problem or _torch(facts), TORCH_FIX if problem else "")

        def backend(health: BackendHealth) -> None:
            with wait.aside():
                _backend(shown, health)

        found = diagnose(
            imports=imports,
            anew=anew,
            timeout=timeout,
            on_look=looked,
            on_torch=torch,
            on_backend=backend,
        )
    verdict = "; ".join(found.problems)
    shown.out.print()
    shown.out.print(
        f"Missing: {verdict}" if verdict else "All that quantadapt itself needs is there.",
        style="bold red" if verdict else "bold green",
        markup=False,
        soft_wrap=True,
    )
    return found


_NAMES = 18
"""The width of the names: `compressed-tensors` is the longest of ours."""
TORCH_FIX = "reinstall it, in the build for your driver: https://pytorch.org/get-started/locally"


def _show(shown: Session, found: Diagnosis) -> None:
    """Show what is known without any import."""
    _heading(shown, "Machine")
    for name, value in _machine(found):
        _line(shown, name, value)
    _heading(shown, "Libraries")
    for lib in found.libraries:
        text = lib.found or "not installed"
        _line(shown, lib.name, f"{text}, {lib.wanted} wanted" if lib.fix else text, lib.fix)
    _heading(shown, "Plugins")
    for plugin in found.plugins:
        _plugin(shown, plugin)
    if found.commands:
        _heading(shown, "Commands of plugins")
        for origin in found.commands:
            _line(shown, "", origin)


def _machine(found: Diagnosis) -> list[tuple[str, str]]:
    return [
        ("quantadapt", found.quantadapt),
        ("python", found.python),
        ("platform", found.platform),
        ("cpus", str(found.cpus)),
        ("gpus", ", ".join(found.cuda) or "none that torch can use"),
    ]


def _torch(facts: dict[str, Any]) -> str:
    build, devices = facts.get("cuda_build"), facts.get("devices") or []
    text = f"ready, built for CUDA {build}" if build else "ready, built without CUDA"
    return ", ".join([text, *devices])


def _plugin(shown: Session, plugin: PluginHealth) -> None:
    if plugin.problem:
        fix = "tell its authors; `quantadapt doctor --traceback` shows the traceback"
        _line(shown, plugin.name, f"{plugin.origin} is broken: {plugin.problem}", fix)
        if os.environ.get(TRACEBACK, "") not in ("", "0"):
            shown.out.print(plugin.details, markup=False, soft_wrap=True)
    elif plugin.slow:
        fix = "tell its authors: libraries belong into the functions that need them"
        text = f"{plugin.origin} is slow: its import takes {plugin.seconds:.1f} s"
        _line(shown, plugin.name, text, fix)
    else:
        text = f"{plugin.origin}: {plugin.remark}" if plugin.remark else plugin.origin
        _line(shown, plugin.name, text)


def _backend(shown: Session, backend: BackendHealth) -> None:
    versions = ", ".join(f"{lib.name} {lib.found}" for lib in backend.libraries if lib.found)
    if backend.state in ("ready", "not checked"):
        experts = "" if backend.experts else "leaves experts dense"
        _line(shown, backend.name, ", ".join(filter(None, (backend.state, versions, experts))))
    else:
        _line(shown, backend.name, f"{backend.state}: {backend.problem}", backend.fix)


def _heading(shown: Session, text: str) -> None:
    shown.out.print(f"\n{text}", style="bold")


def _line(shown: Session, name: str, text: str, fix: str = "") -> None:
    style = "red" if fix else None
    shown.out.print(f"  {name:<{_NAMES}} {text}", style=style, markup=False, soft_wrap=True)
    if fix:
        shown.out.print(f"  {'':<{_NAMES}} fix: {fix}", markup=False, soft_wrap=True)
