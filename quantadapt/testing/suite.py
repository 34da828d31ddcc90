"""What all suites have in common."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import pytest

from ..matrix.declared import MAIN as ADAPTERS
from .bench import Adapters, Bench

Test = TypeVar("Test", bound=Callable[..., None])


class Suite:
    """The class attributes of all suites, and the bench behind their tests."""

    backend: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {}
    device: ClassVar[str] = "cpu"
    dtype: ClassVar[str] = "float32"
    adapters: ClassVar[tuple[str, ...]] = ADAPTERS
    adapter_options: ClassVar[Adapters] = {}
    rewrites_base: ClassVar[tuple[str, ...]] = ("pissa",)
    """Adapters that take a part of the base's weights over when they are attached."""
    reshaped: ClassVar[tuple[str, ...]] = ("adalora",)
    """Adapters of which PEFT saves smaller tensors than it trains: a reload may round."""
    rounded: ClassVar[tuple[str, ...]] = ("dora",)
    """Adapters that start at zero exactly in float32, and up to rounding in lower precision."""
    bits: ClassVar[float | None] = None
    strict: ClassVar[bool] = os.environ.get("QUANTADAPT_STRICT", "1") != "0"

    _bench: ClassVar[Bench | None] = None

    @classmethod
    def setup_class(cls) -> None:
        """Make the bench; models come when they are asked for."""
        cls._bench = Bench(cls)

    @classmethod
    def teardown_class(cls) -> None:
        """Free models and folders before the next class."""
        if cls._bench is not None:
            cls._bench.close()
        cls._bench = None

    @pytest.fixture(name="bench")
    def _bench_fixture(self) -> Bench:
        assert self._bench is not None
        return self._bench

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Give a test its adapters: those that its `cells` mark asks for and no rule refuses."""
        if "adapter" not in metafunc.fixturenames:
            return
        wanted = getattr(metafunc.function, "cells", "attach")
        names = Bench(type(self)).adapters_for(wanted)
        metafunc.parametrize("adapter", names)


def cells(wanted: str) -> Callable[[Test], Test]:
    """Mark a test with the cells it is about: all, attach, dense, requantize or onto."""

    def mark(function: Test) -> Test:
        function.cells = wanted  # type: ignore[attr-defined]
        return function

    return mark
