"""Configs to start from: YAML files, one for each use.

`quantadapt init NAME` writes one for you to change. Wherever a config is asked for, in a command or
by `Spec.load`, its bare name stands for it.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import Problem, SpecError
from .likely_names import did_you_mean

_PACKAGE = Path(__file__).resolve().parents[1]
FOLDER = next(path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.exists())
"""In the package where that was installed, beside it in a checkout."""
COMPARISONS = "comparisons"
"""The folder of those for `quantadapt compare`."""


def names(kind: str = "") -> list[str]:
    """Return what the configs are called, the demo's first; those of runs, or of `COMPARISONS`."""
    found = (file.stem for file in (FOLDER / kind).glob("*.yaml"))
    return sorted(found, key=lambda name: (name != "demo", name))


def summary(name: str) -> str:
    """Return what the config called `name` is for: its first line, a comment."""
    first, *_ = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return first.removeprefix("#").strip()


def shipped(name: str, kind: str = "") -> Path:
    """Return the config called `name`. Raises SpecError where there is none."""
    if name not in names(kind):
        what = f"there is no config {name!r}"
        raise SpecError([Problem(what, did_you_mean(name, names(kind)))])
    return FOLDER / kind / f"{name}.yaml"


def located(source: str | Path, kind: str = "") -> Path:
    """Return the file that `source` means: a path, or the bare name of a config here.

    A file of that name in the folder where one is goes before. Raises SpecError.
    """
    path = Path(source).expanduser()
    if path.exists() or path.suffix or path.name != str(source):
        return path
    return shipped(str(source), kind)
