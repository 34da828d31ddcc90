"""Figures in words, as the report page writes them."""

from __future__ import annotations

import math

from ..folders.metrics import SHARE, duration, told_apart, with_unit
from ..memory.cards import size_words
from .run import Measured, Run, measured, number, part, text


def short(value: float) -> str:
    """Return three significant digits, e.g. 3.12, 41.2, 1,230; of an int, a count, all."""
    if isinstance(value, int) and abs(value) < 1e7:
        return f"{value:,}"
    if value and (abs(value) >= 1e7 or abs(value) < 1e-3):
        return f"{value:.2e}"
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    rounded = round(value, digits)
    return f"{rounded:,.{min(max(digits, 0), 4)}f}"


def percent(share: float) -> str:
    """Return a share as a percentage, e.g. `0.22%`."""
    value = 100 * share
    decimals = 0 if abs(value) >= 10 and value % 1 < 0.05 else 1
    return f"{value:.2g}%" if abs(value) < 1 else f"{value:.{decimals}f}%"


def count(number: float) -> str:
    """Return a large number in words, e.g. `494 million`."""
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{short(number / size)} {word}"
    return f"{number:,.0f}"


def mebibytes(value: float) -> str:
    """Return a size in MiB in words, e.g. `41.2 KiB`, `312 MiB`, `1.24 GiB`."""
    return size_words(value * 2**20)


TIMES = "\N{MULTIPLICATION SIGN}"


def headline(run: Run) -> str:
    """Return the run in one line, e.g. `hqq 4-bit x lora: loss 3.7 → 1.1 in 48 s`."""
    figure = _gain(run)
    if figure is None:
        state = run.marker.get("state")
        return f"{_cell(run)}: {state}" if state in ("failed", "interrupted") else _cell(run)
    seconds = number(run.metrics, "train", "seconds")
    spent = f" in {duration(seconds)}" if seconds is not None else ""
    return f"{_cell(run)}: {figure.name} {_change(figure, ' → ')}{spent}"


def _cell(run: Run) -> str:
    backend, adapter = part(run.plan, "backend"), part(run.plan, "adapter")
    bits = number(backend, "options", "bits")
    names = [
        " ".join([text(backend, "name"), f"{bits:g}-bit" if bits else ""]).strip(),
        text(adapter, "name"),
    ]
    return f" {TIMES} ".join(name for name in names if name) or "quantadapt run"


def lede(run: Run) -> str:
    """Return two or three plain sentences: what was trained, what it changed, what it saves."""
    sentences = [_gain_sentence(run), _trained_sentence(run), _size_sentence(run)]
    return " ".join(sentence for sentence in sentences if sentence)


def _gain_sentence(run: Run) -> str:
    figure = _gain(run)
    if figure is None:
        return ""
    before, after = figure.values["quantized"], figure.values["tuned"]
    what = f"the quantized model's {figure.name}"
    if before == after:
        return f"Training left {what} as it was."
    if min(before, after) <= 0 or figure.unit in (SHARE, "%"):  # a ratio would tell nothing
        return f"Training took {what} from {_change(figure, ' to ')}."
    ratio = max(before / after, after / before)
    if ratio >= 2:
        return (
            f"Training made {what} {short(ratio)} times {'lower' if after < before else 'higher'}."
        )
    change = abs(1 - after / before)
    if change < 0.005:
        return f"Training left {what} as it was."
    return f"Training {'lowered' if after < before else 'raised'} {what} by {percent(change)}."


def _trained_sentence(run: Run) -> str:
    trained = number(run.metrics, "train", "trainable_parameters")
    base = number(run.metrics, "train", "base_parameters")
    if not trained or not base:
        return ""
    return f"It trained {count(trained)} parameters beside {count(base)} frozen ones."


def _size_sentence(run: Run) -> str:
    dense = number(run.metrics, "size", "dense_mib")
    quantized = number(run.metrics, "size", "quantized_mib")
    if not dense or not quantized or dense / quantized < 1.05:
        return ""
    now, then, ratio = mebibytes(quantized), mebibytes(dense), short(dense / quantized)
    return f"The base takes {now} instead of {then}, {ratio} times less."


def _change(figure: Measured, to: str) -> str:
    """Return the value before, `to`, and the value after."""
    above, beside = told_apart(figure.unit)
    before = with_unit(figure.values["quantized"], beside, short)
    return f"{before}{to}{with_unit(figure.values['tuned'], above or beside, short)}"


def _gain(run: Run) -> Measured | None:
    """Return the first figure of the first evaluation that was measured before and after."""
    firsts = (figures[0] for _, figures in measured(run))
    return next((f for f in firsts if {"quantized", "tuned"} <= f.values.keys()), None)
