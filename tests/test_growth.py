"""benchmarks/growth.py: exponents of known curves, the table of several GPUs, and its figures."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")
TABLE = """
| case | GPUs | tokens/s | peak GiB |
| --- | ---: | ---: | ---: |
| one | 1 | 10,000 | 9.40 |
| ddp | 2 | 19,000 | 9.40 / 9.40 |
| fsdp | 2 | failed in process 1: ['no'] | |
| ddp-4 | 4 | 36,100 | 9.40 |
| loss-one | 1 | 60,000 | 4.04 |
"""


@pytest.fixture
def growth(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("growth")


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_is_found(growth: Any, power: float) -> None:
    xs = [1.0, 2.0, 8.0, 64.0]
    assert growth.exponent(xs, [3 * x**power for x in xs]) == pytest.approx(power, abs=1e-12)


def test_what_is_constant_counts_least_at_the_end(growth: Any) -> None:
    values = [(float(x), 5.0 + x) for x in (1, 10, 100, 1000, 10000)]
    fitted, last = growth.exponents(values)
    assert 0.5 < fitted < last
    assert last == pytest.approx(1, abs=0.03)


def test_the_least_seconds_are_those_of_the_products(growth: Any) -> None:
    """Of a shape so small that they can be counted by hand."""
    shape = growth.Shape(8, 16, 3, 4, 2, 32, batch=1, length=10)
    linear = 3 * (2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 16)  # q and o, k and v, the MLP
    lora = 3 * 5 * (2 * 16 + 2 * 12 + 3 * 24)
    assert growth.lora_weights(shape, 5) == lora
    attention = 3 * 4.5 * 2 * 10 * 10 * 8
    flops = 10 * (6 * linear + 4 * 8 * 32 + 9 * lora) + attention
    found = growth.least_seconds(growth.Point(shape, 5))
    assert found == pytest.approx(flops / growth.PEAK_FLOPS)


def test_the_plan_foresees_memory_that_grows(growth: Any) -> None:
    found = growth.curves("cuda")
    for name, low, high in (
        ("layers", 0.2, 1.0),
        ("context", 0.05, 1.0),
        ("vocabulary", 0.2, 1.0),
        ("rank", 0.0, 1.0),
    ):
        values = [
            (float(x), growth.foreseen_gib(point.shape, {"name": "lora", "r": point.rank}))
            for x, point in found[name].points[-2:]
        ]
        assert sorted(y for _, y in values) == [y for _, y in values], name
        assert low < growth.exponents(values)[1] <= high, name


def test_the_rates_of_several_gpus_are_read(growth: Any) -> None:
    found = growth.several(TABLE)
    assert found == {"ddp": [(1, 10000), (2, 19000), (4, 36100)]}
    fitted, _ = growth.exponents(found["ddp"])
    assert fitted == pytest.approx(0.926, abs=1e-3)
    with pytest.raises(ValueError, match="several_gpus"):
        growth.several("nothing")


def test_a_figure_is_an_image_of_its_own(growth: Any) -> None:
    values = [(1.0, 2.0), (2.0, 4.1), (16.0, 33.0)]
    drawn = growth.figure("time by layers", "layers", {"measured": values}, "s")
    root = ElementTree.fromstring(drawn)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    text = "".join(root.itertext())
    assert "measured: 1.01" in text
    assert "--c0" in text  # its colours, light and dark
    assert "script" not in drawn
    assert len(drawn) < 40_000


@pytest.mark.slow
def test_points_are_measured_written_and_read_again(
    growth: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, figures = tmp_path / "growth.json", tmp_path / "figures"
    common = ["growth.py", "--device", "cpu", "--curve", "context", "--figures", str(figures)]
    monkeypatch.setattr(sys, "argv", [*common, "--out", str(out)])
    growth.main()
    first = capsys.readouterr().out
    assert "| context | 128 |" in first
    assert "| context | seconds of a step |" in first
    drawn = (figures / "growth-context-time.svg").read_text()
    monkeypatch.setattr(sys, "argv", [*common, "--read", str(out)])
    growth.main()
    again = capsys.readouterr().out
    assert "| context | 128 |" not in again  # measured no more
    assert again.splitlines()[-1] == first.splitlines()[-1]
    assert (figures / "growth-context-time.svg").read_text() == drawn
