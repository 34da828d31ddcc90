"""The plugins of this process, and what they provide."""

from __future__ import annotations

from .discovery import (
    BUILTIN,
    GROUP,
    ONLY,
    TIME_LIMIT,
    BrokenPlugin,
    PluginWarning,
    Provenance,
    Registry,
    discover,
    registry,
)

__all__ = [
    "BUILTIN",
    "GROUP",
    "ONLY",
    "TIME_LIMIT",
    "BrokenPlugin",
    "PluginWarning",
    "Provenance",
    "Registry",
    "discover",
    "registry",
]
