"""How training went: its curves, its memory, the time of each stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..folders.metrics import duration
from ..memory.setting import Setting
from .charts import Bar, Curve, bar_chart, line_chart
from .html import Html, capital, el, figures_list, section
from .run import Run, number, part, text
from .words import count, mebibytes, percent, short


def loss_section(run: Run) -> Html:
    """Draw the loss on training data, and on held-out data where that was measured."""
    points, held_out = _points(run, "loss"), _points(run, "eval_loss")
    if len(points) < 2:
        return Html()
    facts = [f"{points[0][0]:g} to {points[-1][0]:g} optimizer steps"]
    seconds, tokens = (number(run.metrics, "train", key) for key in ("seconds", "tokens"))
    if seconds and tokens:
        facts.append(f"{count(tokens)} tokens at {short(tokens / seconds)} per second")
    note = f"{'; '.join(facts)}. The line is a moving average over the dots."
    train = part(run.metrics, "train")
    kept, best = number(train, "kept_step"), number(train, "best_step")
    last = number(train, "steps")
    if held_out:
        note += " The dashed line with diamonds is the loss on held-out data."
    words = [f"It was lowest at step {best:g}." if best is not None else ""]
    words += [f"The adapter of step {kept:g} is kept." if held_out and kept is not None else ""]
    words += ["Training stopped early." if train.get("stopped_early") is True else ""]
    note = " ".join(filter(None, [note, *words]))
    earlier = kept if kept != last else None
    unit = text(train, "unit") if "unit" in train else "nats per token"  # of older runs
    chart = line_chart(Curve(points, held_out, earlier, number(train, "resumed_from"), unit))
    return section("Training loss", el("p", capital(note), class_="note"), chart)


def reward_section(run: Run) -> Html:
    """Draw what answers got while the model learnt from them, where it did."""
    points = _points(run, "reward")
    if len(points) < 2:
        return Html()
    note = "The mean over all answers since the last log. The line is a moving average over the"
    chart = line_chart(Curve(points, what="reward"))
    return section("Reward", el("p", f"{note} dots.", class_="note"), chart)


def _points(run: Run, key: str) -> list[tuple[float, float]]:
    """Return (step, value) of the log's lines that have both."""
    pairs = ((number(line, "step"), number(line, key)) for line in run.log)
    return [(step, value) for step, value in pairs if step is not None and value is not None]


def stages_section(run: Run) -> Html:
    """Draw how long each stage took."""
    stages = part(run.metrics, "stages")
    found = [(name, value) for name in stages if (value := number(stages, name)) is not None]
    total = sum(value for _, value in found)
    if not total:
        return Html()
    longest = max(value for _, value in found)
    bars = [
        Bar(name, value, duration(value), "after" if value == longest else "before")
        for name, value in found
    ]
    told = f"{duration(total)} in all."
    took, taken = number(run.metrics, "quantize", "seconds"), taken_from(run)
    if took is not None and taken:
        told += f" Its base was calibrated in {taken}, which took {duration(took)}."
    note = el("p", told, class_="note")
    return section("Time per stage", note, bar_chart("Time per stage", bars, unit="seconds"))


def taken_from(run: Run) -> str:
    """Return the run that the base was taken from; empty where it made its own."""
    found = part(run.metrics, "quantize").get("taken_from")
    return found if isinstance(found, str) else ""


def memory_section(run: Run) -> Html:
    """Show the sizes of the weights, and what memory training took."""
    size = part(run.metrics, "size")
    named = {
        "dense_mib": ("base, not quantized", "before"),
        "quantized_mib": ("quantized", "after"),
        "adapter_mib": ("adapter", "after"),
    }
    found = [(name, value) for name in named if (value := number(size, name)) is not None]
    bars = [Bar(named[name][0], value, mebibytes(value), named[name][1]) for name, value in found]
    chart = bar_chart("Size of the weights", bars, unit="MiB") if bars else Html()
    train = part(run.metrics, "train")
    calibrating = number(run.metrics, "quantize", "peak_memory_gib")
    figures = figures_list(_memory_figures(train, calibrating))
    words = _setting_words(part(train, "memory"))
    note = el("p", words, class_="note") if words else Html()
    return section("Memory", chart, figures, note) if chart or figures else Html()


def _memory_figures(train: Mapping[str, Any], calibrating: float | None) -> list[tuple[str, str]]:
    peak, trained = number(train, "peak_memory_gib"), number(train, "trainable_parameters")
    base = number(train, "base_parameters")
    figures = []
    if trained is not None:
        share = f", {percent(trained / base)} of the base" if base else ""
        figures.append((count(trained), f"trainable parameters{share}"))
    if peak is not None:
        figures.append((mebibytes(peak * 1024), "peak memory"))
    if calibrating is not None:
        figures.append((mebibytes(calibrating * 1024), "peak memory while the base was calibrated"))
    predicted = number(train, "memory", "predicted_gib")
    if predicted is not None:
        figures.append((mebibytes(predicted * 1024), "predicted for it"))
    if (empty := number(train, "packed", "empty")) is not None:
        figures.append((f"{1 - empty:.1%}", "of packed rows filled"))
    if (streamed := number(train, "streamed", "gib")) is not None:
        figures.append((mebibytes(streamed * 1024), "of the base copied to the GPU in a step"))
    if (hidden := number(train, "streamed", "hidden")) is not None:
        figures.append((percent(hidden), "of the time of copies hidden"))
    dequantizing = number(train, "dequantize_share")
    if dequantizing is not None:
        figures.append((percent(dequantizing), "of training spent on dequantizing"))
    rounding = number(train, "rounding_share")
    if rounding is not None:
        figures.append((percent(rounding), "of training spent on rounding weights"))
    return figures


def _setting_words(memory: Mapping[str, Any]) -> str:
    """Return how training used memory, e.g. `20 of 32 layers recomputed, ...`."""
    names = ("recomputed_layers", "micro_batch", "layers", "batch")
    count, size, layers, batch = (number(memory, name) for name in names)
    if count is None or size is None or layers is None or batch is None:
        return ""
    setting = Setting(
        int(count), memory.get("offload") is True, int(size), memory.get("attention") is True
    )
    return capital(f"{setting.describe(int(layers), int(batch))}.")
