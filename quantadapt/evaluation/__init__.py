"""The evaluate stage: what is measured on held-out tokens."""

from __future__ import annotations

from .stage import (
    Agreement,
    Perplexity,
    Snapshot,
    agreement,
    compare,
    gain_kept,
    greedy,
    perplexity,
    snapshot,
)

__all__ = [
    "Agreement",
    "Perplexity",
    "Snapshot",
    "agreement",
    "compare",
    "gain_kept",
    "greedy",
    "perplexity",
    "snapshot",
]
