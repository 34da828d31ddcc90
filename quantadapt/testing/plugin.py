"""The pytest plugin of the conformance suite.

    pytest --pyargs quantadapt.testing --backend hqq --adapter lora,dora

It adds options only where the command line names `quantadapt.testing`, listens only where a suite
was collected, and imports nothing until then: other runs of pytest do not notice it. With
QUANTADAPT_RESULTS=FILE, outcome and figures of every cell are written as JSON, and with
QUANTADAPT_PROGRESS=FILE a line for each test as it begins.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import pytest

from .parts import adapter_of, part_of, suite_of

if TYPE_CHECKING:
    from .suite import Suite

PACKAGE = "quantadapt.testing"
RESULTS = "QUANTADAPT_RESULTS"
PROGRESS = "QUANTADAPT_PROGRESS"
RESULTS_PLUGIN = "quantadapt-results"
_FEW = 3
_NO_ADAPTER = "got empty parameter set"


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Add the options, if the command line is about the suite: others use such names as well."""
    config: Any = pluginmanager.get_plugin("pytestconfig")
    given = (*config.invocation_params.args, os.environ.get("PYTEST_ADDOPTS", ""))
    if not any(PACKAGE in str(argument) for argument in given):
        return
    add = parser.getgroup("quantadapt", "the conformance suite of quantadapt").addoption
    add("--backend", action="append", metavar="NAME", help="the backend to verify; repeatable")
    add("--adapter", action="append", metavar="NAME", help="only this one; repeatable, or A,B")
    add("--all-adapters", action="store_true", help="with every adapter that is registered")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ...; cpu by default")
    add("--dtype", help="compute dtype; by default float32, on cuda bfloat16")
    text = "options of the backend, e.g. 'bits=3,group_size=32'; repeatable"
    add("--backend-options", action="append", metavar="A=B", help=text)
    text = "run PEFT's own tests over the backend instead; PATH is PEFT's unpacked sdist"
    add("--peft-suite", metavar="PATH", help=text)


def pytest_configure(config: pytest.Config) -> None:
    """Make the suites that are asked for."""
    if _is_asked_for(config) and config.option.peft_suite:
        from .peft_suite import PeftSuite

        config.pluginmanager.register(suite := PeftSuite.asked(config.option), "peft-suite")
        config.args[:] = suite.files
    elif _is_asked_for(config):
        from .asked import Asked

        config.pluginmanager.register(Asked(config), "quantadapt-asked")
        if os.environ.get(PROGRESS):
            Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    if getattr(config.option, "dist", "no") != "no":  # xdist: the tests are collected elsewhere
        _listen(config)


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Take note of what will not be run."""
    if f"{PACKAGE}.suite" in sys.modules:
        for item in items:
            if suite := suite_of(item):
                _listen(item.config).leave_out(item, suite)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Listen, if there is something to hear."""
    if f"{PACKAGE}.suite" not in sys.modules:
        return
    if items := {item: suite for item in session.items if (suite := suite_of(item))}:
        _listen(session.config).expect(items)


