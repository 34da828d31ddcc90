"""Writes a new plugin: a distribution with a backend or an adapter, which passes the suite.

Each kind of plugin has a folder of templates here, with `@name@` and the like to be filled in; what
all kinds need lies beside this module. What comes out for the backend absmax is
docs/tutorial/quantadapt-absmax, which the tutorial explains.
"""

from __future__ import annotations

import re
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

from .. import __version__
from ..errors import OutputError, PlanRefused, Problem
from ..folders.atomic import atomic_folder, is_free
from ..planning.peft_options import shipped
from ..registry.discovery import registry

Kind = Literal["backend", "calibrated", "activations", "adapter"]

PREFIX = "quantadapt-"
LONGEST = 40


class _Plugin(NamedTuple):
    """What tells one kind of plugin from another, beside its folder of templates.

    Attributes:
        record: the kind of record that it provides.
        what: what it does, for its description.
        keyword: one more word under which it is found.
        tests: what its tests need.
        reserved: names of which a class would come that hides the one it derives from.
        code: the file that its author is to change first.
    """

    record: Literal["backend", "adapter"]
    what: str
    keyword: str = "quantization"
    tests: str = '"pytest>=8"'
    reserved: tuple[str, ...] = ("layerwise",)
    code: str = "layer.py"


PLUGINS: dict[Kind, _Plugin] = {
    "backend": _Plugin("backend", "int8 weights"),
    "calibrated": _Plugin("backend", "int4 weights, clipped by what calibration data show"),
    "activations": _Plugin("backend", "int8 weights and inputs"),
    "adapter": _Plugin(
        "adapter",
        "learned scales for linear layers",
        keyword="peft",
        tests='"pytest>=8", "quantadapt[hqq]"',
        reserved=("peft", "base-tuner", "default"),  # PEFT looks for ".default" in keys
        code="method.py",
    ),
}
SHARED = {
    "pyproject.toml": "pyproject.toml.in",
    ".gitignore": "gitignore.in",
    ".github/workflows/test.yml": "test.yml.in",
}
"""Path in the new distribution -> template."""


def contents(name: str, kind: Kind = "backend") -> dict[str, str]:
    """Return path -> text of every file of the plugin called `name`."""
    source = "src/quantadapt_@module@"
    code = PLUGINS[kind].code
    templates = {
        "README.md": f"{kind}/README.md.in",
        **SHARED,
        f"{source}/__init__.py": f"{kind}/plugin.py.in",
        f"{source}/{code}": f"{kind}/{code}.in",
        "tests/test_@module@.py": f"{kind}/test.py.in",
    }
    folder, values = files(__name__), _values(name, kind)
    return {
        _filled(path, values): _filled((folder / template).read_text(encoding="utf-8"), values)
        for path, template in templates.items()
    }


def write(name: str, folder: Path, kind: Kind = "backend") -> list[str]:
    """Write the plugin called `name` into a new or empty folder, whole or not at all.

    Returns:
        The paths of its files.

    Raises:
        PlanRefused: the name cannot be used.
        OutputError: the folder is taken or cannot be written; nothing in it was touched.
    """
    if problem := name_problem(name, kind):
        raise PlanRefused([problem])
    if folder.expanduser().resolve() == Path.cwd():
        what, fix = "this is the folder that you are in", "go elsewhere, or name a new folder"
        raise OutputError(what, fix=fix, where=str(folder))
    if folder.expanduser().is_dir() and not is_free(folder.expanduser()):
        raise OutputError("the folder is not empty", fix="name a new folder", where=str(folder))
    made = contents(name, kind)
    with atomic_folder(folder, listed=False) as temporary:
        for path, text in made.items():
            target = temporary / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8", newline="\n")
    return list(made)


def name_problem(name: str, kind: Kind = "backend") -> Problem | None:
    """Say why `name` cannot be the name of a new plugin and its record, or return None."""
    plugin = PLUGINS[kind]
    if name.startswith(PREFIX):
        fix = f"write {name.removeprefix(PREFIX)!r}"
        return Problem(f"{name!r} has the prefix that is added anyway", fix, where="NAME")
    if not _is_name(name):
        article = "an" if plugin.record == "adapter" else "a"
        what = (
            f"{name!r} is no name for {article} {plugin.record}: that is lower-case letters, "
            f"digits and single hyphens, {LONGEST} at most, and begins with a letter"
        )
        nearest = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        return Problem(what, f"try {nearest!r}" if _is_name(nearest) else "", where="NAME")
    if taken := _taken_by(name, plugin):
        return Problem(f"the name {name!r} is taken by {taken}", "choose another name", "NAME")
    return None


def _taken_by(name: str, plugin: _Plugin) -> str:
    """Say who has the name already, or return ""."""
    if claims := registry().claims(name, plugin.record):
        return str(claims[0])
    if plugin.record == "adapter" and shipped(name.replace("-", "")):
        return "a method of PEFT"
    module = f"quantadapt_{name.replace('-', '_')}"
    if name in plugin.reserved or find_spec(module) is not None:
        return f"quantadapt itself, or by an installed {module}"
    return ""


def _is_name(name: str) -> bool:
    return len(name) <= LONGEST and bool(re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name))


def _values(name: str, kind: Kind) -> dict[str, str]:
    plugin = PLUGINS[kind]
    return {
        "name": name,
        "module": name.replace("-", "_"),
        "Class": "".join(part.capitalize() for part in name.split("-")),
        "version": ".".join(__version__.split(".")[:2]),
        "noun": plugin.record,
        "what": plugin.what,
        "keyword": plugin.keyword,
        "tests": plugin.tests,
    }


def _filled(template: str, values: dict[str, str]) -> str:
    return re.sub(r"@(\w+)@", lambda found: values[found[1]], template)
