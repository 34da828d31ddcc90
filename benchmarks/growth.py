"""How the time and memory of training grow with layers, context, vocabulary, rank and GPUs.

    python benchmarks/growth.py --figures docs/images
    python benchmarks/growth.py --gpus several.md --curve

LoRA on all linear layers of four decoder layers of Llama-8B's width, nf4, one row of 4,096 tokens,
every layer recomputed; one of these is changed at a time. Weights are random, and all points are
measured in one process, one after the other. For GPUs it measures nothing: `--gpus` is a file with
the table that `several_gpus.py` printed, `one`, `ddp`, `ddp-4`, `fsdp` and `fsdp-4` in it.

Prints a Markdown table of the points: seconds of a step (median of those after the first three,
which compile and record), what they would take at least by arithmetic, GiB in use at most, and what
`quantadapt plan` foresees. Then the exponents: of y ~ x^p, p is fitted by least squares of the
logarithms over all points, and again over the last two alone, where what is constant counts
least; beside them the same of the arithmetic and of the plan. `--figures` is a folder for an SVG of
each curve. `--device cpu` tries it all in a toy size.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from random_models import random_llama
from several_gpus import peak, rows_in_order
from shapes import PEAK_FLOPS, SHAPES, Shape
from speed import device_name
from versions import versions

PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "bitsandbytes", "liger-kernel")
K = 1024
WARM_UP, TIMED = 3, 3
MEASURES = {"seconds": "seconds of a step", "gib": "peak GiB"}


@dataclass(frozen=True)
class Point:
    """What is trained, and what that took.

    Attributes:
        shape: the model and its batch. rank: of LoRA.
        seconds: of a step. least: the same, by arithmetic.
        gib: in use at most. foreseen: the same, by the plan. None: not known.
    """

    shape: Shape
    rank: int = 16
    seconds: float | None = None
    least: float | None = None
    gib: float | None = None
    foreseen: float | None = None


@dataclass(frozen=True)
class Curve:
    """What grows along a curve, and its points, (value, point)."""

    title: str
    points: list[tuple[int, Point]]


def curves(device: str) -> dict[str, Curve]:
    """Return the curves that are measured here, not measured yet; on a CPU in a toy size."""
    if device == "cuda":
        shape = replace(SHAPES["8b"], num_hidden_layers=4, batch=1, length=4 * K)
        sizes = {
            "layers": (2, 4, 8, 16),
            "context": (K, 2 * K, 4 * K, 8 * K, 16 * K, 32 * K),
            "vocabulary": (32 * K, 64 * K, 128 * K, 256 * K),
            "rank": (8, 32, 128, 512),
        }
    else:
        shape = replace(SHAPES["demo"], batch=1)
        sizes = {"layers": (1, 2), "context": (64, 128), "vocabulary": (2 * K, 4 * K),
                 "rank": (4, 8)}  # fmt: skip
    keys = {"layers": "num_hidden_layers", "context": "length", "vocabulary": "vocab_size"}
    titles = {"layers": "decoder layers", "context": "tokens of the row",
              "vocabulary": "words of the vocabulary", "rank": "rank of LoRA"}  # fmt: skip

    def point(name: str, value: int) -> Point:
        if name == "rank":
            return Point(shape, value)
        return Point(replace(shape, **{keys[name]: value}))

    return {
        name: Curve(titles[name], [(value, point(name, value)) for value in values])
        for name, values in sizes.items()
    }


# --- what a point takes --------------------------------------------------------------------------


def measured(point: Point, device: str) -> Point:
    """Return the point with what it took, and what it should have."""
    free(device)
    seconds = median_step(model_of(point.shape, device, "lora", r=point.rank), point.shape)
    allocated, _ = peak(device)
    return replace(
        point,
        seconds=seconds,
        least=least_seconds(point),
        gib=allocated if device == "cuda" else None,
        foreseen=foreseen_gib(point.shape, {"name": "lora", "r": point.rank}),
    )


def model_of(shape: Shape, device: str, adapter: str, **options: Any) -> Any:
    """Return a random Llama on nf4 with an adapter on all linear layers."""
    import torch

    import quantadapt as qa
    from quantadapt.registry import registry

    dtype = "bfloat16" if device == "cuda" else "float32"
    quantize = registry().backend("bnb-nf4").quantizer().quantize_linear
    model = random_llama(shape, quantize, device, getattr(torch, dtype))
    base = qa.quantize(model, "bnb-nf4", device=device, dtype=dtype)
    peak(device)
    return qa.attach(base, adapter, **options)


def median_step(model: Any, shape: Shape, **options: Any) -> float:
    """Train a few steps on random tokens, every layer recomputed; return the seconds of one.

    Args:
        options: of TrainSpec.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer

    import quantadapt as qa
    from quantadapt import demo

    generator = torch.Generator().manual_seed(1)
    size = ((WARM_UP + TIMED) * shape.batch, shape.length)
    rows = torch.randint(shape.vocab_size, size, generator=generator).tolist()
    data = Dataset.from_dict({"input_ids": rows, "completion_mask": [[1] * len(r) for r in rows]})
    ends: list[float] = []
    with rows_in_order():
        qa.train(
            model,
            data,
            tokenizer=AutoTokenizer.from_pretrained(demo.MODEL_DIR),
            on_log=lambda _: ends.append(time.perf_counter()),  # reading a loss waits for the GPU
            max_steps=WARM_UP + TIMED,
            per_device_train_batch_size=shape.batch,
            logging_steps=1,
            **{"gradient_checkpointing": True, **options},
        )
    times = sorted(b - a for a, b in pairwise(ends[WARM_UP - 1 :]))
    return times[len(times) // 2]


def free(device: str) -> None:
    """Give back what an earlier model left, and count the peak anew."""
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def least_seconds(point: Point) -> float:
    """Return the time of a step's matrix products at what a card reaches with large ones: of the
    frozen weights, of attention and of LoRA."""
    shape, tokens = point.shape, point.shape.tokens
    # Scores and values, half of them masked: once in forward, once recomputed, 2.5 times backward.
    attention = 4.5 * 2 * tokens * shape.length * shape.hidden_size * shape.num_hidden_layers
    # Both factors forward and again; backward three products for A, two for B.
    lora = 9 * tokens * lora_weights(shape, point.rank)
    return shape.floor_seconds(1.0) + (attention + lora) / PEAK_FLOPS


def lora_weights(shape: Shape, rank: int) -> int:
    """Return how many weights LoRA on the seven projections trains."""
    hidden, inside = shape.hidden_size, shape.intermediate_size
    keys = hidden * shape.num_key_value_heads // shape.num_attention_heads
    sides = 2 * 2 * hidden + 2 * (hidden + keys) + 3 * (hidden + inside)
    return shape.num_hidden_layers * rank * sides


def foreseen_gib(shape: Shape, adapter: dict[str, Any]) -> float:
    """Return the peak that `quantadapt plan` foresees from the config alone, every layer
    recomputed.

    Args:
        adapter: its name and options, as in a spec.
    """
    import tempfile

    from quantadapt.memory.setting import Setting
    from quantadapt.planning import plan
    from quantadapt.spec import Spec

    with tempfile.TemporaryDirectory() as folder:
        shape.config().save_pretrained(folder)
        spec = Spec(
            model=folder,
            backend="bnb-nf4",
            adapter=adapter,
            data={"max_length": shape.length},
            train={"per_device_train_batch_size": shape.batch, "gradient_checkpointing": True},
            dtype="bfloat16",
        )
        memory = plan(spec, check_output=False, cards=[141.0], weights=False).memory
    assert memory is not None
    setting = Setting(shape.num_hidden_layers, False, shape.batch)
    return memory.work.peak(setting) / 2**30


# --- exponents -----------------------------------------------------------------------------------


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return p of y ~ x^p, by least squares of the logarithms."""
    u, v = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    covariance = sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True))
    return covariance / sum((a - mean_u) ** 2 for a in u)


Values = list[tuple[float, float]]


def exponents(values: Values) -> tuple[float, float]:
    """Return the exponent of all points, and of the last two alone."""
    fits = [exponent(*zip(*part, strict=True)) for part in (values, values[-2:])]
    return fits[0], fits[1]


def values_of(curve: Curve, key: str) -> Values:
    """Return (x, y) of the points of which `key` is known."""
    found = ((float(x), getattr(point, key)) for x, point in curve.points)
    return [(x, y) for x, y in found if y is not None]


def exponent_rows(name: str, curve: Curve) -> Iterable[str]:
    """Yield the lines of a curve in the table of exponents."""
    for key, beside in (("seconds", "least"), ("gib", "foreseen")):
        if len(values_of(curve, key)) < 2:
            continue
        cells = [f"{p:.2f}" for k in (key, beside) for p in exponents(values_of(curve, k))]
        yield f"| {name} | {MEASURES[key]} | {' | '.join(cells)} |"


# --- several GPUs --------------------------------------------------------------------------------


def several(table: str) -> dict[str, Values]:
    """Return way -> (GPUs, tokens/s) of the table that `several_gpus.py` prints; what failed is
    left out. Raises ValueError if `one`, or all else, is not in it."""
    rates: dict[str, tuple[float, float]] = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) > 2 and cells[1].isdigit() and "failed" not in cells[2]:
            rates[cells[0]] = float(cells[1]), float(cells[2].replace(",", ""))
    ways = {
        way: [rates["one"], *(rates[name] for name in (way, f"{way}-4") if name in rates)]
        for way in ("ddp", "fsdp")
        if "one" in rates
    }
    found = {way: values for way, values in ways.items() if len(values) > 1}
    if not found:
        raise ValueError("no row `one` beside `ddp` or `fsdp`: give several_gpus.py's table")
    return found


# --- figures -------------------------------------------------------------------------------------


def figure(title: str, across: str, lines: dict[str, Values], up: str) -> str:
    """Return an SVG file with its style, light and dark: lines of points, with logarithms where
    they span much, and the exponent of each beside its last point."""
    from quantadapt.reporting.html import styles
    from quantadapt.reporting.scatter import Axis, drawing
    from quantadapt.reporting.scatter import Point as Mark

    marks = []
    for number, (name, values) in enumerate(lines.items()):
        for x, y in values:
            last = (x, y) == values[-1]
            label = f"{name}: {exponents(values)[0]:.2f}" if last else ""
            marks.append(Mark(x, y, label, [f"{x:g}: {y:g}"], colour=number, group=name))
    drawn = drawing(title, marks, Axis(f"{across} →", "{:,g}".format), Axis(up, "{:g}".format))
    style = f"<style>{styles('charts.css', 'report.css', 'compare.css')}</style>"
    start, rest = drawn.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).split(
        ">", 1
    )
    return f"{start}>{style}{rest}\n"


def write_figures(found: dict[str, Curve], folder: Path) -> None:
    """Write growth-CURVE-time.svg and -memory.svg of what was measured."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, curve in found.items():
        for word, key, beside, by in (
            ("time", "seconds", "least", "by arithmetic"),
            ("memory", "gib", "foreseen", "by the plan"),
        ):
            lines = {"measured": values_of(curve, key), by: values_of(curve, beside)}
            if len(lines["measured"]) > 1:
                drawn = figure(f"{word} by {name}", curve.title, lines, MEASURES[key])
                (folder / f"growth-{name}-{word}.svg").write_text(drawn, encoding="utf-8")


def main() -> None:
    """Measure the curves and print the tables."""
    given = arguments()
    found = read(given.read) if given.read else {}
    heads = [*MEASURES.values(), "at least", "foreseen GiB"]
    if given.curve and not given.read:
        print(f"| curve | value | {' | '.join(heads)} |\n| --- | {'---: | ' * 5}", flush=True)
    for name, curve in curves(given.device).items():
        if name in given.curve and not given.read:
            points: list[tuple[int, Point]] = []
            for value, point in curve.points:
                points.append((value, measured(point, given.device)))
                print(line_of(name, *points[-1]), flush=True)
            found[name] = replace(curve, points=points)
    if not given.read:
        print(f"\n{device_name(given.device)}; {versions(*PACKAGES)}")
    print("\n| curve | of | exponent | last two | predicted | last two |")
    print(f"| --- | --- | {'---: | ' * 4}")
    for name, curve in found.items():
        print("\n".join(exponent_rows(name, curve)))
    ways = several(given.gpus.read_text(encoding="utf-8")) if given.gpus else {}
    for way, values in ways.items():
        fitted, last = exponents(values)
        print(f"| GPUs, {way} | tokens/s | {fitted:.2f} | {last:.2f} | 1.00 | 1.00 |")
    if given.out:
        points_of = {n: [(x, asdict(p)) for x, p in c.points] for n, c in found.items()}
        given.out.write_text(json.dumps(points_of, indent=1), encoding="utf-8")
    if given.figures:
        write_figures(found, given.figures)
        if ways:
            drawn = figure("tokens per second by GPUs", "GPUs", ways, "tokens/s")
            (given.figures / "growth-gpus.svg").write_text(drawn, encoding="utf-8")


def read(path: Path) -> dict[str, Curve]:
    """Return the curves of a file that `--out` wrote."""
    made = json.loads(path.read_text(encoding="utf-8"))
    titles = curves("cuda")
    return {
        name: Curve(
            titles[name].title,
            [(x, Point(**{**point, "shape": Shape(**point["shape"])})) for x, point in points],
        )
        for name, points in made.items()
    }


def line_of(name: str, value: int, point: Point) -> str:
    """Return the line of a point."""
    numbers = (
        *((point.seconds, ".4f"), (point.gib, ".2f")),
        *((point.least, ".4f"), (point.foreseen, ".2f")),
    )
    cells = ["" if number is None else format(number, style) for number, style in numbers]
    return f"| {name} | {value:,} | {' | '.join(cells)} |"


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(curves("cuda"))
    parser.add_argument("--curve", nargs="*", choices=names, default=names)
    parser.add_argument("--gpus", type=Path, help="a file with the table of several_gpus.py")
    parser.add_argument("--figures", type=Path, help="a folder for the SVG files")
    parser.add_argument("--out", type=Path, help="a file for the points as JSON")
    parser.add_argument("--read", type=Path, help="such a file, to draw it instead of measuring")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    return parser.parse_args()


if __name__ == "__main__":
    main()
