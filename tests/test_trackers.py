"""Trackers get what the run itself notes, nothing secret, and cost no run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import quantadapt as qa
from quantadapt.dependencies import TRACKERS
from quantadapt.errors import PlanRefused, TrainingError
from quantadapt.planning import plan
from quantadapt.spec import Spec, TrainSpec
from quantadapt.testing.small_demo import small_model
from quantadapt.training import train

SECRET = "hf_" + "s3cr3t" * 6


def adapted() -> Any:
    return qa.attach(qa.quantize(str(small_model()), backend="none"), "lora", r=2)


def test_the_table_is_that_of_transformers() -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(TRACKERS) == set(INTEGRATION_TO_CALLBACK)


def test_a_plan_refuses_those_that_are_not_there_all_at_once(monkeypatch) -> None:
    monkeypatch.setitem(TRACKERS, "neptune", ("no_such_module",))
    names = ["wandbb", "neptune", "tensorboard", "trackio", "none"]
    with pytest.raises(PlanRefused) as refused:
        plan(Spec(train={"report_to": names, "optim": "adamw_torch"}), check_output=False)
    unknown, missing = refused.value.problems
    assert unknown.fix == "did you mean 'wandb'?"
    assert (missing.where, missing.what) == ("train.report_to", "neptune is not installed")
    assert "pip install neptune" in missing.fix
    model = adapted()
    with pytest.raises(PlanRefused, match="did you mean 'wandb'"):
        qa.train(model, max_steps=1, report_to=["wandbb"])


# What they are told -------------------------------------------------------------------------------

STEPS = 6
RUN = f"""
import os, socket, sys
import quantadapt as qa

asked = []
connect = socket.socket.connect
def watched(self, address):
    asked.append(address)
    return connect(self, address)
socket.socket.connect = watched
qa.run(qa.Spec(
    backend="none", adapter={{"name": "lora", "r": 2}}, output="out", export={{"merge": "never"}},
    train={{"max_steps": {STEPS}, "logging_steps": 2, "eval_steps": 3, "learning_rate": 1e-3,
           "per_device_train_batch_size": 1, "report_to": sys.argv[1].split(",")}},
    data={{"max_length": 64, "max_examples": 8}},
    evaluate={{"max_examples": 2, "samples": 0, "unquantized": False}},
))
here = ("127.0.0.1", "::1", "localhost")
print("outside:", [a for a in asked if isinstance(a, tuple) and a[0] not in here])
"""


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run with trackers, in a process of its own: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("tracked")
    environment = {
        **os.environ,
        "TRACKIO_DIR": str(folder / "trackio"),
        "HF_TOKEN": SECRET,
        "WANDB_API_KEY": SECRET,
    }
    command = [sys.executable, "-c", RUN, "tensorboard,trackio"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout + done.stderr


def logged(folder: Path) -> dict[str, dict[int, float]]:
    """What the run noted: name -> step -> value."""
    found: dict[str, dict[int, float]] = {}
    for line in (folder / "out" / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        for name in ("loss", "learning_rate", "grad_norm", "eval_loss"):
            if name in entry:
                found.setdefault(name, {})[entry["step"]] = entry[name]
    assert sorted(found["loss"]) == [1, 2, 4, 6]
    assert sorted(found["eval_loss"]) == [3, 6]
    return found


@pytest.mark.slow
def test_tensorboard_has_the_curves_of_the_run(tracked) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = tracked
    (events,) = (folder / "out" / "runs").glob("*/events*")
    read = EventAccumulator(str(events)).Reload()
    for name, values in logged(folder).items():
        tag = "eval/loss" if name == "eval_loss" else f"train/{name}"
        assert {e.step: e.value for e in read.Scalars(tag)} == pytest.approx(values, rel=1e-6)


@pytest.mark.slow
def test_trackio_has_them_under_the_name_of_the_run(tracked) -> None:
    import sqlite3

    folder, _ = tracked
    with sqlite3.connect(folder / "trackio" / "quantadapt.db") as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    assert {name.rpartition("-")[0].rpartition("-")[0] for name, *_ in rows} == {"out"}
    for name, values in logged(folder).items():
        tag = "eval/loss" if name == "eval_loss" else f"train/{name}"
        read = {
            entry["train/global_step"]: entry[tag]
            for entry in (json.loads(text) for *_, text in rows)
            if tag in entry
        }
        assert read == pytest.approx(values, rel=1e-6)


@pytest.mark.slow
def test_no_tracker_is_told_a_token_or_asks_another_machine(tracked) -> None:
    folder, printed = tracked
    assert "outside: []" in printed
    assert SECRET not in printed
    for file in folder.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file


# Those that fail ----------------------------------------------------------------------------------


def failing(event: str) -> type[Any]:
    from transformers import TrainerCallback

    def fail(self, *_: Any, **__: Any) -> None:
        self.calls = getattr(self, "calls", 0) + 1
        assert self.calls == 1, "called again after it failed"
        raise ConnectionError("the server\n has gone away")

    return type("Failing", (TrainerCallback,), {event: fail})


@pytest.mark.parametrize("event", ["on_log", "on_step_end", "on_train_end"])
def test_a_tracker_that_fails_costs_no_training(
    event, monkeypatch, tokenizer, random_data, tmp_path
):
    from transformers.integrations import integration_utils

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", failing(event))
    monkeypatch.setitem(TRACKERS, "wandb", ("json",))
    notes: list[str] = []
    spec = TrainSpec(max_steps=3, logging_steps=1, report_to=["wandb"])
    model = adapted()
    done = train(model, tokenizer, random_data, spec, output=tmp_path, seed=0, on_note=notes.append)
    assert done.steps == 3
    told = [note for note in notes if "wandb" in note]
    assert len(told) == 1
    assert "ConnectionError: the server has gone away" in told[0]


def test_one_that_cannot_begin_is_told_before_the_first_step(
    monkeypatch, tokenizer, random_data, tmp_path
):
    from transformers.integrations import integration_utils

    kind = failing("on_train_begin")
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", kind)
    monkeypatch.setitem(TRACKERS, "wandb", ("json",))
    model = adapted()
    logs: list[Any] = []
    with pytest.raises(TrainingError, match="wandb cannot begin: ConnectionError") as told:
        train(
            model, tokenizer, random_data, TrainSpec(max_steps=3, report_to=["wandb"]),
            output=tmp_path, seed=0, on_log=logs.append,
        )  # fmt: skip
    assert told.value.problems[0].where == "train.report_to"
    assert not logs
