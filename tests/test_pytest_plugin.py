"""The pytest plugin: `pytest --pyargs quantadapt.testing --backend NAME`, and the class form.

What is run here asks no vendor to work; test_verify runs the whole suite through the plugin.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from quantadapt import __version__
from quantadapt.testing.asked import Asked
from quantadapt.testing.plugin import Results, pytest_addoption

PYARGS = ("--pyargs", "quantadapt.testing")
SECTION = f"not verified here (conformance suite of quantadapt {__version__})"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that runs pytest as users do, with the plugin installed."""
    info = tmp_path / "site" / "qa_pytest-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: qa-pytest\nVersion: 1.2\n")
    name = "quantadapt.testing.plugin"
    (info / "entry_points.txt").write_text(f"[pytest11]\n{name} = {name}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=os.pathsep)
    for variable in ("PYTEST_ADDOPTS", "QUANTADAPT_RESULTS", "QUANTADAPT_PROGRESS"):
        monkeypatch.delenv(variable, raising=False)
    project = tmp_path / "project"
    project.mkdir()

    def call(*arguments: str, **files: str) -> subprocess.CompletedProcess[str]:
        for stem, text in files.items():
            (project / f"{stem}.py").write_text(text)
        (project / "pytest.ini").write_text("[pytest]\n")
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
        return subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)

    return call


# Runs that have nothing to do with the suite ------------------------------------------------------


def test_the_plugin_imports_nothing_but_itself():
    code = """if True:
        import sys, json, pytest
        before = set(sys.modules)
        import quantadapt.testing.plugin
        new = set(sys.modules) - before
        print(json.dumps(sorted(new - set(sys.stdlib_module_names))))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = [name for name in json.loads(done.stdout) if name.split(".")[0] not in ("collections",)]
    own = ("testing", "testing.parts", "testing.plugin")
    assert found == ["quantadapt", "quantadapt.moved", *(f"quantadapt.{name}" for name in own)]


CONFTEST = """
def pytest_addoption(parser):
    for name in ("--backend", "--device", "--dtype", "--adapter"):
        parser.addoption(name, default="mine")
"""
FOREIGN = """
import sys
import time

def test_options(request):
    assert request.config.getoption("--device") == "mine"

def test_modules():
    assert "quantadapt.testing.plugin" in sys.modules
    assert not {"torch", "pydantic", "yaml", "quantadapt.testing.suite"} & set(sys.modules)
"""


def test_other_runs_do_not_notice_it(run):
    done = run(conftest=CONFTEST, test_foreign=FOREIGN)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout
    assert "quantadapt" not in done.stdout
    assert "conformance" not in run("--help").stdout


# Asking for a backend -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "say which backend: --backend NAME; there are "),
        ("--backend hqw", "no backend is called 'hqw'\n    fix: did you mean 'hqq'?"),
        ("--backend none --adapter lora,lorra", "no adapter is called 'lorra'\n    fix: did you "),
        ("--backend hqq --backend-options bit=3", "no option 'bit'\n    fix: did you mean 'bits'?"),
        ("--backend hqq --backend-options 3", "'3' names no options"),
        ("--backend none --device cuda:99", "CUDA device"),
        ("--backend none --dtype float64", "'float64' is not possible"),
    ],
)
def test_mistakes_are_usage_errors(arguments: str, message: str):
    options = argparse.ArgumentParser()
    group = SimpleNamespace(addoption=options.add_argument)
    called = SimpleNamespace(invocation_params=SimpleNamespace(args=PYARGS))
    pytest_addoption(
        SimpleNamespace(getgroup=lambda *_: group), SimpleNamespace(get_plugin=lambda _: called)
    )
    with pytest.raises(pytest.UsageError, match=re.escape(message)):
        Asked(SimpleNamespace(option=options.parse_args(arguments.split())))


@pytest.mark.slow
def test_a_mistake_ends_pytest_without_a_traceback(run):
    done = run(*PYARGS, "--backend", "hqw")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "no backend is called 'hqw'\n    fix: did you mean 'hqq'?" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_tests_of_one_adapter_follow_each_other(run):
    options = ("--backend-options", "bits=3,group_size=32", "--adapter", "ia3", "--adapter", "lora")
    done = run(*PYARGS, "--backend", "hqq", *options, "--dtype", "bfloat16", "--collect-only", "-q")
    assert done.returncode == 0, done.stderr
    ids = [line for line in done.stdout.splitlines() if "::" in line]
    assert all("test_backend.py::hqq::" in line for line in ids)
    assert len(ids) > 50
    found = [re.search(r"\[(?:\w+-)?(ia3|lora)(?:-\w+)?\]", line) for line in ids]
    parts = [match[1] if match else "" for match in found]
    changes = [b for a, b in zip([None, *parts], parts, strict=False) if a != b]
    assert changes == ["", "ia3", "lora", ""]
    assert "test_dequantized_is_close_to_the_original" in " ".join(ids[: parts.index("ia3")])


@pytest.mark.slow
def test_several_backends_and_all_adapters(run):
    from quantadapt.registry import registry

    names = ("--backend", "none", "--backend", "hqq")
    done = run(*PYARGS, *names, "--all-adapters", "--collect-only", "-q")
    assert done.returncode == 0, done.stderr
    for name in ("none", "hqq"):
        found = re.findall(rf"::{name}::test_plan_agrees_with_the_rules\[(\w+)\]", done.stdout)
        assert len(found) >= len(registry().adapters()) - 1  # adamss needs a library


def test_the_header_and_the_last_section(run, tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTADAPT_RESULTS", str(tmp_path / "results.json"))
    monkeypatch.setenv("QUANTADAPT_PROGRESS", str(tmp_path / "progress.jsonl"))
    monkeypatch.setenv("QUANTADAPT_STRICT", "0")
    # Naming the plugin although it is installed does no harm.
    plugin = ("-p", "quantadapt.testing.plugin")
    wanted = ("-k", "every_rule or plan_agrees")
    done = run(*PYARGS, *plugin, "--backend", "none", "--adapter", "lora,glora,lily", *wanted)
    assert done.returncode == 0, done.stdout
    head, _, section = done.stdout.partition(SECTION)
    title = f"quantadapt {__version__} conformance suite: none on cpu in float32 with lora, glora"
    assert title in head
    lines = section.splitlines()[1:]
    assert "passed" in lines.pop(), "it is the last section"
    assert "glora: refused by rule glora-not-supported" in lines
    assert "dense merge of lily: refused by rule lily-no-merge" in lines
    assert "that what is refused does not work: strict mode is off" in lines
    text = "\n".join(lines)
    assert re.search(r"^\d+ other adapters: not asked for \(--all-adapters\)$", text, re.M)
    assert re.search(r"^\d+ tests: deselected$", text, re.M)
    assert "adapters in bfloat16, float16: not asked for (--dtype)" in lines
    assert "mps, xpu, hpu" in text
    assert not (tmp_path / "results.json").exists(), "no cell was verified completely"
    progress = (tmp_path / "progress.jsonl").read_text().splitlines()
    first = json.loads(progress[0])
    assert first["of"] == len(progress)
    assert (first["part"], first["number"]) == ("lora", 1)


CLASSES = """
from quantadapt.testing import BackendSuite, RefusalSuite

