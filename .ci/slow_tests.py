"""Print the test files whose slow tests the last commit may concern, one a line.

These are the ones that it changed, and those that name a room of the package, or a plugin, in which
it changed something. A change that all tests depend on (their helpers, pyproject.toml) names all.
"""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def changed() -> list[str]:
    """Return the paths that the last commit touched."""
    command = ["git", "diff", "--name-only", "HEAD~1"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.split("\n") if found.returncode == 0 else ["pyproject.toml"]


def words(paths: list[str]) -> set[str] | None:
    """Return what test files say that paths concern; None where they concern all."""
    found = set()
    for path in paths:
        if path.endswith(".md"):
            continue
        first, _, rest = path.partition("/")
        room = rest.partition("/")[0].removesuffix(".py")
        if path in ("pyproject.toml", "constraints.txt") or path == "tests/conftest.py":
            return None
        if first == "tests" and rest.startswith("test_"):
            found.add(rest)
        elif first == "tests":
            found.add(f"{room} import")
        elif first == "quantadapt":
            found |= {f"quantadapt.{room}", f"import {room}"}
        elif first in ("plugins", "benchmarks", "notebooks", "configs"):
            found.add(room if first == "plugins" else first)
    return found


def main() -> None:
    """Print them."""
    concerned = words(changed())
    pattern = re.compile("|".join(rf"\b{re.escape(word)}\b" for word in concerned or ()))
    for file in sorted((ROOT / "tests").glob("test_*.py")):
        text = file.read_text(encoding="utf-8")
        if "slow" not in text:
            continue
        if concerned is None or (concerned and (file.name in concerned or pattern.search(text))):
            print(file.relative_to(ROOT))


if __name__ == "__main__":
    main()
