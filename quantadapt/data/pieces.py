"""Pieces of text, of which some are trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from .pictures import Picture


@dataclass(frozen=True)
class Segment:
    """A piece of text, and whether the loss counts on it."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Pieces:
    """The text of one example.

    Attributes:
        segments: in their order.
        templated: a chat template wrote it, special tokens included: none are added.
        pictures: those that the template has written something for, in their order.
    """

    segments: Sequence[Segment]
    templated: bool = False
    pictures: Sequence[Picture] = ()

    @property
    def learns(self) -> bool:
        """Whether there is anything to learn."""
        return any(piece.trained and piece.text for piece in self.segments)


def joined(pieces: Iterable[Segment]) -> list[Segment]:
    """Return the pieces with neighbours of one kind as one piece: tokens may span them."""
    groups = groupby((p for p in pieces if p.text), key=lambda piece: piece.trained)
    return [Segment("".join(p.text for p in group), trained) for trained, group in groups]