class TestNone(BackendSuite):
    backend = "none"

class TestOther(RefusalSuite):
    backend = "bnb-nf4"

def test_mine():
    pass
"""


@pytest.mark.slow
def test_the_class_form_has_the_section_as_well(run):
    wanted = ("-k", "every_rule or mine")
    done = run("-q", *wanted, test_classes=CLASSES)
    assert SECTION in done.stdout
    assert "other adapters: not asked for" in done.stdout
    without = (
        "training, saving and merging adapters: AdapterSuite is no part of this class  [bnb-nf4]"
    )
    assert without in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("xdist") is None, reason="xdist is not installed")
def test_workers_report_to_one_section(run, tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTADAPT_RESULTS", str(tmp_path / "results.json"))
    wanted = "every_rule or plan_agrees"
    done = run(*PYARGS, "--backend", "none", "--adapter", "glora", "-n", "2", "-k", wanted)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(SECTION) == 1
    assert "glora: refused by rule glora-not-supported" in done.stdout
    assert re.search(r"^\d+ tests: deselected$", done.stdout, re.M)
    assert not (tmp_path / "results.json").exists()


# Reports ------------------------------------------------------------------------------------------


def report(adapter: str, **values: object) -> dict[str, object]:
    facts = {"backend": "b", "options": {}, "device": "cpu", "dtype": "float32", "title": "b",
             "adapters": ["lora", "ia3"], "origin": {"versions": {}}, "unverified": []}  # fmt: skip
    found = {"suite": "s", "facts": facts, "test": "test_x", "adapter": adapter, "figures": {}}
    found |= {"declared": "DENSE", "failed": None, "skipped": None, "deselected": {}, "done": True}
    return {**found, **values}


def test_a_cell_is_whole_or_not_there():
    results = Results()
    results._left.update({("s", "lora"): 2, ("s", "ia3"): 1, ("s", ""): 1})
    for adapter in ("lora", "ia3"):
        results.add(report(adapter))
    assert results.cells() == []
    results.add(report(""))
    assert [cell["adapter"] for cell in results.cells()] == ["ia3"]
    assert results.unverified() == ["1 test: not reached"]
    results.add(report("lora", deselected={"ia3": 2}))
    assert [cell["adapter"] for cell in results.cells()] == ["lora"]
    assert results.unverified() == ["2 tests: deselected"]
    results.add(report("lora"))
    results.add(report("lora", failed="AssertionError: off", test="test_y"))
    cell = results.cells()[0]
    assert (cell["adapter"], len(results.cells())) == ("lora", 2)
    assert (cell["verified"], cell["failed"]) == ("failed", ["test_y"])
    assert cell["detail"] == "test_y: AssertionError: off"


def test_what_was_skipped_is_not_verified():
    results = Results()
    results.add(report("lora", skipped="needs spam", test="test_z"))
    assert results.cells() == []
    assert results.unverified() == ["test_z: skipped: needs spam"]


def test_nothing_goes_on_when_its_reader_is_gone():
    child = (
        "import sys; from quantadapt.testing import plugin; "
        "plugin._end_with_parent(int(sys.argv[1]))"
    )
    parent = (
        "import os, subprocess, sys\n"
        f"command = [sys.executable, '-c', {child!r}, str(os.getpid())]\n"
        "print(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid)"
    )
    done = subprocess.run(
        [sys.executable, "-c", parent], capture_output=True, text=True, check=True
    )
    deadline = time.monotonic() + 30
    while is_alive(int(done.stdout)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    try:  # a zombie that nobody has asked for is as dead
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
