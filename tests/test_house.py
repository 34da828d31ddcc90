"""Which folder may import which; imports inside functions count, those for annotations do not."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import quantadapt

ROOT = Path(quantadapt.__file__).parent
ORDER = [
    *(
        "__main__",
        "cli",
        "judging",
        "studio",
        "serving",
        "testing",
        "scaffold",
        "matrix",
        "__init__",
        "pipeline",
        "comparing",
        "reporting",
    ),
    *(
        "exporting",
        "stages",
        "objectives",
        "training",
        "adapting",
        "quantizing",
        "planning",
        "showing",
        "registry",
    ),
    "benchmarking",
    "rewarding",
    "generation",
    *(
        "evaluation",
        "data",
        "sharding",
        "streaming",
        "fused_kernels",
        "dependencies",
        "facade",
        "records",
        "protocols",
    ),
    *("layerwise", "loading", "calibration", "model", "hookspecs", "distributed", "folders"),
    *("spec", "capabilities", "memory", "dense_words", "triton_dense"),
    *("triton_rounding", "compiling", "machine"),
    *("remote_code", "inputs", "paths", "probe", "demo", "errors", "moved"),
]
"""A file imports only from rooms further on in this list, and from its own."""
WITHOUT_TORCH = [
    *("planning", "registry", "memory", "folders", "distributed", "data", "reporting", "matrix"),
    "comparing",
    *("pipeline", "stages", "errors", "capabilities", "records", "protocols", "hookspecs"),
    *("spec", "inputs", "paths", "machine", "dependencies", "remote_code"),
]


def typed(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        if not typed(child):
            yield from imports(child)


def targets(file: Path, node: ast.Import | ast.ImportFrom) -> list[str]:
    """Return the rooms that an import takes something from."""
    if isinstance(node, ast.Import):
        whole = [alias.name.split(".") for alias in node.names]
        return [(parts[1:] or ["__init__"])[0] for parts in whole if parts[0] == "quantadapt"]
    base = list(file.relative_to(ROOT).with_suffix("").parts[: -node.level]) if node.level else []
    names = [*base, *(node.module.split(".") if node.module else ())]
    if not node.level:
        if names[0] != "quantadapt":
            return []
        names = names[1:]
    if names:
        return [names[0]]
    return [alias.name if alias.name in ORDER else "__init__" for alias in node.names]


@cache
def imports_of(file: Path) -> list[ast.Import | ast.ImportFrom]:
    return list(imports(ast.parse(file.read_text(encoding="utf-8"))))


def arrows() -> Iterator[tuple[str, str, str]]:
    """Yield (place, room, room that it imports from)."""
    for file in sorted(ROOT.rglob("*.py")):
        room = file.relative_to(ROOT).with_suffix("").parts[0]
        for node in imports_of(file):
            for target in targets(file, node):
                yield f"{file.relative_to(ROOT)}:{node.lineno}", room, target


def test_arrows_run_downward() -> None:
    wrong = [
        f"{place} imports {target}"
        for place, room, target in arrows()
        if target != room and ORDER.index(target) <= ORDER.index(room)
    ]
    assert not wrong, "\n".join(wrong)


def test_every_room_has_its_place_in_the_order() -> None:
    rooms = {file.relative_to(ROOT).with_suffix("").parts[0] for file in ROOT.rglob("*.py")}
    assert rooms == set(ORDER)


def test_files_inside_a_folder_stand_in_no_circle() -> None:
    """Of modules, not only of folders: the order above says nothing of files in one room."""
    graph: dict[str, set[str]] = {}
    for file in sorted(ROOT.rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        graph[".".join(parts)] = {
            found for node in imports_of(file) for found in modules(file, node)
        }
    left = dict(graph)
    while free := [name for name, needs in left.items() if not (needs & set(left)) - {name}]:
        for name in free:
            del left[name]
    assert not left, "\n".join(f"{name} <- {sorted(graph[name] & set(left))}" for name in left)


def modules(file: Path, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """Yield the files of the package that an import names, dotted, without the package."""
    if isinstance(node, ast.Import) or not node.level:
        return
    base = file.relative_to(ROOT).with_suffix("").parts[: -node.level]
    path = [*base, *(node.module.split(".") if node.module else ())]
    for alias in node.names:
        for parts in ([*path, alias.name], path, [*path, "__init__"]):
            if parts and ROOT.joinpath(*parts).with_suffix(".py").is_file():
                yield ".".join(parts)
                break


def test_the_root_can_be_read_at_once() -> None:
    assert len(list(ROOT.glob("*.py"))) <= 20


def test_importing_them_loads_no_torch() -> None:
    """All in one process, which names the first that does."""
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(f'quantadapt.{name}')\n"
        "    if 'torch' in sys.modules: sys.exit(name)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *WITHOUT_TORCH], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_old_paths_warn_and_give_the_same_objects() -> None:
    from quantadapt.exporting import manifest, stage
    from quantadapt.moved import MOVED

    with pytest.warns(DeprecationWarning, match="quantadapt.saving has moved to"):
        old = importlib.import_module("quantadapt.saving")
    assert old.merge is stage.merge
    assert old.RECORD is manifest.MANIFEST
    homes = [home for names in MOVED.values() for home in names.split()]
    assert all(ROOT.joinpath(*home.split(".")).with_suffix(".py").is_file() for home in homes)
    assert not [name for name in MOVED if (ROOT / f"{name}.py").exists()]


def test_a_name_that_never_was_is_no_module() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("quantadapt.utils")


def test_what_is_tried_in_part_is_a_test() -> None:
    from conftest import THINNED

    texts = {file.name: file.read_text() for file in Path(__file__).parent.glob("test_*.py")}
    for entry in THINNED:
        file, _, name = entry.rpartition("::")
        found = [known for known, text in texts.items() if f"def {name}(" in text]
        assert file in found or (found and not file), entry


def written(node: ast.AST) -> str:
    """Return the text of a string in code, with 0 for what stands in braces."""
    if isinstance(node, ast.JoinedStr):
        return "".join(written(part) or "0" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def test_percent_signs_stand_at_their_numbers() -> None:
    """`12%` and not `12 %`, on pages and in all that the code says."""
    home, texts = Path(__file__).parents[1], list[tuple[Path, int, str]]()
    for file in (*home.glob("*.md"), *home.glob("docs/**/*.md"), *home.glob("benchmarks/*.md")):
        lines = file.read_text(encoding="utf-8").splitlines()
        texts += [(file, number, line) for number, line in enumerate(lines, 1)]
    for file in (*ROOT.rglob("*.py"), *home.glob("plugins/**/*.py")):
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        texts += [(file, node.lineno, text) for node in nodes if (text := written(node))]
    apart = [
        f"{file.relative_to(home)}:{number}"
        for file, number, text in texts
        if re.search(r"\d %(?!})", text)
    ]
    assert not apart, "\n".join(apart)
