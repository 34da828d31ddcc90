"""Plugins: found by entry point, told apart when they clash, kept and explained when broken."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from quantadapt.errors import PlanRefused
from quantadapt.registry import BrokenPlugin, PluginWarning, Provenance, Registry, discover, trial
from quantadapt.registry.doctor import diagnose


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Return a function that makes an installed distribution with one plugin module."""
    loaded = set(sys.modules)

    def make(
        distribution: str, plugin: str, module: str, source: str = "", entry: str | None = None
    ) -> None:
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        info = tmp_path / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n"
        )
        line = f"{plugin} = {module}" if entry is None else entry
        (info / "entry_points.txt").write_text(f"[quantadapt]\n{line}\n")

    monkeypatch.syspath_prepend(tmp_path)
    yield make
    for name in set(sys.modules) - loaded:
        if name.startswith("qa_"):
            del sys.modules[name]


def broken_one(found: Registry, distribution: str = "qa-broken") -> BrokenPlugin:
    (broken,) = [b for b in found.broken if b.provenance.distribution == distribution]
    return broken


BACKEND = """
    from quantadapt.hookspecs import hookimpl
    from quantadapt.protocols import Quantizer
    from quantadapt.records import Backend

    @hookimpl
    def quantadapt_backends():
        return [Backend(name="{name}", summary="a test", quantizer=Quantizer)]
"""
HOOK = """
    from quantadapt import Adapter, Backend, Merge, Quantizer, Rule, hookimpl

    @hookimpl
    def {hook}:
        {body}
"""


def test_built_in_plugins_are_found_with_their_provenance() -> None:
    found = discover()
    names = {backend.name for backend in found.backends()}
    assert {"none", "hqq", "bnb-nf4", "bnb-fp4", "bnb-int8", "torchao-int8"} <= names
    assert {"lora", "dora", "vera", "adalora", "ia3"} <= {a.name for a in found.adapters()}
    provenance = found.provenance(found.backend("hqq"))
    assert (provenance.plugin, provenance.distribution) == ("hqq", "quantadapt")
    assert found.broken == []


def test_a_third_party_plugin_is_found(install) -> None:
    install("qa-mine", "mine", "qa_mine_plugin", BACKEND.format(name="mine"))
    found = discover()
    assert str(found.provenance(found.backend("mine"))) == "mine (qa-mine 1.2)"


def test_an_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(PlanRefused, match="did you mean 'bnb-nf4'") as caught:
        discover().backend("bnb-nf5")
    assert caught.value.exit_code == 2


def test_a_clash_names_both_providers_and_harms_nobody_else(install) -> None:
    install("qa-one", "one", "qa_one_plugin", BACKEND.format(name="twice"))
    install("qa-two", "two", "qa_two_plugin", BACKEND.format(name="twice"))
    found = discover()
    with pytest.raises(PlanRefused, match=r"one \(qa-one 1.2\) and two \(qa-two 1.2\)"):
        found.backend("twice")
    assert len(found.clashes()) == 1
    assert found.backend("hqq").name == "hqq"


def backends(body: str) -> str:
    return HOOK.format(hook="quantadapt_backends()", body=body)


def record(fields: str) -> str:
    return backends(f"return [Backend('x', 'a test', Quantizer, {fields})]")


