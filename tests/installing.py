"""Puts a distribution on the path, as an installer would."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from quantadapt.registry import registry


def install(folder: Path, site: Path) -> None:
    """Write into `site` what says that the distribution in `folder` is installed."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1.0\n"
    (info / "METADATA").write_text(metadata)
    points = project["entry-points"]["quantadapt"]
    lines = [f"{name} = {module}" for name, module in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[quantadapt]", *lines, ""]))


@contextmanager
def installed(folder: Path, site: Path) -> Iterator[None]:
    """Install a distribution, and forget it and its modules afterwards."""
    loaded = set(sys.modules)
    install(folder, site)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("QUANTADAPT_PLUGINS", raising=False)
        patch.syspath_prepend(str(site))
        patch.syspath_prepend(str(folder / "src"))
        registry.cache_clear()
        yield
    registry.cache_clear()
    code = {path.stem for path in (*folder.glob("src/*"), *folder.glob("tests/*.py"))}
    for name in set(sys.modules) - loaded:
        if name.partition(".")[0] in code:
            del sys.modules[name]
