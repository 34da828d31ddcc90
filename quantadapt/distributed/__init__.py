"""Several processes: who is who, what they tell each other, how they start."""

from __future__ import annotations

from .talking import PeerLost, average_gradients, peers_in_words, reduced, share, start, stop
from .world import World, as_launched, world

__all__ = [
    "PeerLost",
    "World",
    "as_launched",
    "average_gradients",
    "peers_in_words",
    "reduced",
    "share",
    "start",
    "stop",
    "world",
]
