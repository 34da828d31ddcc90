"""The documentation says what is: generated pages, links, command lines, YAML, the plugin page."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

import quantadapt
from quantadapt import hookspecs, scaffold
from quantadapt.comparing.grid import comparison
from quantadapt.registry import discover
from quantadapt.spec import Spec

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return [body for found, body in FENCE.findall(text) if found == language]


# Generated pages -------------------------------------------------------------------------------


@cache
def generator() -> Any:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_current() -> None:
    stale = [str(path.relative_to(ROOT)) for path in generator().stale()]
    assert not stale, "run: python docs/generate.py"


def test_generating_twice_gives_the_same() -> None:
    assert generator().pages() == generator().pages()


def test_no_page_is_written_without_a_plugin_of_ours(monkeypatch) -> None:
    """One that is not imported in time on a busy machine would be missing from the reference."""
    from quantadapt import registry

    known = registry.discover()
    for origin in (registry.Provenance("sft"), registry.Provenance("hqq", "", "quantadapt")):
        broken = [registry.BrokenPlugin(origin, "its import did not finish within 10 s")]
        monkeypatch.setattr(registry, "discover", lambda b=broken: replace(known, broken=b))
        with pytest.raises(RuntimeError, match=rf"{origin.plugin}.*did not finish within 10 s"):
            generator().pages()


def test_check_fails_where_a_page_is_stale(monkeypatch, tmp_path, capsys) -> None:
    module = generator()
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "pages", lambda: {tmp_path / "page.md": "new\n"})
    monkeypatch.setattr(module, "disagreements", lambda: [])
    assert module.main(["--check"]) == 1
    assert "page.md is out of date" in capsys.readouterr().out
    assert not (tmp_path / "page.md").exists()
    assert module.main([]) == 0
    assert module.main(["--check"]) == 0


def test_other_plugins_do_not_change_the_reference(monkeypatch) -> None:
    monkeypatch.setenv("QUANTADAPT_PLUGINS", "none")
    assert not generator().stale()


def hooks() -> list[str]:
    return [name for name in vars(hookspecs) if name.startswith("quantadapt_")]


@pytest.mark.parametrize("hook", hooks())
def test_every_hook_is_documented(hook: str) -> None:
    text = (DOCS / "reference" / "hooks.md").read_text(encoding="utf-8")
    _, found, section = text.partition(f"## {hook}\n")
    assert found
    summary = inspect.cleandoc(getattr(hookspecs, hook).__doc__).splitlines()[0]
    assert summary in section


def test_every_data_format_is_documented() -> None:
    from quantadapt.data.files import FORMATS, READERS

    page = DOCS / "how-to" / "use-your-data.md"
    text = page.read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in (*FORMATS, *READERS))
    examples = [set(json.loads(block)) for block in blocks(page, "json")]
    for columns in FORMATS.values():
        assert any(example >= set(columns) for example in examples), columns


# Links -----------------------------------------------------------------------------------------


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text(encoding="utf-8"))):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize(
    "page",
    [*PAGES, ROOT / "benchmarks" / "README.md"],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_each_table_has_a_head(page: Path) -> None:
    """What follows an empty line is no row of the table before it."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert re.match(r".*\n\|[ :|-]+\n", table), table.splitlines()[0]


@cache
def anchors(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_every_page_is_linked_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in DOCS.rglob("*.md"):
        if not page.is_relative_to(PLUGIN):  # a distribution of its own
            assert f"({page.relative_to(ROOT)})" in text, page


# Code ------------------------------------------------------------------------------------------


@cache
def application() -> Any:
    import typer

    from quantadapt.cli.app import build_app

    return typer.main.get_command(build_app())


def commands(script: str) -> Iterator[list[str]]:
    """Yield the commands of a shell script, without redirections and comments."""
    lexer = shlex.shlex(script, posix=True, punctuation_chars="&|;<>\n")
    lexer.whitespace = " \t\r"
    lexer.whitespace_split = True
    words: list[str] = []
    for token in (*lexer, "\n"):
        if token.strip("&|;<>\n"):
            words.append(token)
        elif words:
            yield words
            words = []


def parse(words: list[str], *, bare: bool = False) -> None:
    """Parse what follows `quantadapt` as the command line does, and run nothing.

    Args:
        bare: a command without any argument is only mentioned; it need not be complete.
    """
    if words[:1] in (["--help"], ["--version"]):
        return
    command = application()
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    assert command is not application(), f"no such command: {words}"
    if words or not bare:
        command.make_context(command.name, list(words))


@pages
def test_command_lines_parse(page: Path) -> None:
    for script in blocks(page, "sh"):
        for words in commands(script):
            if Path(words[0]).name == "quantadapt":
                parse(words[1:])
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for line in re.findall(r"`quantadapt ([^`]+)`", text):
        parse(shlex.split(line), bare=True)


@pages
def test_no_shell_takes_what_is_in_brackets_for_names_of_files(page: Path) -> None:
    """zsh refuses a line with a pattern that no file fits."""
    for script in blocks(page, "sh"):
        left = re.sub(r"'[^']*'|\"[^\"]*\"|#.*", "", script)
        assert not re.search(r"[\[\]*?]", left), left


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("run --bakend hqq", "No such option: --bakend"),
        ("walk", "no such command"),
        ("quantize ./model", "Missing parameter: output"),
        ("merge", "Missing parameter: run"),
    ],
)
def test_wrong_command_lines_do_not_parse(line: str, told: str) -> None:
    with pytest.raises(Exception, match=told):  # which module has its class is typer's matter
        parse(line.split())


