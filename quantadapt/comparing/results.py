"""What was measured of each run, and the rows that a cell's runs come to. Pure, but for reading the
folder of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, TypeGuard

from ..folders.metrics import NATS, SHARE, duration, label
from ..folders.run_folder import RunFolder
from ..reporting.words import mebibytes
from .folder import WHOLE, Journal, Record
from .grid import DENSE, Cell, Comparison


def figures_of(folder: Path) -> dict[str, Any]:
    """Return what is told of a run in a table, from its folder.

    `evaluations` is as in `metrics.json` (figures by evaluation and name, with values by model);
    the others are numbers, where they are known.
    """
    metrics = RunFolder(folder).read_json("metrics.json")
    train, size = _part(metrics, "train"), _part(metrics, "size")
    quantize = _part(metrics, "quantize")
    seconds, tokens = train.get("seconds"), train.get("tokens")
    found = {
        "steps": train.get("steps"),
        "memory_gib": _peak(train, quantize),
        "quantize_seconds": quantize.get("seconds"),
        "quantize_memory_gib": quantize.get("peak_memory_gib"),
        "tokens_per_second": tokens / seconds if seconds and tokens else None,
        "train_seconds": seconds,
        "base_mib": size.get("quantized_mib"),
        "adapter_mib": size.get("adapter_mib"),
        "dense_mib": size.get("dense_mib"),
        "trained": train.get("trainable_parameters"),
        "gain_kept": gain_kept(_part(metrics, "evaluations")),
    }
    kept = {key: value for key, value in found.items() if _is_number(value)}
    return kept | {
        "evaluations": _part(metrics, "evaluations"),
        "data": _data(metrics),
        "warnings": metrics.get("warnings") or [],
        "merge": _part(metrics, "merge").get("kind"),
        "base_from": Path(str(quantize.get("taken_from") or "")).name,
    }


def _peak(train: Mapping[str, Any], quantize: Mapping[str, Any]) -> Any:
    """Return the peak of training: that of the GPU; else of a process, which would have been that
    of quantizing as well."""
    found = [train.get("peak_memory_gib")]
    if quantize.get("device") == "cpu":
        found.append(quantize.get("peak_memory_gib"))
    return max(filter(_is_number, found), default=None)


def gain_kept(evaluations: Mapping[str, Any]) -> float | None:
    """Return the share of what training gained, in nats, that the files of the merged model keep;
    None where there is no merge, or no gain."""
    for figures in evaluations.values():
        loss = _part(figures, "loss")
        values = _part(loss, "values")
        found = [v for m in ("quantized", "tuned", "merged") if _is_number(v := values.get(m))]
        if loss.get("unit") == NATS and len(found) == 3:
            before, tuned, merged = found
            return (before - merged) / (before - tuned) if before > tuned else None
    return None


def _data(metrics: Mapping[str, Any]) -> list[list[Any]]:
    """Return what shows whether runs had the same data: counts by file."""
    keys = ("file", "examples", "held_out", "tokens")
    files = _part(metrics, "data").get("files") or []
    return [[file.get(key) for key in keys] for file in files]


@dataclass(frozen=True)
class Stat:
    """A figure over the seeds: its mean, and the standard deviation of one run's where there are
    several."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Of all runs."""
        return fmean(self.values)

    @property
    def spread(self) -> float | None:
        """The standard deviation; None of one run."""
        return stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Quality:
    """A figure of an evaluation that tells how good a model is.

    Attributes:
        name: as tables have it; the first one's of an evaluation is also that one's.
        unit: empty where it has none.
        better: "lower" or "higher".
    """

    name: str
    unit: str
    better: str

    def worse(self, value: float, best: float) -> float:
        """Return by how much a value is worse than another: as a share of that, of figures in
        percent as the difference."""
        difference = value - best if self.better == "lower" else best - value
        return difference if self.unit == SHARE else difference / abs(best) if best else difference

    def scaled(self, value: float) -> float:
        """Return a value on the scale on which runs are compared: shares as they are, others by
        their logarithm where they have one."""
        return value if self.unit == SHARE or value <= 0 else math.log(value)

    @property
    def sign(self) -> int:
        """1 where lower is better, else -1."""
        return 1 if self.better == "lower" else -1


@dataclass
class Row:
    """A cell in the table.

    Attributes:
        state: of its runs, that which matters most.
        reason: why it is not finished.
        names: of the run folders that figures come from.
        steps: to which the model was trained; None where nothing was measured.
        before, after: by quality, of the quantized and of the tuned model.
        errors: by quality, the standard error of the tuned model's figure by what it was asked.
        numbers: by name, see `figures_of`, and "size_mib" and "seconds" of all attempts.
    """

    label: str
    cell: Cell | None = None
    reference: bool = False
    state: str = "waiting"
    reason: str = ""
    names: list[str] = field(default_factory=list)
    steps: int | None = None
    before: dict[str, Stat] = field(default_factory=dict)
    after: dict[str, Stat] = field(default_factory=dict)
    errors: dict[str, Stat] = field(default_factory=dict)
    numbers: dict[str, Stat] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass
