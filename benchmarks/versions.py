"""The versions that a table was made with, for the line below it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def versions(*names: str) -> str:
    """Return "torch 2.13.0, peft 0.21.2": those of `names` that are installed."""
    found = []
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
