"""Print the test files whose slow tests the last commit may concern, one a line.

These are the ones that it changed, and those that name a room of the package, or a plugin, in which
it changed something. A change that all tests depend on (their helpers, pyproject.toml) names all.
Suites of `quantadapt.testing` name no room: they concern those that each test of theirs goes
through, and their backend.
"""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUITE = r"^class \w+\((\w+, )*\w*Suite\b"
THROUGH = ("adapting", "exporting", "facade", "layerwise", "loading", "quantizing", "testing")
"""Rooms that a suite's tests go through."""


def changed() -> list[str]:
    """Return the paths that the last commit touched."""
    command = ["git", "diff", "--name-only", "HEAD~1"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.split("\n") if found.returncode == 0 else ["pyproject.toml"]


def patterns(paths: list[str]) -> set[str] | None:
    """Return what the test files that paths concern match, their names first; None for all."""
    found = set()
    for path in paths:
        if path.endswith(".md"):
            continue
        first, _, rest = path.partition("/")
        room = rest.partition("/")[0].removesuffix(".py")
        if path in ("pyproject.toml", "constraints.txt") or path == "tests/conftest.py":
            return None
        if first == "tests" and rest.startswith("test_"):
            found.add(rf"\A{re.escape(rest)}$")
        elif first == "tests":
            found.add(rf"\b{room} import\b")
        elif first == "quantadapt":
            found |= {rf"\bquantadapt\.{room}\b", rf"\bimport {room}\b"}
            found |= {SUITE} if room in THROUGH else set()
        elif first == "plugins":
            short = room.removeprefix("quantadapt_").replace("_", "-")
            found |= {rf"\b{room}\b", rf'\bbackend = "\w*{short}'}
        elif first in ("benchmarks", "notebooks", "configs"):
            found.add(rf"\b{first}\b")
    return found


def main() -> None:
    """Print them."""
    concerned = patterns(changed())
    conftest = (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8")
    thinned = "|".join(re.findall(r'"(?:\w+\.py::)?(test_\w+)["\[]', conftest))
    slow = rf"slow|{SUITE}|^def ({thinned})\("
    for file in sorted((ROOT / "tests").glob("test_*.py")):
        text = f"{file.name}\n{file.read_text(encoding='utf-8')}"
        if not re.search(slow, text, re.MULTILINE):
            continue
        if concerned is None or any(re.search(p, text, re.MULTILINE) for p in concerned):
            print(file.relative_to(ROOT))


if __name__ == "__main__":
    main()
