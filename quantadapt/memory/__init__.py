"""What a training setting costs in memory, from sizes alone."""

from __future__ import annotations

from .cards import CONTEXT, FRAGMENTATION, GIB, LONG_ROWS, OOM_FIX, card_for, size_words, usable
from .changes import ways_out
from .optimizers import optimizer_bytes
from .passes import HEAD_CHUNK, LENGTH_MULTIPLE
from .phases import WORKSPACE
from .setting import Setting, halves
from .workload import Workload

__all__ = [
    "CONTEXT",
    "FRAGMENTATION",
    "GIB",
    "HEAD_CHUNK",
    "LENGTH_MULTIPLE",
    "LONG_ROWS",
    "OOM_FIX",
    "WORKSPACE",
    "Setting",
    "Workload",
    "card_for",
    "halves",
    "optimizer_bytes",
    "size_words",
    "usable",
    "ways_out",
]
