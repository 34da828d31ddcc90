"""A model that training made worse, or left as it was, is no success: it is told everywhere."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from few_rows import few_rows
from rich.console import Console

import quantadapt as qa
from quantadapt.cli.progress import RunDisplay, show_result
from quantadapt.evaluation.verdict import training_warnings, warnings_of
from quantadapt.testing.small_demo import small_model

FALLING = [(step, 3.0 - step / 10) for step in range(1, 11)]


def metrics(**figures: Any) -> dict[str, Any]:
    """Return figures of one evaluation each, as (unit, better, before, after)."""
    found: dict[str, Any] = {}
    for name, (unit, better, before, after) in figures.items():
        values = {"quantized": before, "tuned": after}
        evaluation = "perplexity" if name == "loss" else name
        found[evaluation] = {name: {"unit": unit, "better": better, "values": values}}
    return {"evaluations": found}


def loss(before: float, after: float) -> dict[str, Any]:
    return metrics(loss=("nats per token", "lower", before, after))


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (math.log(16), math.log(2048), ["worse", "2.773 to 7.625 nats", "16 to 2048", "lower tr"]),
        (2.0, 2.0002, ["worse"]),
        (2.0, math.nan, ["useless", "no number"]),
        (2.0, math.inf, ["useless", "no number"]),
        (2.0, 2.0 - 5e-5, ["changed nothing", "stayed at 2 ", "raise train.learning_rate"]),
        (2.0, 2.0, ["changed nothing"]),
    ],
)
def test_a_loss_that_did_not_fall_is_told(before: float, after: float, words: list[str]) -> None:
    (text,) = warnings_of(loss(before, after), FALLING)
    for word in words:
        assert word in text


@pytest.mark.parametrize(("before", "after"), [(3.0, 2.0), (math.inf, 2.0), (2.0, 1.9998)])
def test_a_loss_that_fell_is_no_warning(before: float, after: float) -> None:
    assert warnings_of(loss(before, after), FALLING) == []


def test_other_evaluations_are_judged_by_their_own_direction() -> None:
    good = {"exact": ("share", "higher", 0.1, 0.4), "rate": ("bits/byte", "lower", 2.0, 1.0)}
    assert warnings_of(metrics(**good, size=("MiB", "", 1.0, 9.0)), FALLING) == []
    bad = {"exact": ("share", "higher", 0.4, 0.1), "rate": ("bits/byte", "lower", 1.0, math.nan)}
    exact, rate = warnings_of(metrics(**bad), FALLING)
    assert "exact worse, higher being better: from 40.0% to 10.0%" in exact
    assert "rate worse" in rate


def test_training_alone_tells_when_nothing_is_measured() -> None:
    nothing: dict[str, Any] = {"evaluations": {}}
    assert warnings_of(nothing, FALLING) == []
    rising = [(step, 2.0 + step) for step in range(10)]
    assert "diverged: its loss went from 2 to 10.5" in warnings_of(nothing, rising)[0]
    assert "changed nothing" in training_warnings([(step, 2.0) for step in range(9)])[0]
    assert training_warnings([(1, 2.0), (2, 9.0)]) == []  # too few to tell
    assert "diverged" in training_warnings([(1, 2.0), (2, math.nan), (3, math.nan)])[0]


class Ruined:
    """A run with a learning rate that no model survives, and what is told of it."""

    def __init__(self, output: Path) -> None:
        screen, events = io.StringIO(), []
        console = Console(file=screen, width=120)
        spec = qa.Spec(
            model=str(small_model()),
            data={"path": few_rows()},
            backend="none",
            train={"max_steps": 4, "learning_rate": 1e6, "per_device_train_batch_size": 2},
            evaluate={"max_examples": 4, "samples": 0, "unquantized": False},
            output=str(output),
        )
        with RunDisplay(console) as display:
            result = qa.run(
                spec, listener=lambda event, data: (events.append(event), display(event, data))
            )
        show_result(console, result.folder, result.metrics)
        self.events, self.text = events, screen.getvalue()
        self.metrics = json.loads((output / "metrics.json").read_text())
        self.page = (output / "report.html").read_text()


@pytest.fixture(scope="module")
def ruined(tmp_path_factory: pytest.TempPathFactory) -> Ruined:
    return Ruined(tmp_path_factory.mktemp("ruined") / "run")


def test_a_ruined_model_is_told_in_terminal_summary_and_report(ruined: Ruined) -> None:
    values = ruined.metrics["evaluations"]["perplexity"]["loss"]["values"]
    assert values["tuned"] > values["quantized"] + 1
    (text,) = ruined.metrics["warnings"]
    assert f"from {values['quantized']:.4g} to {values['tuned']:.4g} nats per token" in text
    assert ruined.events.count("warning") == 1
    assert ruined.text.count(f"warning: {text}") == 2  # when it is known, and at the end
    assert "training made the model worse" in ruined.page.replace("Training", "training")


def test_no_gain_is_claimed_for_a_ruined_model(ruined: Ruined) -> None:
    assert ruined.metrics["exports"]["merged-dense"]["state"] == "written"
    assert "gain_kept" not in ruined.metrics["exports"]["merged-dense"]["figures"]
    assert "of the gain" not in ruined.text
    assert "gain kept" not in ruined.page
