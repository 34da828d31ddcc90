"""The evaluate stage: what is measured on held-out data."""

from __future__ import annotations

from .gain import Gain, TokenLosses, gain_kept, token_losses
from .perplexity import Perplexity, perplexity
from .stage import Agreement, Snapshot, agreement, compare, measure, snapshot

__all__ = [
    "Agreement",
    "Gain",
    "Perplexity",
    "Snapshot",
    "TokenLosses",
    "agreement",
    "compare",
    "gain_kept",
    "measure",
    "perplexity",
    "snapshot",
    "token_losses",
]