IMPORTS = {
    "missing library": ("import a_library_that_is_not_there", "a_library_that_is_not_there"),
    "raises": ("raise RuntimeError('no luck')", r"RuntimeError: no luck \(qa_broken.py, line 1\)"),
    "syntax error": ("def", "SyntaxError: invalid syntax"),
    "exits": ("raise SystemExit(3)", "SystemExit: 3"),
    "interrupts": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "no hook": ("x = 1", "it has no hook; a plugin is a module with quantadapt_backends or"),
}
HOOKS = {
    "misspelt": (
        HOOK.format(hook="quantadapt_backend()", body="return []"),
        "unknown hook 'quantadapt_backend', did you mean 'quantadapt_backends'",
    ),
    "without its mark": ("def quantadapt_backends(): return []", "lacks the decorator"),
    "wrong argument": (
        HOOK.format(hook="quantadapt_stage_done(stage, result)", body="pass"),
        r"hook 'quantadapt_stage_done'.*\{'result'\}",
    ),
    "raises": (backends("return 1 / 0"), "ZeroDivisionError: division by zero"),
    "exits": (backends("raise SystemExit"), r"SystemExit \(qa_broken.py, line 6\)"),
    "raises on the way": (backends("yield 1 / 0"), "ZeroDivisionError: division by zero"),
    "returns nothing": (backends("pass"), "quantadapt_backends returned None, not a list of Back"),
    "returns text": (backends("return 'hqq'"), "returned 'hqq', not a list of Backend records"),
    "wrong record": (backends("return ['hqq']"), "returned 'hqq', which is no Backend record"),
    "a backend for an adapter": (
        HOOK.format(hook="quantadapt_adapters()", body="return [Backend('x', '', Quantizer)]"),
        "which is no Adapter record",
    ),
}
FIELDS = {
    "a quantizer that was made": (
        backends("return [Backend('x', 'a test', object())]"),
        "backend 'x': quantizer is <object .*, not a subclass of Quantizer",
    ),
    "no name": (backends("return [Backend(None, '', Quantizer)]"), "its name is no text"),
    "requires is text": (record("requires='hqq'"), "requires is 'hqq', not a tuple of str"),
    "no requirement": (record("requires=('hqq >= = 2',)"), "requires holds 'hqq >= = 2': "),
    "one rule": (record("rules=Rule('i', {}, '', '')"), "rules is Rule.*, not a tuple of Rule"),
    "a rule for text": (  # "lora" in "rslora"
        record("rules=(Rule('i', {'adapter': 'rslora'}, '', ''),)"),
        "rule 'i': adapter is 'rslora', not a tuple of values",
    ),
    "merge is text": (record("merge='dense'"), "merge is 'dense', not one of Merge"),
    "an adapter's rules": (
        HOOK.format(
            hook="quantadapt_adapters()", body="return [Adapter('y', '', 'LORA', rules=['no'])]"
        ),
        "adapter 'y': rules is .*, not a tuple of Rule",
    ),
}
MISTAKES = {
    f"{kind}: {name}": mistake
    for kind, table in (("import", IMPORTS), ("hook", HOOKS), ("record", FIELDS))
    for name, mistake in table.items()
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_broken_plugin_is_kept_explained_and_harmless(install, mistake: str) -> None:
    source, reason = MISTAKES[mistake]
    install("qa-broken", "broken", "qa_broken", source)
    found = discover()
    broken = broken_one(found)
    assert re.search(reason, broken.reason)
    assert "\n" not in broken.reason
    assert "Traceback" in broken.details
    assert found.backend("hqq").name == "hqq"
    assert "broken" not in found.plugins
    with pytest.raises(PlanRefused, match=r"these plugins are broken.*qa-broken 1.2"):
        found.backend("something")


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("broken = qa_nowhere", "ModuleNotFoundError: No module named 'qa_nowhere'"),
        ("broken = qa_broken:nothing", "AttributeError: .*'nothing'"),
        ("broken = no module at all", "entry point is 'no module at all', which names no module"),
        ("broken =", "its entry point is '', which names no module"),
        ("no entry point", "its entry_points.txt cannot be read"),
    ],
)
def test_a_broken_entry_point(install, entry: str, reason: str) -> None:
    install("qa-broken", "broken", "qa_broken", entry=entry)
    install("qa-mine", "mine", "qa_mine", BACKEND.format(name="mine"))
    found = discover()
    assert re.search(reason, broken_one(found).reason)
    assert {"mine", "hqq"} <= {backend.name for backend in found.backends()}


def test_a_distribution_without_metadata(install, tmp_path: Path) -> None:
    install("qa-mine", "mine", "qa_mine", BACKEND.format(name="mine"))
    (tmp_path / "qa_mine-1.2.dist-info" / "METADATA").unlink()
    found = discover()
    assert "mine" in str(found.provenance(found.backend("mine")))


