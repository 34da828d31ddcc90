"""What a training setting costs in memory, from sizes alone."""

from __future__ import annotations

from .changes import ways_out
from .workload import (
    CONTEXT,
    FRAGMENTATION,
    GIB,
    HEAD_CHUNK,
    LENGTH_MULTIPLE,
    OOM_FIX,
    WORKSPACE,
    Setting,
    Workload,
    card_for,
    halves,
    optimizer_bytes,
    usable,
)

__all__ = [
    "CONTEXT",
    "FRAGMENTATION",
    "GIB",
    "HEAD_CHUNK",
    "LENGTH_MULTIPLE",
    "OOM_FIX",
    "WORKSPACE",
    "Setting",
    "Workload",
    "card_for",
    "halves",
    "optimizer_bytes",
    "usable",
    "ways_out",
]
