"""The suites that `pytest --pyargs quantadapt.testing --backend NAME` asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from .. import __version__
from ..dependencies import missing_requirements
from ..errors import PlanRefused, QuantadaptError
from ..matrix.declared import MAIN, backend_title, dtype_for, main_first, obstacles
from ..matrix.verify import parse_options
from ..registry.discovery import registry
from .backend_suite import BackendSuite
from .parts import BASE, REST, part_of, suite_of
from .suite import Suite


class Asked:
    """Makes a suite for each `--backend`, and has the tests of one adapter follow each other."""

    def __init__(self, config: pytest.Config) -> None:
        try:
            self.suites = _suites(config.option)
        except QuantadaptError as error:
            text = "\n".join(str(problem) for problem in error.problems)
            raise pytest.UsageError(text) from None

    def pytest_report_header(self) -> list[str]:
        """Say what is verified, with which version of the suite."""
        return [
            f"quantadapt {__version__} conformance suite: "
            f"{backend_title(suite.backend, suite.options)} on {suite.device} in {suite.dtype} "
            f"with {', '.join(suite.adapters)}"
            for suite in self.suites
        ]

    @pytest.hookimpl(tryfirst=True)
    def pytest_pycollect_makeitem(
        self, collector: pytest.Collector, name: str, obj: Any
    ) -> list[pytest.Class] | None:
        """Put the suites in the place of the class that stands for them."""
        if name != "TestBackend" or obj.__module__ != "quantadapt.testing.test_backend":
            return None
        made = []
        for suite in self.suites:
            node = pytest.Class.from_parent(collector, name=suite.backend)
            node.obj = suite
            made.append(node)
        return made

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """First the layers, then adapter by adapter, and last what looks at several of them."""

        def place(item: pytest.Item) -> tuple[int, int]:
            suite = suite_of(item)
            if suite not in self.suites:
                return (len(self.suites), 0)
            order = (BASE, *suite.adapters, REST)
            return (self.suites.index(suite), order.index(part_of(item)))

        items.sort(key=place)


def _suites(given: Any) -> list[type[Suite]]:
    known = registry()
    if not given.backend:
        names = ", ".join(backend.name for backend in known.backends())
        raise pytest.UsageError(f"say which backend: --backend NAME; there are {names}")
    options = parse_options(given.backend_options or ())
    adapters = [known.adapter(name) for name in _listed(given.adapter or MAIN)]
    if given.all_adapters:
        adapters = main_first(known.adapters())
    left_out = {a.name: p[0].what for a in adapters if (p := missing_requirements(a))}
    made = []
    for name in _listed(given.backend):
        record = known.backend(name)
        dtype = dtype_for(record, given.device, given.dtype)
        if problems := obstacles(record, options, given.device, dtype):
            raise PlanRefused(problems)
        made.append(
            type(
                f"Test_{name}",
                (BackendSuite,),
                {
                    "__module__": "quantadapt.testing.test_backend",
                    "__doc__": record.summary,
                    "backend": name,
                    "options": options,
                    "device": given.device,
                    "dtype": dtype,
                    "adapters": tuple(a.name for a in adapters if a.name not in left_out),
                    "left_out": left_out,
                },
            )
        )
    return made


def _listed(given: Sequence[str]) -> list[str]:
    """Return the names, each once, whether they came one by one or with commas."""
    names = [name.strip() for text in given for name in text.split(",")]
    return list(dict.fromkeys(name for name in names if name))