def test_a_plugin_may_be_an_object_of_a_module(install) -> None:
    source = """
        from quantadapt import Adapter, hookimpl

        class Plugin:
            @hookimpl
            def quantadapt_adapters(self):
                yield Adapter("mine", "a test", "LORA")

        plugin = Plugin()
    """
    install("qa-mine", "mine", "qa_mine", source, entry="mine = qa_mine:plugin")
    assert discover().adapter("mine").peft_type == "LORA"


def test_claims_are_found_for_plugins_backends_and_what_is_broken(install) -> None:
    install("qa-mine", "mine", "qa_mine", BACKEND.format(name="own"))
    install("qa-broken", "broken", "qa_broken", "raise RuntimeError")
    found = discover()
    assert [str(p) for p in found.claims("mine")] == ["mine (qa-mine 1.2)"]
    assert [str(p) for p in found.claims("own")] == ["mine (qa-mine 1.2)"]
    assert [str(p) for p in found.claims("broken")] == ["broken (qa-broken 1.2)"]
    assert found.claims("free") == []


# Slow and hanging plugins ------------------------------------------------------------------------

HANGS = {
    "asleep": "import time\ntime.sleep(600)",
    "busy": "while True: pass",
    "locked": "import threading\nlock = threading.Lock()\nlock.acquire()\nlock.acquire()",
    "in its hook": backends("import time; time.sleep(600)"),
}


