"""The doctor: whatever the vendors do, it says what is wrong and goes on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pluggy
import pytest

from quantadapt import hookspecs
from quantadapt.hookspecs import hookimpl
from quantadapt.protocols import Quantizer
from quantadapt.records import Backend
from quantadapt.registry import Provenance, Registry, doctor, imported


class Plain(Quantizer):
    pass


def plugins(*backends: Backend) -> Registry:
    """Return a registry with one plugin that provides `backends`."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    found = Registry(manager)
    module = SimpleNamespace(quantadapt_backends=hookimpl(lambda: list(backends)))
    found.add("p", lambda: module, Provenance("p", "p_module", "p-dist", "1.0"))
    return found


def health(backend: Backend, **options: Any) -> doctor.BackendHealth:
    made = doctor.diagnose(found=plugins(backend), **options)
    return made.backends[0]


@pytest.fixture
def vendor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write a module that other processes can import, and return a backend that needs it."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "_TORCH_PROBE", "print('{}')")
    monkeypatch.setattr(doctor, "PRELOAD", ())

    def write(code: str) -> Backend:
        (tmp_path / "vendor_module.py").write_text(code)
        return Backend("v", "", Plain, imports=("vendor_module",), extra="quantadapt[v]")

    return write


def test_a_vendor_that_imports_is_ready(vendor):
    assert health(vendor("print('banner')")).state == "ready"


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("raise ImportError('no kernel for this card')", "ImportError: no kernel for this card"),
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
            "it crashes Python (signal 11)",
        ),
        ("import os; os._exit(3)", "exit code 3"),
        ("import time; time.sleep(60)", "no end after 1 s"),
    ],
)
def test_a_vendor_that_breaks_is_named_and_explained(vendor, code: str, problem: str):
    found = health(vendor(code), timeout=1.0 if "sleep" in code else 30.0)
    assert (found.state, found.problem) == ("broken", problem)
    assert "pip install --force-reinstall 'quantadapt[v]'" in found.fix
    assert ("wait longer, with --timeout 2" in found.fix) == ("sleep" in code)


def test_backends_are_told_as_soon_as_they_are_known(vendor, monkeypatch):
    """What is slow keeps nobody waiting, and what hangs or crashes takes nobody along."""
    vendor("import time; time.sleep(60)")
    slow = Backend("a-slow", "", Plain, imports=("vendor_module",))
    quick = [Backend(f"b{i}", "", Plain, imports=(name,)) for i, name in enumerate(["json", "csv"])]
    missing = Backend("c", "", Plain, requires=("no-such-distribution>=1",))
    parts: list[Any] = []
    made = doctor.diagnose(
        found=plugins(slow, *quick, missing),
        timeout=3,
        on_look=parts.append,
        on_torch=parts.append,
        on_backend=parts.append,
    )
    assert isinstance(parts[0], doctor.Diagnosis)
    assert parts[0].libraries == made.libraries
    states = {part.name: part.state for part in parts[1:] if isinstance(part, doctor.BackendHealth)}
    assert states == {"c": "not installed", "b0": "ready", "b1": "ready", "a-slow": "broken"}
    assert next(iter(states)) == "c"
    assert list(states)[-1] == "a-slow"
    assert [backend.name for backend in made.backends] == ["a-slow", "b0", "b1", "c"]


@pytest.mark.parametrize(
    "preload", ["no_such_module_at_all", "broken_preload", "crashing_preload"], ids=str
)
def test_what_breaks_while_it_is_preloaded_hides_nothing(vendor, monkeypatch, tmp_path, preload):
    (tmp_path / "broken_preload.py").write_text("raise RuntimeError('no')")
    (tmp_path / "crashing_preload.py").write_text("import os; os.kill(os.getpid(), 11)")
    monkeypatch.setattr(doctor, "PRELOAD", (preload,))
    assert health(vendor("x = 1"), timeout=30.0).state == "ready"
    found = health(vendor("import no_such_module_at_all"), timeout=30.0)
    assert "No module named 'no_such_module_at_all'" in found.problem


def test_what_is_preloaded_is_there_once(vendor, monkeypatch, tmp_path):
    """Copied, not imported again; and what one probe does to it, another does not see."""
    (tmp_path / "heavy.py").write_text(f"open({str(tmp_path / 'count')!r}, 'a').write('x')\nn = 0")
    code = "import heavy; heavy.n += 1; assert heavy.n == 1, heavy.n"
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(code)
    vendor("")
    monkeypatch.setattr(doctor, "PRELOAD", ("heavy",))
    both = plugins(*(Backend(name, "", Plain, imports=(name,)) for name in ("one", "two")))
    made = doctor.diagnose(found=both, timeout=30)
    assert [backend.state for backend in made.backends] == ["ready", "ready"], made.backends
    assert (tmp_path / "count").read_text() == "x"


