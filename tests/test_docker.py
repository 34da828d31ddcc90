"""The Dockerfile, as far as it can be read without a daemon that builds it."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LINES = [
    " ".join(line.split())
    for line in re.sub(r"\\\n", "", re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE)).splitlines()
    if line.strip()
]


def instructions(name: str) -> list[str]:
    return [line.removeprefix(f"{name} ") for line in LINES if line.startswith(f"{name} ")]


def ignored(path: str) -> bool:
    """Whether .dockerignore leaves a path of the root out: the last line that fits decides."""
    found = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#") and fnmatch(path, line.removeprefix("!")):
            found = not line.startswith("!")
    return found


def test_all_that_is_copied_is_there_and_nothing_else_is_sent() -> None:
    copied = [
        path for line in instructions("COPY") if "--from" not in line for path in line.split()[:-1]
    ]
    assert {"constraints.txt", "pyproject.toml", "quantadapt", "plugins"} <= set(copied)
    for path in copied:
        assert (ROOT / path).exists(), path
        assert not ignored(path), path
    sent = [path.name for path in ROOT.iterdir() if not ignored(path.name)]
    assert sorted(sent) == sorted(copied)


def test_it_has_all_that_the_wheel_is_built_from() -> None:
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    packed, project = (*wheel["only-include"], *wheel["force-include"]), PROJECT["project"]
    for path in (*packed, project["readme"], *project["license-files"]):
        assert not ignored(path), path


def test_every_install_is_pinned_and_of_extras_that_there_are() -> None:
    installs = [line for line in instructions("RUN") if "pip install" in line]
    assert len(installs) == 2
    assert all("pip install -c constraints.txt " in line for line in installs)
    (extras,) = re.findall(r"^ARG EXTRAS=(.+)$", TEXT, re.MULTILINE)
    assert set(extras.split(",")) <= set(PROJECT["project"]["optional-dependencies"])


def test_it_runs_the_command_and_not_as_root() -> None:
    (user,) = instructions("USER")
    assert int(user) > 0
    assert f"useradd --uid {user} " in TEXT
    (command,) = re.findall(r'^ENTRYPOINT \["(.+)"\]$', TEXT, re.MULTILINE)
    assert command in PROJECT["project"]["scripts"]
    assert LINES.index(f"USER {user}") > LINES.index("COPY --from=build /opt/venv /opt/venv")