class Table:
    """All that was found.

    Attributes:
        rows: the base, then the cells, the best first, then those that have no figures.
        qualities: by name; the first is what is judged by.
        dropped: whether some were, to save time.
        remarks: what a reader has to know before rows are compared.
        shared: which bases were made once for several runs.
    """

    rows: list[Row]
    qualities: dict[str, Quality]
    remarks: list[str] = field(default_factory=list)
    shared: str = ""

    @property
    def quality(self) -> Quality | None:
        """What is judged by; None where nothing was measured."""
        return next(iter(self.qualities.values()), None)

    def judged(self) -> list[Row]:
        """Return the rows that were trained whole and measured, the best first; where there are
        none, as the budget was spent before, those that were trained furthest."""
        quality = self.quality
        if quality is None:
            return []
        measured = [row for row in self.rows if row.cell and quality.name in row.after]
        whole = [row for row in measured if row.state == "finished"]
        if whole:
            return whole
        furthest = max((row.steps or 0 for row in measured), default=0)
        rows = [row for row in measured if row.steps == furthest]
        return sorted(rows, key=lambda row: quality.sign * row.after[quality.name].mean)

    def candidates(self) -> list[Row]:
        """Return those of them that may be recommended."""
        return [row for row in self.judged() if not row.reference]


def table_of(comparison: Comparison, journal: Journal) -> Table:
    """Return what has been found so far."""
    records = {run.name: journal.runs.get(run.name, Record()) for run in comparison.runs}
    results = {name: _last(record) for name, record in records.items()}
    by = comparison.options.by
    qualities = _qualities(results.values(), by)
    rows = []
    for cell in comparison.cells:
        names = [run.name for run in comparison.runs if run.cell.label == cell.label]
        rows.append(_row(cell, {n: records[n] for n in names}, results, qualities))
    order = {"finished": 0, "dropped": 1}
    first = next(iter(qualities.values()), None)

    def place(row: Row) -> tuple[int, float]:
        known = first is not None and first.name in row.after
        badness = first.sign * row.after[first.name].mean if first and known else 0.0
        return (order.get(row.state, 2), badness)

    base = _base_row(results.values(), rows, qualities)
    remarks = [*journal.remarks, *_other_data(results)]
    if by and qualities and by not in qualities:
        known = ", ".join(qualities)
        remarks.append(f"no run has a figure {by!r} to judge by; there are {known}")
    shared = _shared_words(results)
    return Table([*base, *sorted(rows, key=place)], qualities, remarks, shared)


def badness(result: Mapping[str, Any], by: str) -> float | None:
    """Return how bad the tuned model of a run is; None where that was not measured."""
    found = next(iter(_qualities([result], by).values()), None)
    value = _values(result, found.name).get("tuned") if found else None
    return found.sign * found.scaled(value) if found and _is_number(value) else None


def tuned_values(results: Iterable[Mapping[str, Any]], quality: str) -> list[float]:
    """Return a figure of the tuned models of runs, where it was measured."""
    values = (_values(result, quality).get("tuned") for result in results)
    return [float(value) for value in values if _is_number(value)]


def _qualities(results: Iterable[Mapping[str, Any]], by: str) -> dict[str, Quality]:
    """Return the first figure of each evaluation, and those in percent, `by` before all others."""
    found: dict[str, Quality] = {}
    for result in results:
        for evaluation, figures in _part(result, "evaluations").items():
            for index, (name, figure) in enumerate(figures.items()):
                wanted = label(evaluation, name) == by
                told = index == 0 or figure.get("unit") == SHARE or wanted
                if told and figure.get("better") in ("lower", "higher"):
                    named = label(evaluation, name)
                    found[named] = Quality(named, figure.get("unit", ""), figure["better"])
    return {**({by: found[by]} if by in found else {}), **found}


def _values(result: Mapping[str, Any], quality: str, what: str = "values") -> Mapping[str, Any]:
    """Return a figure by model, or its errors."""
    for evaluation, figures in _part(result, "evaluations").items():
        for name, figure in figures.items():
            if label(evaluation, name) == quality:
                return _part(figure, what)
    return {}


def _last(record: Record) -> Mapping[str, Any]:
    """Return the result after the most steps."""
    if WHOLE in record.results:
        return record.results[WHOLE]
    steps = sorted(record.results, key=int)
    return record.results[steps[-1]] if steps else {}


_WORST_FIRST = ("failed", "refused", "interrupted", "running", "waiting", "dropped", "finished")
_SIZES = ("base_mib", "adapter_mib")


