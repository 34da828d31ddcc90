"""The plugins of this process, and what they provide."""

from __future__ import annotations

from .discovery import BrokenPlugin, PluginWarning, Provenance, Registry, discover, registry

__all__ = ["BrokenPlugin", "PluginWarning", "Provenance", "Registry", "discover", "registry"]
