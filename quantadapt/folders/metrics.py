"""The layout of `metrics.json`, which the pipeline writes and the report reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypedDict

from ..memory.cards import size_words

if TYPE_CHECKING:
    from ..protocols import Figure

MODELS = {
    "unquantized": "the model as it was",
    "quantized": "quantized, before training",
    "tuned": "quantized and tuned",
    "merged": "merged into one model",
}
"""The models of a run that are measured, in their order, and what they are."""
NATS = "nats per token"
"""The unit of a figure called `loss`, by which a merge is judged."""
HIGHER = "higher"
"""What `better` says of a figure that is to grow."""
SHARE = "share"
"""The unit of figures that are shown in percent."""
MIB = "MiB"
"""The unit of figures that are sizes."""


class Measured(TypedDict, total=False):
    """One figure of an evaluation: `better` is "lower", "higher" or empty; `values` are by model,
    see `MODELS`, and null where the model gave no finite number. Where their standard errors are
    known, `errors` are those, and `changes` what differs from the model measured before."""

    unit: str
    better: str
    values: dict[str, float | None]
    errors: dict[str, float | None]
    changes: dict[str, Change]


class Change(TypedDict):
    """How far a figure of a model is from that of another, `since`; `error` is the standard error
    of that, example by example where both were measured on the same."""

    since: str
    value: float
    error: float | None


def add_figures(
    metrics: dict[str, Any],
    evaluation: str,
    model: str,
    figures: Mapping[str, Figure],
    earlier: Mapping[str, Mapping[str, Figure]] | None = None,
) -> None:
    """Put what an evaluation found of a model into `metrics`.

    Args:
        earlier: what it found of other models, in the order that they were measured in; the last
            of them is what figures with a standard error are compared with.
    """
    table = metrics["evaluations"].setdefault(evaluation, {})
    for name, figure in figures.items():
        new: Measured = {"unit": figure.unit, "better": figure.better, "values": {}}
        entry = table.setdefault(name, new)
        entry["values"][model] = figure.value
        if figure.error is None:
            continue
        entry.setdefault("errors", {})[model] = figure.error
        if others := [other for other, found in (earlier or {}).items() if name in found]:
            change = figure.since((earlier or {})[others[-1]][name])
            told = {"since": others[-1], "value": change.value, "error": change.error}
            entry.setdefault("changes", {})[model] = told
    if evaluation == "perplexity":  # where it stood before there were others
        metrics["perplexity"] = table["perplexity"]["values"]


def losses(metrics: Mapping[str, Any]) -> Mapping[str, float]:
    """Return the mean losses in nats by model, as the first evaluation that has them found them."""
    for figures in metrics["evaluations"].values():
        if "loss" in figures and figures["loss"]["unit"] == NATS:
            found: Mapping[str, float] = figures["loss"]["values"]
            return found
    return {}


def label(evaluation: str, figure: str) -> str:
    """Return what a figure is called where there are several evaluations."""
    return figure if figure == evaluation else f"{evaluation} {figure}"


def direction(better: str) -> str:
    """Say which way is better; nothing where neither is."""
    return f"{better} is better" if better in ("lower", "higher") else ""


def with_unit(value: float, unit: str, number: Callable[[float], str]) -> str:
    """Return a value with its unit: a share in percent, a size in a unit that fits it, an int as
    the count that it is, and all else made text by `number`."""
    if unit == SHARE:
        return f"{value:.1%}"
    if unit == MIB and math.isfinite(value):
        return size_words(value * 2**20)
    return unit_behind(f"{value:,}" if isinstance(value, int) else number(value), unit)


def with_error(value: float, error: float | None, unit: str, number: Callable[[float], str]) -> str:
    """Return a value with its unit and, if it is known, its standard error."""
    if error is None:
        return with_unit(value, unit, number)
    if unit == SHARE:
        return f"{100 * value:.1f} ± {100 * error:.1f}%"
    return unit_behind(f"{number(value)} ± {error:.2g}", unit)


def change_words(change: Mapping[str, Any], unit: str) -> str:
    """Return how much a figure changed, with its sign and its standard error; shares in percentage
    points."""
    value, error = change["value"], change["error"]
    if unit == SHARE:
        told = f" ± {100 * error:.1f}" if error is not None else ""
        return f"{100 * value:+.1f}{told}%"
    told = f" ± {error:.2g}" if error is not None else ""
    return unit_behind(f"{value:+.4g}{told}", unit)


def unit_behind(number: str, unit: str) -> str:
    """Return a number in words with its unit behind it: `1.2 nats`, `12%`, or without one `1.2`."""
    return f"{number}{unit}" if unit == "%" else f"{number} {unit}".rstrip()


def told_apart(unit: str) -> tuple[str, str]:
    """Return (what heads a column of figures, what stands beside each) of the unit."""
    return ("", unit) if unit == SHARE else (unit, "")


def many(count: int, what: str) -> str:
    """Return how many there are, e.g. `1 row`, `2,000 rows`."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def duration(seconds: float) -> str:
    """Return a duration, e.g. `0.4 s`, `48 s`, `3 min 12 s`, `50 min`, `2 h 5 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s" if seconds >= 0.05 else "under 0.1 s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    parts, units = (whole, ("min", "s")) if whole < 3600 else (whole // 60, ("h", "min"))
    rest = f" {parts % 60} {units[1]}" if parts % 60 else ""
    return f"{parts // 60} {units[0]}{rest}"


class Quantizing(TypedDict, total=False):
    """What calibrating the base took: on `device`, the peak of the GPU, or of the process where
    there is none. `taken_from` is the folder of the run that did, if that was another."""

    seconds: float
    peak_memory_gib: float
    device: str
    taken_from: str


class Training(TypedDict, total=False):
    """What training took; `seconds` is the training loop alone, of which `dequantize_share` went
    into dequantizing the base, and `rounding_share` more into rounding weights (`merge_aware`).
    `validation` is [step, loss on held-out data in nats per token] of all validations, the lowest
    at `best_step`; the adapter is that of `kept_step`. `unit` is that of the losses."""

    steps: int
    unit: str
    validation: list[tuple[int, float]]
    best_step: int | None
    kept_step: int
    stopped_early: bool
    seconds: float
    tokens: int | None
    peak_memory_gib: float | None
    dequantize_share: float | None
    rounding_share: float | None
    trainable_parameters: int
    base_parameters: int
    resumed_from: int | None
    processes: int
    parallel: str
    memory: Memory
    streamed: Streamed


class Streamed(TypedDict, total=False):
    """What was streamed from CPU memory: `gib` in a step, of `host_gib` that lie there; `hidden`
    is the share of the time of copies in which the GPU computed."""

    gib: float
    hidden: float | None
    host_gib: float


class Memory(TypedDict, total=False):
    """The setting that training ended with (see `memory.Setting`), out of so many `layers` and of
    batches of `batch`; on a GPU what is predicted for it and the tokens of the longest example."""

    recomputed_layers: int
    offload: bool
    micro_batch: int
    layers: int
    batch: int
    longest: int
    predicted_gib: float


class Size(TypedDict, total=False):
    """Sizes of the weights in MiB."""

    dense_mib: float | None
    quantized_mib: float | None
    adapter_mib: float | None


class Refusal(TypedDict, total=False):
    """A rule that forbids an export, as in `errors.Problem`."""

    what: str
    fix: str
    rule: str
    where: str


class ExportFigure(TypedDict, total=False):
    """A figure about what was written, see `protocols.Figure`."""

    value: float | None
    unit: str
    better: str


class ExportOutcome(TypedDict, total=False):
    """What became of an export. `state` is "written", "refused" or "failed", `folder` is in that
    of the run, and `words` say it all."""

    state: str
    folder: str
    words: str
    figures: dict[str, ExportFigure]
    refusals: list[Refusal]


class MergeVerdict(TypedDict, total=False):
    """What `exports` says of the merge, under its former name. `kind` is "dense", "requantize",
    "refused" or "never"; the perplexities are on the tokens that were compared."""

    kind: str
    kl: float | None
    top1: float | None
    perplexity_adapter: float | None
    perplexity_merged: float | None
    gain_kept: float | None
    refusals: list[Refusal]


class DataFile(TypedDict, total=False):
    """What became of a data file: see `data.report.FileReport`. `dropped` and `remarks` count by
    reason."""

    file: str
    format: str
    rows: int
    examples: int
    held_out: int
    tokens: int
    learnt: int
    cut: int
    lost: int
    dropped: dict[str, int]
    remarks: dict[str, int]
    unused: list[str]


class Data(TypedDict, total=False):
    """The data, file by file; examples are cut to `max_length` tokens."""

    max_length: int
    files: list[DataFile]


class Sample(TypedDict, total=False):
    """One held-out prompt, answered before and after training."""

    prompt: str
    reference: str | None
    before: str
    after: str


class Metrics(TypedDict, total=False):
    """The layout of `metrics.json`. Every part may be missing; `stages` are seconds by name.

    `evaluations` are figures by evaluation and name, the first of each its headline;
    `failed_evaluations` say why one was left out, `warnings` what is wrong with the tuned model,
    such as that it got worse. `perplexity` is the figure of that name again, as
    it stood before there were other evaluations, for one version.
    """

    evaluations: dict[str, dict[str, Measured]]
    failed_evaluations: dict[str, str]
    warnings: list[str]
    perplexity: dict[str, float | None]
    stages: dict[str, float]
    quantize: Quantizing
    train: Training
    size: Size
    exports: dict[str, ExportOutcome]
    merge: MergeVerdict
    data: Data
    samples: list[Sample]
    command: str
