"""Writes a new plugin: a distribution with a backend that passes the conformance suite.

The templates beside this module are its files, with `@name@` and the like to be filled in. What
comes out for the name absmax is docs/tutorial/quantadapt-absmax, which the tutorial explains.
"""

from __future__ import annotations

import re
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from .. import __version__
from ..errors import OutputError, PlanRefused, Problem
from ..folders.atomic import atomic_folder, is_free
from ..registry.discovery import registry

PREFIX = "quantadapt-"
LONGEST = 40
RESERVED = ("layerwise",)
"""Of which a class LayerwiseTarget would come, that hides the one it derives from."""
TEMPLATES = {
    "README.md": "README.md.in",
    "pyproject.toml": "pyproject.toml.in",
    ".gitignore": "gitignore.in",
    ".github/workflows/test.yml": "test.yml.in",
    "src/quantadapt_@module@/__init__.py": "plugin.py.in",
    "src/quantadapt_@module@/layer.py": "layer.py.in",
    "tests/test_@module@.py": "test_backend.py.in",
}
"""Path in the new distribution -> template."""


def contents(name: str) -> dict[str, str]:
    """Return path -> text of every file of the plugin called `name`."""
    folder = files(__name__)
    return {
        _filled(path, name): _filled((folder / template).read_text(encoding="utf-8"), name)
        for path, template in TEMPLATES.items()
    }


def write(name: str, folder: Path) -> list[str]:
    """Write the plugin called `name` into a new or empty folder, whole or not at all.

    Returns:
        The paths of its files.

    Raises:
        PlanRefused: the name cannot be used.
        OutputError: the folder is taken or cannot be written; nothing in it was touched.
    """
    if problem := name_problem(name):
        raise PlanRefused([problem])
    if folder.expanduser().resolve() == Path.cwd():
        what, fix = "this is the folder that you are in", "go elsewhere, or name a new folder"
        raise OutputError(what, fix=fix, where=str(folder))
    if folder.expanduser().is_dir() and not is_free(folder.expanduser()):
        raise OutputError("the folder is not empty", fix="name a new folder", where=str(folder))
    made = contents(name)
    with atomic_folder(folder) as temporary:
        for path, text in made.items():
            target = temporary / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8", newline="\n")
    return list(made)


def name_problem(name: str) -> Problem | None:
    """Say why `name` cannot be the name of a new plugin and its backend, or return None."""
    if name.startswith(PREFIX):
        fix = f"write {name.removeprefix(PREFIX)!r}"
        return Problem(f"{name!r} has the prefix that is added anyway", fix, where="NAME")
    if not _is_name(name):
        what = (
            f"{name!r} is no name for a backend: that is lower-case letters, digits and single "
            f"hyphens, {LONGEST} at most, and begins with a letter"
        )
        nearest = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        return Problem(what, f"try {nearest!r}" if _is_name(nearest) else "", where="NAME")
    if claims := registry().claims(name):
        what = f"the name {name!r} is taken by {claims[0]}"
        return Problem(what, "choose another name", where="NAME")
    module = _filled("quantadapt_@module@", name)
    if name in RESERVED or find_spec(module) is not None:
        what = f"the name {name!r} is taken by quantadapt itself, or by an installed {module}"
        return Problem(what, "choose another name", where="NAME")
    return None


def _is_name(name: str) -> bool:
    return len(name) <= LONGEST and bool(re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name))


def _filled(template: str, name: str) -> str:
    values = {
        "name": name,
        "module": name.replace("-", "_"),
        "Class": "".join(part.capitalize() for part in name.split("-")),
        "version": ".".join(__version__.split(".")[:2]),
    }
    return re.sub(r"@(\w+)@", lambda found: values[found[1]], template)
