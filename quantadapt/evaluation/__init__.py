"""The evaluate stage: what is measured on held-out data."""

from __future__ import annotations

from .perplexity import Perplexity, perplexity
from .stage import Agreement, Snapshot, agreement, compare, gain_kept, greedy, measure, snapshot

__all__ = [
    "Agreement",
    "Perplexity",
    "Snapshot",
    "agreement",
    "compare",
    "gain_kept",
    "greedy",
    "measure",
    "perplexity",
    "snapshot",
]
