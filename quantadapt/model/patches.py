"""Attributes that a library patches, found and put back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def changed(own: dict[str, Any], was: dict[str, Any]) -> list[str]:
    """Return the names in `own` that are not what they were."""
    absent = object()
    return [n for n in own.keys() | was.keys() if own.get(n, absent) is not was.get(n, absent)]


def put_back(own: dict[str, Any], was: dict[str, Any], names: Iterable[str]) -> None:
    """Make these names in `own` what they were."""
    for name in names:
        own.pop(name, None)
        if name in was:
            own[name] = was[name]
