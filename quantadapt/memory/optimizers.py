"""What optimizers keep."""

from __future__ import annotations

_ONE_STATE = ("lion", "sgd", "rmsprop", "adagrad", "adafactor")


def optimizer_bytes(name: str) -> int:
    """Return how many bytes per trained weight the optimizer `name` keeps on the GPU for good.

    Paged states may leave it (https://arxiv.org/abs/2305.14314), 8-bit ones are codes and a few
    scales (https://arxiv.org/abs/2110.02861).
    """
    if "paged" in name:
        return 0
    states = 1 if any(part in name for part in _ONE_STATE) else 3 if "ademamix" in name else 2
    return states * (1 if "8bit" in name or "4bit" in name else 4)


def between_passes(trained: int, optim: str, *, accumulates: bool, begun: bool = False) -> int:
    """Return the bytes that a step takes and a single pass does not show: the optimizer's states,
    and where gradients accumulate, a copy to go back to.

    Args:
        trained: how many weights are trained, in float32.
        begun: whether the optimizer's states are there already.
    """
    states = 0 if begun else optimizer_bytes(optim)
    return trained * (states + (4 if accumulates else 0))
