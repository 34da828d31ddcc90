"""Which values of a parameter are tried by default."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(values: Iterable[Any], *kept: Any) -> list[Any]:
    """Return all values, those that are not in `kept` marked slow."""
    values = list(values)
    assert all(value in values for value in kept)
    return [v if v in kept else pytest.param(v, marks=pytest.mark.slow) for v in values]
