"""Are a backend's libraries there, new enough, and do they import?"""

from __future__ import annotations

from importlib import import_module

from packaging.requirements import Requirement

from .errors import MissingDependency, Problem
from .machine import installed_version
from .records import Backend


def missing_requirements(backend: Backend) -> list[Problem]:
    """Return a problem for each distribution that is missing or too old. Imports nothing."""
    problems = []
    for text in backend.requires:
        requirement = Requirement(text)
        found = installed_version(requirement.name)
        fix = f"pip install '{backend.extra}'" if backend.extra else f"pip install '{text}'"
        if found is None:
            what = f"backend {backend.name!r} needs {requirement.name}, which is not installed"
            problems.append(Problem(what, fix, where="backend"))
        elif not requirement.specifier.contains(found, prereleases=True):
            what = f"backend {backend.name!r} needs {text}, but {found} is installed"
            problems.append(Problem(what, fix, where="backend"))
    return problems


def import_requirements(backend: Backend) -> None:
    """Import what the backend needs. Raises MissingDependency with the reason if that fails."""
    for name in backend.imports:
        try:
            import_module(name)
        except Exception as error:
            fix = f"reinstall it: pip install --force-reinstall '{backend.extra or name}'"
            what = f"backend {backend.name!r} needs {name}, which fails to import: {error!r}"
            raise MissingDependency(what, fix=fix, where="backend") from error