COUNTING = """
import os
with open(os.environ["COUNT"], "a") as file:
    file.write("x")
"""


def test_what_was_imported_well_is_not_imported_again(vendor, monkeypatch, tmp_path):
    """As long as nothing has changed that it depends on."""
    count = tmp_path / "count"
    monkeypatch.setenv("COUNT", str(count))
    monkeypatch.setenv("QUANTADAPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path)
    backend = vendor(COUNTING)

    def imports(**options: Any) -> int:
        before = len(count.read_text()) if count.exists() else 0
        assert health(backend, **options).state == "ready"
        return len(count.read_text()) - before

    assert [imports(), imports(), imports(anew=True), imports()] == [1, 0, 1, 0]
    vendor(COUNTING + "# another version")
    assert [imports(), imports()] == [1, 0]
    (tmp_path / "other-1.0.dist-info").mkdir()  # something is installed
    assert [imports(), imports()] == [1, 0]
    monkeypatch.setenv("LD_LIBRARY_PATH", "/elsewhere")
    assert [imports(), imports()] == [1, 0]
    monkeypatch.setattr(imported, "KEPT", 0)
    assert imports() == 1
    (tmp_path / "cache" / "imported.json").write_text("[1]")
    assert imports() == 1


def test_what_breaks_is_tried_each_time(vendor, monkeypatch, tmp_path):
    monkeypatch.setenv("BROKEN", "1")
    monkeypatch.setenv("QUANTADAPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path)
    backend = vendor("import os\nassert not os.environ.get('BROKEN')")
    assert [health(backend).state for _ in range(2)] == ["broken"] * 2
    monkeypatch.delenv("BROKEN")
    assert health(backend).state == "ready"


def test_nothing_is_imported_if_that_is_wished(vendor):
    found = doctor.diagnose(found=plugins(vendor("raise RuntimeError")), imports=False)
    assert found.backends[0].state == "not checked"
    assert found.torch == {}


@pytest.mark.parametrize(
    ("requirement", "state"),
    [("no-such-distribution>=1", "not installed"), ("pluggy>=999", "too old or new")],
)
def test_a_missing_library_says_what_to_install(requirement: str, state: str):
    backend = Backend("v", "", Plain, requires=(requirement,), extra="quantadapt[v]")
    found = health(backend, imports=False)
    assert (found.state, found.fix) == (state, "pip install 'quantadapt[v]'")
    assert requirement in found.problem


def test_broken_plugins_and_clashes_are_told():
    found = plugins(Backend("twice", "", Plain))
    found.add("q", lambda: 1 / 0, Provenance("q", "q_module", "q-dist", "2.0"))
    module = SimpleNamespace(quantadapt_backends=hookimpl(lambda: [Backend("twice", "", Plain)]))
    found.add("r", lambda: module, Provenance("r", "r_module", "r-dist", "3.0"))
    made = doctor.diagnose(found=found, imports=False)
    assert [p.name for p in made.plugins if p.problem] == ["q"]
    assert "ZeroDivisionError" in next(p.problem for p in made.plugins if p.problem)
    assert made.backends[0].state == "claimed twice"
    assert "r-dist 3.0" in made.backends[0].problem


def test_what_quantadapt_itself_needs_is_found():
    made = doctor.diagnose(found=plugins(), imports=False)
    assert {"torch", "transformers", "peft", "trl"} <= {lib.name for lib in made.libraries}
    assert "pytest" not in {lib.name for lib in made.libraries}
    assert made.problems == []
    json.dumps(made.to_dict())


def test_what_is_missing_is_a_problem(monkeypatch: pytest.MonkeyPatch):
    needs = ["no-such-distribution>=2", "pluggy>=1", "x; extra == 'y'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: needs)
    made = doctor.diagnose(found=plugins(), imports=False)
    assert made.problems == ["no-such-distribution: not installed"]
    assert made.libraries[0].fix == "pip install 'no-such-distribution>=2'"


def test_torch_that_does_not_import_is_a_problem(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "_TORCH_PROBE", "raise OSError('libcudart.so.13 is missing')")
    made = doctor.diagnose(found=plugins(), timeout=30)
    assert made.problems == ["torch: OSError: libcudart.so.13 is missing"]


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    from quantadapt import cli

    def call(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["doctor", "--no-imports", *arguments])
        return int(ended.value.code or 0), capsys.readouterr().out

    code, out = call()
    assert code == 0
    assert "All that quantadapt itself needs is there." in out
    assert "hqq" in out
    code, out = call("--json")
    assert json.loads(out)["problems"] == []
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["no-such-distribution>=2"])
    code, out = call()
    assert code == 1
    assert "fix: pip install 'no-such-distribution>=2'" in out