def _row(
    cell: Cell,
    records: Mapping[str, Record],
    results: Mapping[str, Mapping[str, Any]],
    qualities: Mapping[str, Quality],
) -> Row:
    states = [record.state for record in records.values()]
    state = min(states, key=_WORST_FIRST.index)
    failed = [record.reason for record in records.values() if record.state == "failed"]
    if failed and set(states) == {"failed", "finished"}:
        state = "finished"
    reasons = dict.fromkeys(r.reason for r in records.values() if r.reason and r.state == state)
    found = {name: results[name] for name in records if results[name]}
    row = Row(cell.label, cell, cell.reference, state, "; ".join(reasons), [*found])
    steps = [int(result["steps"]) for result in found.values() if "steps" in result]
    row.steps = min(steps, default=None)
    for quality in qualities:
        for model, into in (("quantized", row.before), ("tuned", row.after)):
            values = [_values(result, quality).get(model) for result in found.values()]
            _add(into, quality, values)
        errors = [_values(result, quality, "errors").get("tuned") for result in found.values()]
        _add(row.errors, quality, errors)
    keys = dict.fromkeys(key for result in found.values() for key in result)
    for key in keys:
        _add(row.numbers, key, [result.get(key) for result in found.values()])
    sizes = [
        sum(result[key] for key in _SIZES)
        for result in found.values()
        if all(_is_number(result.get(key)) for key in _SIZES)
    ]
    _add(row.numbers, "size_mib", sizes)
    seconds = [r.seconds + _of_its_base(results[n]) for n, r in records.items() if r.seconds]
    _add(row.numbers, "seconds", seconds)
    said = (text for result in found.values() for text in result.get("warnings", []))
    row.warnings = [*dict.fromkeys(map(str, said))]
    for quality, stat in row.after.items():
        if missing := len(found) - len(stat.values):
            row.warnings.append(f"{quality} was not measured in {missing} of {len(found)} runs")
    if failed and state == "finished":
        row.warnings.append(f"{len(failed)} of {len(states)} runs failed: {failed[0]}")
    return row


def _of_its_base(result: Mapping[str, Any]) -> float:
    """Return the seconds that another run took to make the base of this one."""
    return float(result.get("quantize_seconds") or 0.0) if result.get("base_from") else 0.0


def _shared_words(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Say which bases were made once for several runs, and what that took; empty where none was."""
    takers: dict[str, list[Mapping[str, Any]]] = {}
    for result in results.values():
        if maker := result.get("base_from"):
            takers.setdefault(maker, []).append(result)
    told = []
    for maker, taken in takers.items():  # those who took it know what it took, see `Quantizing`
        seconds, peak = taken[0].get("quantize_seconds"), taken[0].get("quantize_memory_gib")
        if _is_number(seconds) and _is_number(peak):
            own = results.get(maker, {})  # it may be a run of none of the rows here
            count = len(taken) + (bool(own) and not own.get("base_from"))
            runs = "1 run" if count == 1 else f"{count} runs"
            took = f"{duration(seconds)}, {mebibytes(1024 * peak)} at the peak"
            told.append(f"that of {maker} by {runs} ({took})")
    if not told:
        return ""
    more = f" and {len(told) - 3} more" if told[3:] else ""
    return (
        f"Bases that were calibrated once, and shared: {', '.join(told[:3])}{more}."
        " The time of each run is as if it had made its own, and so is peak memory on a CPU."
    )


def _add(into: dict[str, Stat], key: str, values: Sequence[Any]) -> None:
    numbers = tuple(float(value) for value in values if _is_number(value))
    if numbers:
        into[key] = Stat(numbers)


def _base_row(
    results: Iterable[Mapping[str, Any]], rows: Sequence[Row], qualities: Mapping[str, Quality]
) -> Iterator[Row]:
    """Yield the base before it is quantized: measured by itself, or as the dense reference begins
    with it."""
    row = Row("base, not quantized", reference=True, state="base")
    dense = [r for r in rows if r.cell and _backend(r.cell) == DENSE]
    for quality in qualities:
        for result in results:
            value = _values(result, quality).get("unquantized")
            if _is_number(value):
                row.before.setdefault(quality, Stat((float(value),)))
        for other in dense:
            if quality in other.before:
                row.before.setdefault(quality, Stat(other.before[quality].values[:1]))
    sizes: list[float] = [v for result in results if _is_number(v := result.get("dense_mib"))]
    sizes += [other.numbers["base_mib"].mean for other in dense if "base_mib" in other.numbers]
    _add(row.numbers, "base_mib", sizes[:1])
    _add(row.numbers, "size_mib", sizes[:1])
    if row.before:
        yield row


def _backend(cell: Cell) -> str:
    value = cell.settings["backend"]
    return str(value.get("name")) if isinstance(value, Mapping) else str(value)


def _other_data(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield a sentence where runs were not trained and measured on the same data."""
    seen: dict[str, list[str]] = {}
    for name, result in results.items():
        if result.get("data"):
            seen.setdefault(str(result["data"]), []).append(name)
    if len(seen) > 1:
        few = min(seen.values(), key=len)
        names = ", ".join(few[:3]) + (f" and {len(few) - 3} more" if few[3:] else "")
        yield f"the data have changed between runs: {names} had others, and cannot be compared"


def _part(values: Any, key: str) -> Mapping[str, Any]:
    found = values.get(key) if isinstance(values, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