def test_a_hanging_import_is_left_behind(install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTADAPT_PLUGIN_TIMEOUT", "0.5")
    install("qa-slow", "slow", "qa_slow", HANGS["asleep"])
    install("qa-mine", "mine", "qa_mine", BACKEND.format(name="mine"))
    with pytest.warns(PluginWarning, match=r"slow \(qa-slow 1.2\).*QUANTADAPT_PLUGINS"):
        found = discover()
    broken = broken_one(found, "qa-slow")
    assert broken.reason == "its import did not finish within 0.5 s"
    assert 'qa_slow.py", line 2' in broken.details, "the stack says where it hangs"
    assert {"mine", "hqq"} <= {backend.name for backend in found.backends()}
    assert "slow" not in found.plugins
    monkeypatch.setattr(trial, "_tried", lambda *_: pytest.fail("that is remembered"))
    assert broken_one(discover(), "qa-slow").reason == broken.reason


def test_one_that_hangs_here_alone_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread is let go at the end, so that it does not go on in the tests that follow."""
    release, found = threading.Event(), discover()
    monkeypatch.setenv("QUANTADAPT_PLUGIN_TIMEOUT", "0.5")
    try:
        with pytest.warns(PluginWarning, match="slow: its import did not finish within 0.5 s"):
            found.add("slow", lambda: release.wait(60), Provenance("slow"))
    finally:
        release.set()
    assert "release.wait(60)" in found.broken[-1].details


@pytest.mark.parametrize("how", HANGS)
def test_the_command_line_works_beside_a_hanging_plugin(install, tmp_path, how: str) -> None:
    install("qa-slow", "slow", "qa_slow", HANGS[how])
    shown = call(tmp_path, "backends", QUANTADAPT_PLUGIN_TIMEOUT="0.5")
    assert "hqq" in shown.stdout
    assert "its import did not finish within 0.5 s" in shown.stderr
    assert "or name the plugins to load in QUANTADAPT_PLUGINS" in shown.stderr


KILLS = {
    "exits": ("import os\nos._exit(0)", "its import ends Python"),
    "exits later": (backends("import os; os._exit(3)"), "its import ends Python"),
    "leaves": ("import sys\nsys.exit(0)", "SystemExit: 0 (qa_kills.py, line 2)"),
    "crashes": (
        "import ctypes\nctypes.string_at(0)",
        "its import crashes Python (signal 11)",
    ),
    "moves": (f"import os\nos.chdir('/')\n{textwrap.dedent(BACKEND.format(name='moved'))}",
              "its import changes the working directory"),
}  # fmt: skip


@pytest.mark.parametrize("how", KILLS)
def test_a_plugin_cannot_take_the_command_down(install, tmp_path: Path, how: str) -> None:
    source, reason = KILLS[how]
    install("qa-kills", "kills", "qa_kills", source)
    shown = call(tmp_path, "backends", "--json")
    assert "hqq" in {row["name"] for row in json.loads(shown.stdout)}
    told = call(tmp_path, "doctor", "--no-imports").stdout
    assert f"kills (qa-kills 1.2) is broken: {reason}" in told


def test_what_a_plugin_prints_is_no_result(install, tmp_path: Path) -> None:
    source = "import os\nprint('hello')\nos.write(1, b'deep')\n" + textwrap.dedent(BACKEND)
    install("qa-loud", "loud", "qa_loud", source.format(name="loud"))
    shown = call(tmp_path, "backends", "--json")
    assert "loud" in {row["name"] for row in json.loads(shown.stdout)}
    told = call(tmp_path, "doctor", "--no-imports").stdout
    assert "loud (qa-loud 1.2): it writes to stdout while it is imported" in told


@pytest.mark.parametrize(
    "file", [pytest.param("entry_points.txt", marks=pytest.mark.slow), "METADATA"]
)
def test_an_unreadable_file_of_a_distribution(install, tmp_path: Path, file: str) -> None:
    install("qa-torn", "torn", "qa_torn", BACKEND.format(name="torn"))
    (tmp_path / "qa_torn-1.2.dist-info" / file).write_bytes(b"\xff\xfe\x00[quantadapt\x80")
    shown = call(tmp_path, "backends", "--json")
    assert "hqq" in {row["name"] for row in json.loads(shown.stdout)}
    if file == "METADATA":
        return
    told = call(tmp_path, "doctor", "--no-imports").stdout
    assert "(qa-torn 1.2) is broken: its entry_points.txt cannot be read" in told
    with pytest.raises(subprocess.CalledProcessError) as caught:
        call(tmp_path, "run", "--backend", "none")  # which torch cannot be imported for
    assert "(qa-torn 1.2): its entry_points.txt cannot be read" in caught.value.stderr
    assert "fix: install that again" in caught.value.stderr


def test_a_plugin_that_works_is_tried_once(install, monkeypatch, tmp_path: Path) -> None:
    """Its verdict goes with its version and files; a trial takes as long as starting Python."""
    tried: list[str] = []
    monkeypatch.setattr(
        trial, "_tried", lambda point, _: tried.append(point.name) or trial.Verdict(lasts=True)
    )
    install("qa-mine", "mine", "qa_mine", BACKEND.format(name="mine"))
    for _ in range(3):
        assert discover().backend("mine").name == "mine"
    assert tried == ["mine"]
    (tmp_path / "qa_mine.py").write_text(textwrap.dedent(BACKEND.format(name="mine")) + "# new")
    discover()
    assert tried == ["mine", "mine"]
    (tmp_path / "qa_mine-1.2.dist-info").rename(tmp_path / "qa_mine-1.3.dist-info")
    discover()
    assert tried == ["mine"] * 3


def test_the_doctor_names_what_hangs(install, tmp_path: Path) -> None:
    install("qa-slow", "slow", "qa_slow", HANGS["asleep"])
    shown = call(tmp_path, "doctor", "--no-imports", "--traceback", QUANTADAPT_PLUGIN_TIMEOUT="0.5")
    assert "slow (qa-slow 1.2) is broken: its import did not finish within 0.5 s" in shown.stdout
    assert "fix: tell its authors" in shown.stdout
    assert 'qa_slow.py", line 2' in shown.stdout


def test_help_waits_for_no_plugin(install, tmp_path: Path) -> None:
    install("qa-slow", "slow", "qa_slow", HANGS["asleep"])
    for arguments in (["--help"], ["--version"], ["plugin", "new", "--help"]):
        shown = call(tmp_path, *arguments, QUANTADAPT_PLUGIN_TIMEOUT="600")
        assert "finish" not in shown.stderr


def call(site: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, with the distributions in `site`."""
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-m", "quantadapt.cli", *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )


def test_a_slow_import_is_told_by_the_doctor(install, monkeypatch, capsys) -> None:
    from quantadapt import cli
    from quantadapt.registry import doctor

    install("qa-slow", "slow", "qa_slow", f"import time\ntime.sleep(0.3)\n{dedented('slow')}")
    install("qa-mine", "mine", "qa_mine", BACKEND.format(name="mine"))
    monkeypatch.setattr(doctor, "SLOW", 0.25)
    found = discover()
    assert found.backend("slow").name == "slow"
    health = {plugin.name: plugin for plugin in diagnose(imports=False, found=found).plugins}
    assert health["slow"].slow
    assert health["slow"].seconds >= 0.3
    assert not health["builtin"].slow
    monkeypatch.setattr(doctor, "registry", lambda: found)
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--no-imports"])
    assert "slow (qa-slow 1.2) is slow: its import takes 0." in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--no-imports", "--json"])
    told: Any = json.loads(capsys.readouterr().out)
    assert [p["slow"] for p in told["plugins"] if p["name"] == "slow"] == [True]


def dedented(name: str) -> str:
    return textwrap.dedent(BACKEND.format(name=name))


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan"])
def test_a_time_limit_that_is_none(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("QUANTADAPT_PLUGIN_TIMEOUT", value)
    with pytest.raises(PlanRefused, match=f"QUANTADAPT_PLUGIN_TIMEOUT: '{value}' is no number"):
        discover()


def test_no_time_limit_is_a_time_limit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTADAPT_PLUGIN_TIMEOUT", "inf")
    assert discover().backend("hqq").name == "hqq"


def test_loading_costs_next_to_nothing(install) -> None:
    """A thread for each plugin is a matter of microseconds."""
    found = discover()
    started = time.process_time()
    for index in range(100):
        found.add(f"missing{index}", lambda: 1 / 0, Provenance("missing"))
    assert time.process_time() - started < 1.0


# Two with one name, and which are loaded at all ---------------------------------------------------


def test_two_distributions_with_one_plugin_name(install) -> None:
    install("qa-one", "same", "qa_same_one", BACKEND.format(name="x1"))
    install("qa-two", "same", "qa_same_two", BACKEND.format(name="x2"))
    broken = broken_one(discover(), "qa-two")
    assert broken.reason == "same (qa-two 1.2) has the same plugin name as same (qa-one 1.2)"


@pytest.mark.parametrize("name", ["builtin", "hqq"])
@pytest.mark.parametrize("distribution", ["aa-other", "zz-other"])
def test_the_name_of_a_built_in_plugin_is_taken(install, distribution, name: str) -> None:
    install(distribution, name, "qa_other", BACKEND.format(name="other"))
    found = discover()
    claimed = [b for b in found.broken if b.provenance.plugin == name]
    assert len(claimed) == 1
    assert f"{distribution} 1.2) has the same plugin name as {name}" in claimed[0].reason
    assert found.adapter("lora").name == "lora"
    assert found.backend("hqq").name == "hqq"


def test_one_module_under_two_names(install) -> None:
    entry = "one = qa_twice\ntwo = qa_twice"
    install("qa-twice", "one", "qa_twice", BACKEND.format(name="mine"), entry=entry)
    found = discover()
    assert "already registered" in broken_one(found, "qa-twice").reason
    assert found.backend("mine").name == "mine"


def test_the_environment_restricts_what_is_loaded(monkeypatch) -> None:
    monkeypatch.setenv("QUANTADAPT_PLUGINS", "none, hqq")
    assert [backend.name for backend in discover().backends()] == ["hqq", "none"]


def test_importing_the_package_and_listing_backends_loads_no_torch() -> None:
    code = (
        "import sys, quantadapt; from quantadapt.registry import registry; registry().backends();"
        "bad = {'torch', 'peft', 'transformers', 'hqq', 'bitsandbytes'} & set(sys.modules);"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
