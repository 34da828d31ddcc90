"""The page of `quantadapt demo`: base and tuned model answer side by side."""

from __future__ import annotations

from ..generation.sampling import Sampling
from .conversation import conversation
from .page import gr, html, page
from .parts import heading
from .speaking import Speaker


def demo_page(speaker: Speaker, sampling: Sampling) -> gr.Blocks:
    """Return the page.

    Args:
        sampling: how to answer at first; readers may change it.
    """
    with page(f"quantadapt demo: {speaker.name}") as blocks:
        html(heading(speaker.name, _lede(speaker)))
        conversation(lambda: speaker, sampling)
    return blocks


def _lede(speaker: Speaker) -> str:
    alone = "It has no adapter; so it answers alone."
    both = "The base and the tuned model answer the same question at the same time."
    words = both if len(speaker.voices) > 1 else alone
    return f"{words} {speaker.told}"
