"""Ways to round merged weights onto what a quantizer can hold, and the choice among them.

What an adapter adds is small against the steps of a quantizer, so rounding each weight to the
nearest value takes most of it away again. Each way is a `Way` in one table; `rounded` takes the
best of those that it tries, by the gain that they keep on held-out data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..errors import DataError, GpuTooSmall, MergeRefused, Problem
from ..evaluation.predictions import is_encoder_decoder, predicts_tokens
from ..facade import QuantWeight, facades
from ..planning.exports import AS_TRAINED, rounding_as_trained
from ..planning.memory import MERGE_IN_LESS
from ..quantizing.state import state_of
from .compensating import compensating
from .kept import NO_GRID
from .refining import refined_model
from .tuned import TOO_SMALL, memory_in_words

if TYPE_CHECKING:
    from .tuned import Tuned


@dataclass(frozen=True)
class Way:
    """A way to round merged weights.

    Attributes:
        why_not: says why it cannot be taken here; empty if it can.
        make: returns the base with the adapter merged in and rounded.
    """

    why_not: Callable[[Tuned], str]
    make: Callable[[Tuned], nn.Module]

    def merged(self, tuned: Tuned) -> nn.Module:
        """Return the base with the adapter merged in and quantized again."""
        with memory_in_words():
            return self.make(tuned)


@dataclass(frozen=True)
class Rounded:
    """A merged model that is quantized again.

    Attributes:
        way: how it was rounded.
        kept: what share of the gain each way kept that was tried, in their order.
        left_out: why a way was not tried, by way.
    """

    model: nn.Module
    way: str
    kept: Mapping[str, float] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)


def rounded(tuned: Tuned, rounding: str, least: float) -> Rounded:
    """Return the merged model, rounded in the way `rounding`, one of `WAYS`. With "auto" that is
    the one that keeps most of those tried, from the cheapest on: quick ones until one keeps the
    shares `least` and `ENOUGH` of the gain, slow ones until one keeps `least`; where the gain may
    be chance, the first. A model that was trained through the quantizer is rounded as in training.

    Raises:
        MergeRefused: the way cannot be taken here.
    """
    if state_of(tuned.model).merge_aware:
        if problem := rounding_as_trained(rounding):
            raise MergeRefused([problem])
        return Rounded(tuned.merged("requantize"), AS_TRAINED)
    return _best_of_those_tried(tuned, least) if rounding == "auto" else _asked(tuned, rounding)


def _asked(tuned: Tuned, name: str) -> Rounded:
    if why := WAYS[name].why_not(tuned):
        fix = f"{_REMEDY.get(why, 'use another way')}, or leave export.rounding out"
        raise MergeRefused([Problem(f"{name}: {why}", fix, "export.rounding")])
    return Rounded(WAYS[name].merged(tuned), name)


def _best_of_those_tried(tuned: Tuned, least: float) -> Rounded:
    kept: dict[str, float] = {}
    left_out: dict[str, str] = {}
    best: tuple[float, str, nn.Module] | None = None
    quick, slow = AUTO_CALIBRATED if state_of(tuned.model).backend.calibration else AUTO
    for name in (*quick, *slow):
        if best is not None and best[0] >= (max(least, ENOUGH) if name in quick else least):
            break
        if why := WAYS[name].why_not(tuned):
            left_out[name] = why
            continue
        try:
            model = WAYS[name].merged(tuned)
        except GpuTooSmall as error:  # another may do with less
            left_out[name] = error.problems[0].what
            continue
        if tuned.gain is None or not tuned.gain.is_sure:
            return Rounded(model, name)
        kept[name] = tuned.gain_kept(model) or 0.0
        if best is None or kept[name] > best[0]:
            best = kept[name], name, model
        del model  # at most two of them are in memory
    if best is None:
        whys = {why: _REMEDY.get(why, "merge dense") for why in left_out.values()}
        raise MergeRefused([Problem(why, fix, "export.rounding") for why, fix in whys.items()])
    return Rounded(best[2], best[1], kept, left_out)


# Ways ---------------------------------------------------------------------------------------------

NO_DATA = "it needs data that the model is shown, and there are none"
_REMEDY = {
    NO_DATA: "pass calibration data (calibration=..., --calibration FILE)",
    TOO_SMALL: MERGE_IN_LESS,
}


def _needs_data(tuned: Tuned) -> str:
    try:
        return "" if tuned.calibration else NO_DATA
    except DataError as error:  # e.g. of an objective whose examples are pairs
        return f"there are no data for it: {error.problems[0].what}"


def _needs_what_the_backend_needs(tuned: Tuned) -> str:
    return _needs_data(tuned) if state_of(tuned.model).backend.calibration else ""


def _needs_grid(tuned: Tuned) -> str:
    base = tuned.model.get_base_model()
    return "" if all(facade.has_grid for _, facade in facades(base)) else NO_GRID


def _needs_grid_and_data(tuned: Tuned) -> str:
    return _needs_grid(tuned) or _needs_data(tuned)


NO_TOKENS = "it is trained on the next tokens that a decoder alone predicts"


def _needs_what_refining_needs(tuned: Tuned) -> str:
    if not predicts_tokens(tuned.model) or is_encoder_decoder(tuned.model):
        return NO_TOKENS
    return _needs_grid_and_data(tuned)


def _on_grid(base: QuantWeight, copied: QuantWeight, weight: Tensor) -> None:
    copied.repack(weight)


def _dither(base: QuantWeight, copied: QuantWeight, weight: Tensor) -> None:
    copied.repack(copied.dithered(weight))


def _refine(tuned: Tuned) -> nn.Module:
    return refined_model(tuned.model, tuned.calibration or [])


def _compensate(tuned: Tuned) -> nn.Module:
    return tuned.merged("requantize", compensating(tuned.model, tuned.calibration or []))


WAYS: dict[str, Way] = {
    "nearest": Way(_needs_what_the_backend_needs, lambda tuned: tuned.merged("requantize")),
    "grid": Way(_needs_grid, lambda tuned: tuned.merged("requantize", _on_grid)),
    "dithered": Way(_needs_grid, lambda tuned: tuned.merged("requantize", _dither)),
    "refined": Way(_needs_what_refining_needs, _refine),
    "compensated": Way(_needs_grid_and_data, _compensate),
}
AUTO = (("nearest", "dithered", "refined"), ("compensated",))
"""What is tried, from the cheapest on: quick ones, then slow ones. Not "grid": the base's own
weights are nearest to nearly all merged ones."""
AUTO_CALIBRATED = (("dithered", "refined"), ("compensated", "nearest"))
"""The same where the backend calibrates: as it quantizes, all of the model is made anew."""
ENOUGH = 0.95
"""The share of the gain below which quick ways are tried on, though `min_gain` asks for less."""
