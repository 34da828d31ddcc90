"""Attributes that we, or a library, patch: set, found and put back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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


@contextmanager
def restored(owners: Iterable[Any], *names: str) -> Iterator[None]:
    """Afterwards, each owner's own attributes of these names are what they are now, or gone."""
    own = [vars(owner) for owner in owners]
    before = [{name: values[name] for name in names if name in values} for values in own]
    try:
        yield
    finally:
        for values, was in zip(own, before, strict=True):
            put_back(values, was, names)


@contextmanager
def patched(owner: Any, **values: Any) -> Iterator[None]:
    """Let `owner`, a model or a module of Python, have other attributes for the block."""
    with restored([owner], *values):
        vars(owner).update(values)
        yield
