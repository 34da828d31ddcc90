"""What layers are lent while a model answers, by whoever makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

from torch import nn


class Lender(Protocol):
    """What the layers of one model are lent; its tensors stay where they are."""

    def refresh(self) -> None:
        """Compute it anew from the weights as they are now."""

    def lent(self) -> AbstractContextManager[Any]:
        """Inside, the layers have it."""


_lenders: list[Callable[[nn.Module], Lender]] = []


def lends(lender: Callable[[nn.Module], Lender]) -> None:
    """Have `lenders_of` call this, too."""
    _lenders.append(lender)


def lenders_of(model: nn.Module) -> list[Lender]:
    """Return all that lends something to layers of `model`."""
    return [lender(model) for lender in _lenders]


@contextmanager
def lent_by(lenders: Sequence[Lender]) -> Iterator[None]:
    """Inside, layers have what these lend."""
    with ExitStack() as stack:
        for lender in lenders:
            stack.enter_context(lender.lent())
        yield