def _end_with_parent(parent: int) -> None:
    """Leave when whoever reads our progress is gone, so that nothing goes on unseen."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _is_asked_for(config: pytest.Config) -> bool:
    names = [str(argument).partition("::")[0] for argument in config.args]
    named = any(name == PACKAGE or name.startswith(f"{PACKAGE}.") for name in names)
    return named and not config.option.help


def _listen(config: pytest.Config) -> Results:
    found = config.pluginmanager.get_plugin(RESULTS_PLUGIN)
    if not isinstance(found, Results):
        here = not hasattr(config, "workerinput")  # a worker's reports go to the main process
        files = [os.environ.get(name) if here else None for name in (RESULTS, PROGRESS)]
        found = Results(*(Path(file) if file else None for file in files))
        config.pluginmanager.register(found, RESULTS_PLUGIN)
    return found


@dataclass
class _Measured:
    """What the tests of one suite class found; adapter "" is the backend itself."""

    facts: Mapping[str, Any]
    declared: dict[str, str] = field(default_factory=dict)
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    failed: dict[str, dict[str, str]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    deselected: Mapping[str, int] = field(default_factory=dict)
    ran: set[str] = field(default_factory=set)

    def cell(self, adapter: str) -> dict[str, Any]:
        declared = self.declared[adapter]
        failed = {**self.failed.get(adapter, {}), **self.failed.get("", {})}
        passed = "refused" if declared == "refused" else "passed"
        figures = {**self.figures.get("", {}), **self.figures.get(adapter, {})}
        names = ("backend", "options", "device", "dtype")
        texts = [f"{test}: {message}" if message else test for test, message in failed.items()]
        return {
            **{name: self.facts[name] for name in names},
            "adapter": adapter,
            "declared": declared,
            "verified": "failed" if failed else passed,
            **({"failed": list(failed), "detail": "; ".join(texts)} if failed else {}),
            **({} if declared == "refused" else figures),
        }


class Results:
    """Listens to the reports of the suite's tests, which may come from other processes."""

    def __init__(self, file: Path | None = None, progress: Path | None = None) -> None:
        self.file, self.progress = file, progress
        self.measured: dict[str, _Measured] = {}
        self._facts: dict[type[Suite], dict[str, Any]] = {}
        self._left: Counter[tuple[str, str]] = Counter()
        self._deselected: dict[str, Counter[str]] = {}
        self._items: dict[str, Any] = {}

    def expect(self, items: Mapping[pytest.Item, type[Suite]]) -> None:
        """Take note of the tests to come."""
        self._items = {item.nodeid: item for item in items}
        self._left.update((_key(suite), adapter_of(item)) for item, suite in items.items())

    def leave_out(self, item: pytest.Item, suite: type[Suite]) -> None:
        """Take note of a test that will not be run; its cell is not verified then."""
        self._deselected.setdefault(_key(suite), Counter())[adapter_of(item)] += 1

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Write a line of progress."""
        if self.progress and nodeid in self._items:
            number = list(self._items).index(nodeid) + 1
            line = {"test": nodeid.rpartition("::")[2], "part": part_of(self._items[nodeid])}
            with self.progress.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**line, "number": number, "of": len(self._items)}) + "\n")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Give the report of a test what we want to know, wherever it is read."""
        report = yield
        if suite := suite_of(item):
            setattr(report, "quantadapt", self.described(item, suite, report))  # noqa: B010
        return report

    def described(self, item: Any, suite: type[Suite], report: Any) -> dict[str, Any]:
        """Return one report's facts, as plain data."""
        from .bench import Bench

        bench = getattr(item, "funcargs", {}).get("bench") or suite._bench or Bench(suite)
        if suite not in self._facts:
            self._facts[suite] = _facts(bench)
        adapter = adapter_of(item)
        return {
            "suite": _key(suite),
            "facts": self._facts[suite],
            "test": getattr(item, "originalname", item.name),
            "adapter": adapter,
            "declared": bench.declared(adapter) if adapter else "",
            "figures": {name: bench.figures.get(name, {}) for name in {"", adapter}},
            "failed": _message(report) if report.failed else None,
            "skipped": _message(report) if getattr(report, "skipped", False) else None,
            "deselected": dict(self._deselected.get(_key(suite), {})),
            "done": getattr(report, "when", "teardown") == "teardown",
        }

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Read a report."""
        if facts := getattr(report, "quantadapt", None):
            self.add(facts)

    def add(self, report: Mapping[str, Any]) -> None:
        """Take in what a report says."""
        adapter, key = report["adapter"], report["suite"]
        found = self.measured.setdefault(key, _Measured(report["facts"]))
        found.declared[adapter] = report["declared"]
        found.deselected = report["deselected"]
        for name, figures in report["figures"].items():
            found.figures.setdefault(name, {}).update(figures)
        if report["skipped"] is None:
            found.ran.add(adapter)
        else:
            found.skipped[report["test"]] = report["skipped"]
        if report["failed"] is not None:
            found.failed.setdefault(adapter, {})[report["test"]] = report["failed"]
        if report["done"]:
            self._left[key, adapter] -= 1

    def cells(self) -> list[dict[str, Any]]:
        """Return the cells of which every test is done."""
        return [
            found.cell(adapter)
            for key, found in self.measured.items()
            for adapter in found.facts["adapters"]
            if adapter in found.ran and self._is_whole(key, adapter)
        ]

    def _is_whole(self, key: str, adapter: str) -> bool:
        deselected = self.measured[key].deselected
        parts = ("", adapter)
        return not any(deselected.get(part) or self._left[key, part] > 0 for part in parts)

    def pytest_sessionfinish(self) -> None:
        """Write the file."""
        cells = self.cells()
        if self.file is None or not cells:
            return
        origins = [found.facts["origin"] for found in self.measured.values()]
        versions = {name: v for origin in origins for name, v in origin["versions"].items()}
        generated = {**origins[0], "device": _device({cell["device"] for cell in cells})}
        document = {"generated": {**generated, "versions": versions}, "cells": cells}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(document, indent=1, default=str)
        self.file.write_text(text + "\n", encoding="utf-8")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_terminal_summary(
        self, terminalreporter: pytest.TerminalReporter
    ) -> Generator[None, None, None]:
        """End with what was not verified here."""
        yield
        if not self.measured:
            return
        from .. import __version__

        title = f"not verified here (conformance suite of quantadapt {__version__})"
        terminalreporter.section(title, sep="-")
        for line in self.unverified():
            terminalreporter.line(line)

    def unverified(self) -> list[str]:
        """Return what was not verified and why; with the suites where there are several."""
        found: dict[tuple[str, str], list[str]] = {}
        for key, part in self.measured.items():
            reasons = [tuple(reason) for reason in part.facts["unverified"]]
            reasons += [
                (test, f"skipped: {why}")
                for test, why in part.skipped.items()
                if _NO_ADAPTER not in why  # the rules that refuse them all are listed
            ]
            left = sum(n for (suite, _), n in self._left.items() if suite == key and n > 0)
            for count, why in (
                (sum(part.deselected.values()), "deselected"),
                (left, "not reached"),
            ):
                reasons += [(f"{count} test{'s' * (count > 1)}", why)] if count > 0 else []
            for what, why in reasons:
                found.setdefault((what, why), []).append(part.facts["title"])
        lines = []
        for (what, why), suites in found.items():
            names = ", ".join(dict.fromkeys(suites))
            if len(suites) > _FEW:
                names = f"{len(suites)} of {len(self.measured)} classes"
            everywhere = len(suites) == len(self.measured)
            lines.append(f"{what}: {why}" + ("" if everywhere else f"  [{names}]"))
        return lines


def _key(suite: type[Suite]) -> str:
    return f"{suite.__module__}.{suite.__qualname__}"


def _facts(bench: Any) -> dict[str, Any]:
    """Return what is known of a suite before any test, as plain data."""
    from ..matrix.declared import backend_title, without_defaults
    from ..matrix.results import origin_of
    from .unverified import unverified

    suite = bench.suite
    options = without_defaults(bench.record, suite.options)
    plain: dict[str, Any] = json.loads(
        json.dumps(
            {
                "backend": suite.backend,
                "options": options,
                "device": suite.device,
                "dtype": suite.dtype,
                "adapters": suite.adapters,
                "origin": origin_of(bench.record, suite.device),
                "title": backend_title(suite.backend, options),
                "unverified": unverified(bench),
            },
            default=str,
        )
    )
    return plain


def _message(report: Any) -> str:
    """Return why a test failed or was skipped, in one line."""
    found = getattr(report, "longrepr", None)
    if isinstance(found, tuple):  # of a skip: file, line, reason
        found = found[-1]
    crash = getattr(found, "reprcrash", None)
    lines = str(crash.message if crash else found or "").strip().splitlines()
    return lines[0][:300] if lines else ""


def _device(devices: set[str]) -> str:
    """Return the devices in words: the card's name where there is one."""
    if any(device.startswith("cuda") for device in devices):
        import torch

        return str(torch.cuda.get_device_name())
    return ", ".join(sorted(devices))
