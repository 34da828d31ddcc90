"""Collects the figures and the outcome of every cell: `pytest -p quantadapt.testing.plugin`.

With QUANTADAPT_RESULTS=FILE they are written as JSON, which `quantadapt matrix` shows as verified.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Generator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from ..machine import installed_version
from .bench import Bench, Suite

RESULTS = "QUANTADAPT_RESULTS"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors")


@dataclass
class _Measured:
    """What the tests of one suite class found; adapter "" is the backend itself."""

    bench: Bench
    failed: dict[str, list[str]] = field(default_factory=dict)
    ran: set[str] = field(default_factory=set)

    def cells(self) -> list[dict[str, Any]]:
        names = [name for name in self.bench.suite.adapters if name in self.ran]
        return [self.cell(name) for name in names]

    def cell(self, adapter: str) -> dict[str, Any]:
        suite, declared = self.bench.suite, self.bench.declared(adapter)
        failed = self.failed.get(adapter, []) + self.failed.get("", [])
        passed = "refused" if declared == "refused" else "passed"
        figures = {**self.bench.figures.get("", {}), **self.bench.figures.get(adapter, {})}
        return {
            "backend": suite.backend,
            "options": dict(suite.options),
            "adapter": adapter,
            "device": suite.device,
            "dtype": suite.dtype,
            "declared": declared,
            "verified": "failed" if failed else passed,
            **({"failed": failed} if failed else {}),
            **({} if declared == "refused" else figures),
        }


class Results:
    """Listens to pytest."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.measured: dict[type[Suite], _Measured] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Note the outcome of a test of a suite."""
        report = yield
        suite = getattr(item, "cls", None)
        if isinstance(suite, type) and issubclass(suite, Suite):
            self.note(item, suite, report)
        return report

    def note(self, item: pytest.Item, suite: type[Suite], report: pytest.TestReport) -> None:
        """Note one report."""
        bench = getattr(item, "funcargs", {}).get("bench") or suite._bench or Bench(suite)
        found = self.measured.setdefault(suite, _Measured(bench))
        callspec = getattr(item, "callspec", None)
        adapter = callspec.params.get("adapter", "") if callspec else ""
        found.ran.add(adapter)
        if report.failed:
            found.failed.setdefault(adapter, []).append(getattr(item, "originalname", item.name))

    def pytest_sessionfinish(self) -> None:
        """Write the file."""
        cells = [cell for found in self.measured.values() for cell in found.cells()]
        if not cells:
            return
        document = {"generated": _generated(cells, self.measured), "cells": cells}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(document, indent=1, default=str)
        self.file.write_text(text + "\n", encoding="utf-8")


def _generated(cells: list[dict[str, Any]], measured: dict[type[Suite], Any]) -> dict[str, Any]:
    requirements = {
        requirement.split(">")[0].split("=")[0]
        for found in measured.values()
        for requirement in found.bench.record.requires
    }
    names = sorted({*PACKAGES, *requirements})
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": _device({cell["device"] for cell in cells}),
        "python": platform.python_version(),
        "versions": {name: installed_version(name) for name in names},
    }


def _device(devices: set[str]) -> str:
    """Return the device in words: the card's name where there is one."""
    if any(device.startswith("cuda") for device in devices):
        import torch

        return str(torch.cuda.get_device_name())
    return ", ".join(sorted(devices))


def pytest_configure(config: pytest.Config) -> None:
    """Listen if there is a file to write."""
    if file := os.environ.get(RESULTS):
        config.pluginmanager.register(Results(Path(file)), "quantadapt-results")
