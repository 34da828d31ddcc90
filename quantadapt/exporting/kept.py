"""How near a merged model is to the adapter, in words, and the refusal where it keeps too little of
what was learned, with the options for it. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import Field

from ..capabilities import Cell, Merge
from ..errors import MergeRefused, Problem
from ..evaluation.gain import Gain
from ..protocols import AdapterTarget, Exporter, Figure
from ..records import Adapter, Backend
from ..spec import MinGain, Rounding

RULE = "merge-keeps-the-gain"
KEPT = "kept_"
"""How figures are called that say what share of the gain a way of rounding kept."""
NO_GRID = "it is not known what values the scales of this backend's layers allow"
TRAIN_AWARE = "train with train.merge_aware: true"
ROUND_OTHERWISE = "round in another way (export.rounding, --rounding)"
MERGE_DENSE = (
    "merge dense (export.merge: dense, --kind dense), merge onto the unquantized base (quantadapt "
    "merge RUN --onto BASE), keep the adapter beside the base"
)
TAKE_ANY = "lower export.min_gain (--min-gain)"
"""Ways out of a refusal; which of them there are depends on the export."""


def merge_words(figures: Mapping[str, Figure]) -> str:
    """Say how near a merged model is to the adapter."""
    facts, found = [], {name: figure.value for name, figure in figures.items()}
    if (kl := found.get("kl")) is not None:
        size = "below 1e-7" if kl < 1e-7 else f"{kl:.1e}"
        facts.append(f"KL to the adapter {size} nats per token")
    if (error := found.get("error")) is not None:
        facts.append(f"answers are off by {error:.1e} of the adapter's")
    if (top1 := found.get("top1")) is not None:
        facts.append(f"same first choice for {top1:.1%} of tokens")
    return ", ".join(filter(None, [*facts, _gain_words(found)]))


def _gain_words(found: Mapping[str, float]) -> str:
    """Say what is kept of the gain, or why nobody can tell."""
    if "gain" not in found:
        return ""
    if is_sure(found):
        return f"keeps {found['gain_kept']:.0%} of the gain of {_size(found)}"
    if "gain_kept" not in found:
        return "no gain in perplexity that it could keep"
    return f"the gain, {_size(found)}, is too small here to tell what is kept"


def _size(found: Mapping[str, float]) -> str:
    return f"{found['gain']:.2g} ± {found['gain_error']:.1g} nats per token"


def is_sure(found: Mapping[str, float]) -> bool:
    """Say whether figures tell of a gain that is more than chance on the held-out data."""
    return "gain_kept" in found and Gain(found["gain"], found["gain_error"]).is_sure


def rounding_words(figures: Mapping[str, Figure], way: str) -> str:
    """Say how merged weights were rounded, and what other ways would have kept.

    Args:
        way: the one that was taken; or "auto", where the figures tell.
    """
    tried = {
        name.removeprefix(KEPT): figure.value
        for name, figure in figures.items()
        if name.startswith(KEPT)
    }
    way = max(tried, key=tried.__getitem__) if way == "auto" and tried else way
    shares = ", ".join(f"{name} {share:.0%}" for name, share in tried.items())
    taken = "" if way == "auto" else f"rounding {way}"
    return f"{taken} (keeping: {shares})" if shares else taken


def refuse_little(
    figures: Mapping[str, Figure],
    least: float,
    rounding: str,
    left_out: Mapping[str, str],
    ways_out: Sequence[str],
) -> None:
    """Raise MergeRefused where a merged model keeps less than the share `least` of a gain that is
    more than chance; 0 takes any.

    Args:
        rounding: says how it was rounded.
        left_out: ways of rounding that could not be tried, and why.
        ways_out: what this export can be told instead.
    """
    found = {name: figure.value for name, figure in figures.items()}
    if least == 0 or not is_sure(found) or found["gain_kept"] >= least:
        return
    untried = "".join(f"; {way} was left out: {why}" for way, why in left_out.items())
    what = (
        f"merged and quantized again, the model keeps {found['gain_kept']:.0%} of the gain "
        f"({_size(found)} on held-out data), less than {least:.0%}; {rounding}{untried}"
    )
    fix = f"{', '.join(ways_out[:-1])}, or {ways_out[-1]}"
    raise MergeRefused([Problem(what, fix, "export.min_gain", RULE)], figures)


# Options -----------------------------------------------------------------------------------------


class Requantizing(Exporter):
    """An export that quantizes merged weights again where its `merges` says so. In a run, what
    `export` says of these options holds for it, too."""

    min_gain: MinGain = Field(
        0.9,
        description="of a merge that is quantized again: the share of the adapter's gain, in nats "
        "on held-out data, to be kept",
    )
    rounding: Rounding = Field(
        "auto",
        description="of such a merge: nearest, grid, dithered, refined, compensated, or auto: the "
        "best of those tried until min_gain and, by quick ones, 0.95 are kept",
    )

    def refusals(self, cell: Cell, backend: Backend, adapter: Adapter) -> list[Problem]:
        """Return why it does not round so, or that it rounds nothing."""
        if self.merges == Merge.REQUANTIZE:
            target = backend.quantizer(**cell.backend_options).target
            return _grid_problems(self.rounding, target)
        what, fix = "it has no effect: nothing is quantized again here", "leave it out"
        fields = Requantizing.model_fields
        return [
            Problem(what, fix, where=f"export.{name}")
            for name in ("min_gain", "rounding")
            if getattr(self, name) != fields[name].default
        ]


def _grid_problems(rounding: str, target: AdapterTarget) -> list[Problem]:
    """Return why weights of a backend cannot be rounded that way; empty if they can, or if that
    only shows with the model."""
    if rounding in ("auto", "nearest") or type(target).grid is not AdapterTarget.grid:
        return []
    what = f"{rounding}: {NO_GRID}"
    return [Problem(what, "use nearest, or leave it out", "export.rounding", "rounding-grid")]
