"""Plugins: found by entry point, told apart when they clash, kept and explained when broken."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from quantadapt.errors import PlanRefused
from quantadapt.registry import discover


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that makes an installed distribution with one plugin module."""

    def make(distribution: str, plugin: str, module: str, source: str) -> None:
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        info = tmp_path / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n"
        )
        (info / "entry_points.txt").write_text(f"[quantadapt]\n{plugin} = {module}\n")

    monkeypatch.syspath_prepend(tmp_path)
    return make


BACKEND = """
    from quantadapt.hookspecs import hookimpl
    from quantadapt.protocols import Quantizer
    from quantadapt.records import Backend

    @hookimpl
    def quantadapt_backends():
        return [Backend(name="{name}", summary="a test", quantizer=Quantizer)]
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


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import a_library_that_is_not_there", "a_library_that_is_not_there"),
        ("raise RuntimeError('no luck')", "no luck"),
        (
            "from quantadapt.hookspecs import hookimpl\n"
            "@hookimpl\ndef quantadapt_backend(): return []",
            "did you mean 'quantadapt_backends'",
        ),
        (
            "from quantadapt.hookspecs import hookimpl\n"
            "@hookimpl\ndef quantadapt_backends(): return ['hqq']",
            "which is no Backend record",
        ),
    ],
    ids=["missing import", "raises", "misspelt hook", "wrong record"],
)
def test_a_broken_plugin_is_kept_explained_and_harmless(install, source, reason) -> None:
    module = f"qa_broken_{abs(hash(source))}"
    install("qa-broken", "broken", module, source)
    found = discover()
    (broken,) = found.broken
    assert reason in broken.reason
    assert "Traceback" in broken.details
    assert found.backend("hqq").name == "hqq"
    with pytest.raises(PlanRefused, match=r"these plugins are broken.*qa-broken 1.2"):
        found.backend("something")


def test_two_distributions_with_one_plugin_name(install) -> None:
    install("qa-one", "same", "qa_same_one", BACKEND.format(name="x1"))
    install("qa-two", "same", "qa_same_two", BACKEND.format(name="x2"))
    (broken,) = discover().broken
    assert "has the same plugin name as" in broken.reason


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
