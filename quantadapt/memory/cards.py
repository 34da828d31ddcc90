"""What a card has for a run: what CUDA and its allocator take of it is not there."""

from __future__ import annotations

GIB = 2**30
CONTEXT = int(0.6 * GIB)
"""What CUDA itself takes of a card, kernels and library handles included."""
FRAGMENTATION = 0.05
"""Share of a card that the allocator may lose between blocks: steps of many lengths leave blocks of
many sizes, and a recorded pass has some of its own. Up to 5% were seen."""
LONG_ROWS = 0.02
"""The same where inputs of layers lie in CPU memory: what is left are a few large blocks, which
PyTorch gives back before it runs out. Up to 1% was seen, of rows of 46,784 to 98,918 tokens."""
OOM_FIX = (
    "lower data.max_length, use a backend with fewer bits or a paged optimizer"
    " (train.optim: paged_adamw_8bit), keep the base in CPU memory (train.stream: all), or use a"
    " larger card"
)


def size_words(nbytes: float) -> str:
    """Return a size of so many bytes in three digits, in the largest unit of which it is one or
    more: `312 bytes`, `41.2 KiB`, `1.24 GiB`."""
    size, units = float(nbytes), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while abs(size) >= 1023.5 and len(units) > 1:
        size, units = size / 1024, units[1:]
    if units[0] == "bytes":
        return "1 byte" if round(size) == 1 else f"{size:,.0f} bytes"
    decimals = 2 if abs(size) < 9.995 else 1 if abs(size) < 99.95 else 0
    return f"{size:,.{decimals}f} {units[0]}"


def usable(
    card: float, *, context: int = CONTEXT, limit: int | None = None, lost: float = FRAGMENTATION
) -> int:
    """Return how many bytes a run can allocate on a card of `card` bytes, or allows itself.

    Args:
        lost: share of the card that the allocator may lose.
        context: what CUDA will take of them; nothing of memory that was found free.
        limit: what the spec allows.
    """
    found = int(card * (1 - lost)) - context
    return found if limit is None else min(found, limit)


def card_for(needed: int, lost: float = FRAGMENTATION) -> float:
    """Return the bytes of the smallest card on which `needed` bytes can be allocated."""
    return (needed + CONTEXT) / (1 - lost)