@pages
def test_yaml_is_a_spec(page: Path) -> None:
    for block in blocks(page, "yaml"):
        values = yaml.safe_load(block)
        if "grid" in values:
            comparison(values, values.pop("grid"), **values.pop("compare", {}))
        else:
            Spec(**values)


@pages
def test_python_names_exist(page: Path) -> None:
    for block in blocks(page, "python"):
        if not block.startswith("def quantadapt_"):  # a signature in the reference
            compile(block, str(page), "exec")
        for name in re.findall(r"\bqa\.(\w+)", block):
            assert name in quantadapt.__all__, name


# The README ------------------------------------------------------------------------------------


def test_two_commands_do_all_the_set_up() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    start = re.split(r"^## ", text, flags=re.MULTILINE)[2]
    assert start.startswith("Start\n")
    first, second, *_ = [body.strip() for _, body in FENCE.findall(start)]
    assert "\n" not in first + second
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    steps = [
        line.replace('"$venv/bin/', ".venv/bin/").replace('"', "").replace(" --quiet", "")
        for line in ci.splitlines()
    ]
    for step in second.split(" && "):
        assert any(line.startswith(step) for line in steps), step
    assert first.split(" && ")[0] == "python3 -m venv .venv"
    assert first.split(" && ")[1].startswith(".venv/bin/pip install -c constraints.txt -e ")


# The tutorial for plugins ----------------------------------------------------------------------

PLUGIN = DOCS / "tutorial" / "quantadapt-absmax"


def quotes() -> list[str]:
    page = DOCS / "tutorial" / "write-a-backend.md"
    return [*blocks(page, "python"), *blocks(page, "toml")]


@pytest.mark.parametrize("quote", quotes(), ids=lambda quote: quote.split("(")[0])
def test_the_tutorial_quotes_its_plugin(quote: str) -> None:
    """Methods are quoted without their indentation."""
    files = [file for file in PLUGIN.rglob("*") if file.suffix in (".py", ".toml")]
    texts = [file.read_text(encoding="utf-8") for file in files]
    wanted = (quote, textwrap.indent(quote, "    "))
    assert any(part in text for text in texts for part in wanted)


HOW_TO = DOCS / "how-to" / "write-an-adapter.md"
QUOTED = [block for block in blocks(HOW_TO, "python") if "from_pretrained" not in block]


@pytest.mark.parametrize("quote", QUOTED, ids=lambda quote: quote.split("(")[0])
def test_the_page_on_adapters_quotes_what_plugin_new_writes(quote: str) -> None:
    wanted = (quote, textwrap.indent(quote, "    "))
    texts = scaffold.contents("rescale", "adapter").values()
    assert any(part in text for text in texts for part in wanted)


def test_the_page_on_adapters_names_every_file() -> None:
    assert len(QUOTED) == 6
    text = HOW_TO.read_text(encoding="utf-8")
    for path in scaffold.contents("rescale", "adapter"):
        assert f"`{path}`" in text, path


@pytest.mark.parametrize(
    ("module", "name"),
    [
        *(("protocols", f"Quantizer.{method}") for method in ("quantize", "save", "load")),
        *(("protocols", f"LayerwiseQuantizer.{n}_linear") for n in ("quantize", "load")),
        *(("protocols", f"AdapterTarget.{n}") for n in ("matches", "dequantize", "requantize")),
        *(("calibration", name) for name in ("LayerInputs", "walk_blocks", "each_block")),
    ],
)
def test_what_a_backend_implements_and_is_handed_is_in_the_reference(module, name) -> None:
    page = (DOCS / "reference" / "backend-api.md").read_text(encoding="utf-8")
    _, found, section = page.partition(f"# {name}\n")
    assert found
    section = re.split(r"^#+ ", section, flags=re.MULTILINE)[0]
    real: Any = importlib.import_module(f"quantadapt.{module}")
    for part in name.split("."):
        real = getattr(real, part)
    for argument in inspect.signature(real).parameters:
        assert re.search(rf"\b{argument}\b", section), argument


def test_names_of_the_reference_can_be_imported_from_where_it_says() -> None:
    page = (DOCS / "reference" / "backend-api.md").read_text(encoding="utf-8")
    found = re.findall(r"^### (\w+)\n\nIn `([\w.]+)`\.$", page, re.MULTILINE)
    assert len(found) > 12
    for name, module in found:
        assert hasattr(importlib.import_module(module), name), name


def test_the_tutorial_names_every_file_of_its_plugin() -> None:
    text = (DOCS / "tutorial" / "write-a-backend.md").read_text(encoding="utf-8")
    for path in scaffold.contents("absmax"):
        assert f"`{path}`" in text, path


def test_an_installed_plugin_does_not_change_the_reference(tmp_path, monkeypatch) -> None:
    info = tmp_path / "quantadapt_absmax-0.1.0.dist-info"
    info.mkdir()
    metadata = "Metadata-Version: 2.1\nName: quantadapt-absmax\nVersion: 0.1.0\n"
    (info / "METADATA").write_text(metadata, encoding="utf-8")
    (info / "entry_points.txt").write_text("[quantadapt]\nabsmax = quantadapt_absmax\n")
    before = generator().pages()
    monkeypatch.syspath_prepend(str(PLUGIN / "src"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("QUANTADAPT_PLUGINS", raising=False)
    assert discover().backend("absmax").name == "absmax"
    assert generator().pages() == before
    sys.modules.pop("quantadapt_absmax", None)
