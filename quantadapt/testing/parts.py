"""Which suite, adapter and part of a backend's tests an item belongs to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .suite import Suite

BASE, REST = "base", "rest"
"""Where a test belongs that has no adapter: to the layers, or to what comes after the adapters."""


def suite_of(item: Any) -> type[Suite] | None:
    """Return the suite that a test belongs to."""
    from .suite import Suite

    found = getattr(item, "cls", None)
    return found if isinstance(found, type) and issubclass(found, Suite) else None


def adapter_of(item: Any) -> str:
    """Return the adapter that a test is about, or ""."""
    callspec = getattr(item, "callspec", None)
    found = callspec.params.get("adapter") if callspec else None
    return found if isinstance(found, str) else ""  # no string: there is no adapter to test with


def part_of(item: Any) -> str:
    """Return the adapter that a test is about, or BASE or REST."""
    from .target_suite import TargetSuite

    name = getattr(item, "originalname", item.name)
    return adapter_of(item) or (BASE if hasattr(TargetSuite, name) else REST)
