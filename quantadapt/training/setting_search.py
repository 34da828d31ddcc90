"""Which setting of a training step is the fastest that fits, found by trying a few of them.

`choose` is the search alone: it is told by a callback what a setting needs and how long it takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..memory.setting import Setting

CANDIDATES = 4
"""How many sizes of micro-batch are compared."""


@dataclass(frozen=True)
class Probe:
    """One forward and backward pass under a setting.

    Attributes:
        peak: bytes allocated at most, the model included.
        held: bytes allocated between forward and backward.
        seconds: how long it took.
    """

    setting: Setting
    peak: int
    held: int
    seconds: float


Measure = Callable[[Setting], Probe | None]
"""Tries a setting; None where memory ran out."""


def choose(
    measure: Measure,
    most: int,
    layers: int,
    micro_batches: list[int],
    budget: int,
    least: int | None = None,
    keeps_attention: bool = False,
) -> Probe | None:
    """Return the fastest setting, per example, that stays within `budget`; None if none does.

    Args:
        measure: tries a setting.
        most: so many layers can be recomputed with a gain, while their inputs stay on the device.
        layers: how many can be recomputed.
        micro_batches: sizes to try, the largest first.
        budget: bytes that may be allocated.
        least: the same where inputs are in CPU memory; None: as many.
        keeps_attention: whether recomputed layers may keep what attention returned, which for its
            bytes saves more time than keeping all of a layer.
    """
    fitting: list[Probe] = []
    for size in micro_batches:
        rooms = (budget, least or budget)
        found = _least_recompute(measure, most, layers, size, rooms, keeps_attention)
        if found is None:
            continue
        fitting.append(found)
        # A smaller one saves no recomputation any more, it only dequantizes more often.
        if found.setting.recomputed_layers == 0 or len(fitting) == CANDIDATES:
            break
    return min(fitting, key=lambda probe: probe.seconds / probe.setting.micro_batch, default=None)


def _least_recompute(
    measure: Measure,
    most: int,
    layers: int,
    size: int,
    rooms: tuple[int, int],
    keeps_attention: bool,
) -> Probe | None:
    """Return the setting with micro-batches of `size` that fits with the least recomputation."""
    budget, least = rooms

    def tried(count: int, offload: bool = False, attention: bool = False) -> Probe | None:
        probe = measure(Setting(count, offload, size, attention))
        room = least if offload else budget
        return probe if probe is not None and probe.peak <= room else None

    keeps_attention = keeps_attention and most > 0
    first = (tried(most, attention=True) if keeps_attention else None) or tried(most)
    found = [_fewest(tried, first, budget)] if first else []
    again = any(p.setting.recomputed_layers and not p.setting.attention for p in found)
    if keeps_attention and (again or not found):  # on the card attention has no room
        found += filter(None, [tried(layers, offload=True, attention=True)])
    if most and not found:
        found += filter(None, [tried(layers, offload=True)])
    return min(found, key=lambda probe: probe.seconds, default=None)


def _fewest(tried: Callable[..., Probe | None], first: Probe, budget: int) -> Probe:
    """Return what fits with the fewest layers recomputed.

    Args:
        tried: measures a setting of so many layers; None where it does not fit.
        first: what fits, of the most layers.
    """
    most, attention = first.setting.recomputed_layers, first.setting.attention
    best, count, step = first, most, min(2, most)
    while step:
        fewer = tried(count - step, attention=attention and count > step)
        if fewer is None:
            # Measured, it needs more than predicted: go half as far.
            step //= 2
            continue
        best, count = fewer, count - step
        per_layer = max((fewer.held - first.held) / (most - count), 1)
        step = min(count, math.floor((budget - fewer.peak) / per_layer))
    return best


def lowered(setting: Setting, most: int, layers: int, splits: bool) -> Setting | None:
    """Return a setting that needs less memory, or None where there is none.

    Args:
        most, layers: as in `choose`.
        splits: whether a batch can be split.
    """
    count = setting.recomputed_layers
    if count < most:
        return replace(setting, recomputed_layers=min(most, count + math.ceil(most / 4)))
    if setting.attention:
        return replace(setting, attention=False)
    if most and not setting.offload:
        return replace(setting, recomputed_layers=layers, offload=True)
    if splits and setting.micro_batch > 1:
        return replace(setting, micro_batch=setting.micro_batch // 2)
    return None
