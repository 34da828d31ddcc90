"""Comparisons: the grid, who is run and when, what is left out, and what the table says."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantadapt.comparing import halving, processes
from quantadapt.comparing.axes import lists_in
from quantadapt.comparing.folder import Journal, Record
from quantadapt.comparing.grid import Cell, Comparison, Options, comparison
from quantadapt.comparing.page import Shown, render, yaml_of
from quantadapt.comparing.plots import sweeps
from quantadapt.comparing.processes import Ending, Job, Processes, slots, start_process
from quantadapt.comparing.results import Quality, Row, Stat, Table, gain_kept, table_of
from quantadapt.comparing.stage import ComparisonResult, look_at, run_comparison
from quantadapt.comparing.verdict import Noise, front, noise_of, student, verdict
from quantadapt.errors import (
    FolderInUse,
    Interrupted,
    PlanRefused,
    QuantadaptError,
    SpecError,
)
from quantadapt.folders.lock import take
from quantadapt.inputs.plain_yaml import parse, to_yaml
from quantadapt.machine import Machine
from quantadapt.planning.reusing import settings_of
from quantadapt.planning.stage import plan
from quantadapt.reporting.scatter import Axis, Point, drawing
from quantadapt.reporting.svg import WIDE
from quantadapt.reporting.words import TIMES, short
from quantadapt.showing.comparing import CompareDisplay
from quantadapt.showing.screen import Screen
from quantadapt.spec import Spec

RUN = Path(__file__).with_name("pretended_run.py")
STEPS = {"train": {"max_steps": 90, "learning_rate": 3e-4}}
PAIRS = {"backend": ["hqq", "bnb-nf4"], "adapter": ["lora", "dora"]}


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch) -> None:
    monkeypatch.setattr(processes, "POLL", 0.01)


# The grid -----------------------------------------------------------------------------------------


def test_a_grid_comes_to_a_run_for_each_cell_and_seed_and_a_dense_reference() -> None:
    made = comparison(STEPS, {**PAIRS, "train.learning_rate": [1e-4, 3e-4]}, seeds=2)
    labels = [cell.label for cell in made.cells]
    assert labels[:3] == [
        "none x lora, learning_rate=0.0001",
        "none x lora, learning_rate=0.0003",
        "hqq x lora, learning_rate=0.0001",
    ]
    assert len(labels) == 2 + 2 * 2 * 2 == len(set(labels))
    assert len(made.runs) == 2 * len(labels) == len({run.name for run in made.runs})
    assert [cell.reference for cell in made.cells] == [True] * 2 + [False] * 8
    last = made.runs[-1]
    assert last.name == "bnb-nf4-dora-learning_rate-0.0003-seed1"
    assert (last.spec.backend.name, last.spec.adapter.name) == ("bnb-nf4", "dora")
    assert (last.spec.train.learning_rate, last.spec.train.max_steps, last.spec.seed) == (
        3e-4,
        90,
        1,
    )


def test_all_seeds_are_measured_on_the_same_held_out_examples() -> None:
    made = comparison({"seed": 5}, PAIRS, seeds=3)
    assert {(run.spec.seed, run.spec.data.split_seed) for run in made.runs} == {
        (5, 5),
        (6, 5),
        (7, 5),
    }
    made = comparison({"data": {"split_seed": 9}}, {**PAIRS, "seed": [3, 4]})
    assert {run.spec.data.split_seed for run in made.runs} == {9}


def test_options_are_said_with_a_name_by_all_or_by_an_axis() -> None:
    common = {"backend": {"name": "hqq", "bits": 3}}
    grid = {"backend": ["hqq", {"name": "hqq", "bits": 2}, "bnb-nf4"], "adapter.r": [8, 16]}
    made = comparison(common, grid, reference=False)
    found = {run.cell.label: run.spec for run in made.runs}
    assert found["hqq x lora(r=8)"].backend.options == {"bits": 3}
    assert found["hqq(bits=2) x lora(r=16)"].backend.options == {"bits": 2}
    assert found["hqq(bits=2) x lora(r=16)"].adapter.options == {"r": 16}
    assert found["bnb-nf4 x lora(r=8)"].backend.options == {}


def test_a_dense_backend_in_the_grid_is_the_reference_itself() -> None:
    made = comparison({}, {"backend": ["hqq", "none"]})
    assert [(c.label, c.reference) for c in made.cells] == [
        ("none x lora", False),
        ("hqq x lora", False),
    ]


def test_names_of_folders_hold_nothing_but_letters(tmp_path) -> None:
    odd = ["../../x", "a/b", "é" * 300, "  "]
    made = comparison({}, {"skip_modules": [[text] for text in odd]}, reference=False)
    names = [run.name for run in made.runs]
    assert len({name.lower() for name in names}) == len(odd)
    for name in names:
        assert Path(name).name == name
        assert len(name) < 120
        assert name.isascii()
        assert not name.startswith((".", "-"))


def test_lists_are_axes_unless_the_key_takes_lists() -> None:
    given = ["adapter.target_modules=[q_proj, v_proj]", "adapter.r=[8, 16]", "train.max_steps=3",
             "skip_modules=[[a], [b]]", "train.learning_rate=[1e-4, 3e-4]"]  # fmt: skip
    axes, others = lists_in(given)
    assert axes == {
        "adapter.r": [8, 16],
        "skip_modules": [["a"], ["b"]],
        "train.learning_rate": [1e-4, 3e-4],
    }
    assert others == [given[0], given[2]]


@pytest.mark.parametrize(
    ("grid", "options", "where", "what"),
    [
        ({}, {}, "grid", "nothing to compare"),
        ({"backend": "hqq"}, {}, "grid.backend", "is no list"),
        ({"backend": []}, {}, "grid.backend", "empty"),
        (["hqq"], {}, "grid", "no mapping"),
        ({"backend": ["hqq", "hqq"]}, {}, "grid.backend", "twice"),
        ({"backend": ["hqq", 3]}, {}, "grid.backend", "names no backend"),
        ({"backend": ["hqq", "hqx"]}, {}, "backend", "no backend is called 'hqx'"),
        ({"adapter": ["lora", "dorra"]}, {}, "adapter", "no adapter is called 'dorra'"),
        ({"train.lr": [1e-4, 2e-4]}, {}, "train.lr", "unknown key"),
        ({"trian.max_steps": [1, 2]}, {}, "grid.trian.max_steps", "unknown key"),
        ({"model": ["a", "b"]}, {}, "grid.model", "the same in all runs"),
        ({"data.max_length": [8, 16]}, {}, "grid.data.max_length", "the same in all runs"),
        ({"train.learning_rate": [1e-4, "fast"]}, {}, "train.learning_rate", "'fast'"),
        ({"train.learning_rate": [1e-4, True]}, {}, "train.learning_rate", "True"),
        ({"seed": [0, 1]}, {"seeds": 2}, "seeds", "seeds already"),
        ({"seed": [0, "x"]}, {}, "seed", "'x'"),
        (PAIRS, {"seeds": 0}, "seeds", "0"),
        (PAIRS, {"seeds": "two"}, "seeds", "two"),
        (PAIRS, {"budget": -1}, "compare.budget", "-1"),
        (PAIRS, {"within": 2}, "compare.within", "2"),
        (PAIRS, {"prefer": "beauty"}, "compare.prefer", "beauty"),
        (PAIRS, {"bugdet": 2}, "compare.bugdet", "unknown key"),
        ({"train.max_steps": list(range(1, 20_000))}, {}, "grid", "19999 runs"),
    ],
)
def test_mistakes_are_told_before_anything_is_run(grid, options, where, what) -> None:
    with pytest.raises((SpecError, PlanRefused)) as caught:
        comparison({}, grid, **options)
    assert [p for p in caught.value.problems if p.where == where and what in p.what]


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        comparison({}, {"backend": [], "model": ["a"], "train.lr": 3}, budget=0, seeds=-1)
    assert len(caught.value.problems) == 5


def test_a_budget_needs_a_number_of_steps(tmp_path) -> None:
    made = comparison({"model": "org/name", "data": {"path": "x/y"}}, PAIRS, budget=1)
    with pytest.raises(SpecError, match="max_steps"):
        look_at(made, tmp_path / "out")
    made = comparison(STEPS, {**PAIRS, "train.max_steps": [10, 20]}, budget=1)
    with pytest.raises(SpecError, match="max_steps"):
        look_at(made, tmp_path / "out")


def test_what_quality_is_judged_by_has_to_be_measured(tmp_path) -> None:
    with pytest.raises(SpecError, match="no evaluation of these runs has 'mmlu'"):
        look_at(comparison(STEPS, PAIRS, by="mmlu"), tmp_path / "out")
    look_at(comparison(STEPS, PAIRS, by="perplexity loss"), tmp_path / "out")


def test_cells_that_are_refused_are_told_with_why_and_the_others_are_run(tmp_path) -> None:
    made = comparison(STEPS, {**PAIRS, "backend.bits": [4]})
    cells = {each.cell.label: each for each in look_at(made, tmp_path / "out")}
    assert "has no option 'bits'" in cells["bnb-nf4(bits=4) x lora"].reason
    assert not cells["hqq(bits=4) x dora"].refusals
    assert not cells["none x lora"].refusals
    assert not (tmp_path / "out").exists()


def test_a_cell_is_refused_for_what_is_wrong_with_it_and_not_with_a_merge(tmp_path) -> None:
    """The dense base has no scales to dither onto, and is merged in another way."""
    (cell,) = [c for c in look_at(comparison(STEPS, PAIRS), tmp_path / "out") if c.cell.reference]
    assert cell.plan.merge == "requantize"
    with pytest.raises(PlanRefused) as caught:
        look_at(comparison({**STEPS, "model": "nowhere/at/all"}, PAIRS), tmp_path / "out")
    assert [problem.where for problem in caught.value.problems] == ["model"]


def test_a_grid_of_which_nothing_can_be_run_is_refused_with_all_reasons(tmp_path) -> None:
    made = comparison(
        STEPS, {"backend": ["bnb-nf4"], "adapter": ["lora", "dora"], "backend.bits": [4]}
    )
    with pytest.raises(PlanRefused) as caught:
        look_at(made, tmp_path / "out")
    assert len(caught.value.problems) == 1


# Runs ---------------------------------------------------------------------------------------------


def pretending(job: Job, environment: Mapping[str, str]) -> Any:
    assert list(job.command[1:4]) == ["-m", "quantadapt", "run"]
    made = plan(Spec.load(job.command[4]), check_output=False)
    environment = {**environment, "MADE_FROM": json.dumps(settings_of(made))}
    return start_process(
        replace(job, command=[sys.executable, "-S", "-E", str(RUN), *job.command[4:]]), environment
    )


def go(made: Comparison, out: Path, listener: Any = None, **options: Any) -> ComparisonResult:
    tell = listener if listener is not None else (lambda event, facts: None)
    return run_comparison(made, out, listener=tell, start=pretending, **options)


def states(out: Path) -> dict[str, str]:
    runs = json.loads((out / "compare.json").read_text())["runs"]
    return {name: run["state"] for name, run in runs.items()}


def legs(out: Path) -> dict[str, list[list[int]]]:
    return {
        file.parent.name: [json.loads(line) for line in file.read_text().splitlines()]
        for file in (out / "runs").glob("*/log.txt")
    }


class Events(list):
    def __call__(self, event: str, facts: Mapping[str, Any]) -> None:
        self.append((event, dict(facts)))

    def started(self) -> list[str]:
        return [facts["job"].name for event, facts in self if event == "start"]


def test_the_table_has_what_each_run_was_measured_to_be(tmp_path) -> None:
    result = go(comparison(STEPS, PAIRS, seeds=2), tmp_path / "out")
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    rows = {row["label"]: row for row in found["rows"]}
    assert next(iter(rows)) == "base, not quantized"
    assert len(rows) == 6
    base, tuned = rows["base, not quantized"], rows["hqq x lora"]
    assert base["before"]["perplexity"]["mean"] == pytest.approx(math.exp(3))
    losses = [1 + 0.05 + 10 / 90 + 0.001 * seed for seed in (0, 1)]
    assert tuned["after"]["perplexity"]["values"] == pytest.approx([math.exp(x) for x in losses])
    assert tuned["numbers"]["gain_kept"]["mean"] == pytest.approx(0.9)
    assert tuned["numbers"]["size_mib"]["mean"] == 4.5
    assert tuned["steps"] == 90
    assert found["state"] == "finished"
    assert found["recommended"] == result.verdict.row.label
    lines = list(csv.DictReader((tmp_path / "out" / "compare.csv").open()))
    assert float(lines[1]["perplexity after"]) == pytest.approx(
        rows[lines[1]["cell"]]["after"]["perplexity"]["mean"]
    )
    assert (tmp_path / "out" / "compare.html").read_text().startswith("<!doctype html>")


def test_a_failure_costs_its_row_alone_and_is_kept_with_its_reason(tmp_path) -> None:
    out = tmp_path / "out"
    made = comparison(STEPS, {"adapter.r": [8, 13, 66, 77]}, reference=False)
    result = go(made, out)
    rows = {row.label: row for row in result.table.rows}
    assert rows["hqq x lora(r=8)"].state == "finished"
    assert rows["hqq x lora(r=13)"].reason == "it cannot be done; leave it out"
    assert "SIGKILL" in rows["hqq x lora(r=66)"].reason
    assert rows["hqq x lora(r=77)"].reason == "it ended with exit code 3: last words"
    assert {rows[f"hqq x lora(r={r})"].state for r in (13, 66, 77)} == {"failed"}
    page = (out / "compare.html").read_text()
    assert "it cannot be done" in page
    assert "SIGKILL" in page

    again = Events()
    go(made, out, again)
    assert again.started() == []
    go(made, out, again, retry=True)
    assert len(again.started()) == 3


def test_a_cell_of_which_one_seed_failed_is_judged_by_the_others_and_says_so() -> None:
    made = comparison(STEPS, {"adapter": ["lora", "dora"]}, seeds=3, reference=False)
    journal = Journal(version="1", started="2026-11-29T16:00")
    for run in made.runs:
        figure = {"unit": "", "better": "lower", "values": {"tuned": 2.0 + run.seed}}
        result = {"steps": 90, "evaluations": {"perplexity": {"perplexity": figure}}}
        journal.runs[run.name] = Record(state="finished", results={"all": result})
    journal.runs["hqq-lora-seed2"] = Record(state="failed", reason="out of memory")
    rows = {row.label: row for row in table_of(made, journal).judged()}
    assert rows["hqq x lora"].after["perplexity"].values == (2.0, 3.0)
    assert rows["hqq x lora"].warnings == ["1 of 3 runs failed: out of memory"]
    assert rows["hqq x dora"].warnings == []


def test_a_figure_that_one_seed_lacks_is_told() -> None:
    """The mean of the others stood there as if it were of all."""
    made = comparison(STEPS, {}, seeds=3, reference=False)
    journal = Journal(version="1", started="2026-11-29T16:00")
    for run in made.runs:
        tuned = None if run.seed == 1 else 2.0 + run.seed  # as metrics.json has infinity
        figure = {"unit": "", "better": "lower", "values": {"quantized": 5.0, "tuned": tuned}}
        result = {"steps": 90, "evaluations": {"perplexity": {"perplexity": figure}}}
        journal.runs[run.name] = Record(state="finished", results={"all": result})
    table = table_of(made, journal)
    (row,) = table.judged()
    assert row.after["perplexity"].values == (2.0, 4.0)
    assert row.warnings == ["perplexity was not measured in 1 of 3 runs"]
    assert "not measured in 1 of 3 runs" in verdict(table, made.options).words


def test_the_base_is_measured_once(tmp_path) -> None:
    def wanting(name: str) -> list[str]:
        specs = (tmp_path / name / "specs").glob("*.yaml")
        return [s.stem for s in specs if parse(s.read_text())["evaluate"]["unquantized"]]

    go(comparison(STEPS, PAIRS, reference=False), tmp_path / "alone")
    assert wanting("alone") == ["hqq-lora-seed0"]
    go(comparison(STEPS, PAIRS), tmp_path / "with")
    assert wanting("with") == []


@pytest.mark.parametrize(("wrong", "at_once"), [((13,), 1), ((66, 13), 1), ((13,), 2)])
def test_where_who_measures_the_base_fails_another_measures_it(wrong, at_once, tmp_path) -> None:
    """In words or killed; with two at once, the second has begun without."""
    out, seen = tmp_path / "out", Events()
    grid = {"adapter.r": [*wrong, 8, 16, 32]}
    made = comparison(STEPS, grid, reference=False, at_once=at_once)
    result = go(made, out, seen)
    first = result.table.rows[0]
    assert first.label == "base, not quantized"
    assert first.before["perplexity"].mean == pytest.approx(math.exp(3))
    names = [f"hqq-lora-r-{r}-seed0" for r in (*wrong, 8, 16, 32)]
    said = "failed before it had measured the base, not quantized;"
    notes = [f["text"] for event, f in seen if event == "note" and said in f["text"]]
    if at_once == 1:
        pairs = itertools.pairwise(names[: len(wrong) + 1])
        assert notes == [f"{one} {said} {other} measures it" for one, other in pairs]
    else:
        assert len(notes) == 1
    again = Events()
    found = go(made, out, again)
    assert again.started() == []
    assert [row.label for row in found.table.rows] == [row.label for row in result.table.rows]


def test_where_a_dense_reference_fails_another_run_measures_the_base(tmp_path) -> None:
    out = tmp_path / "out"
    grid = {"backend": ["none", "hqq"], "adapter.r": [13, 8]}
    result = go(comparison(STEPS, grid, reference=False), out)
    assert result.table.rows[0].label == "base, not quantized"  # the other one begins with it
    both = {"backend": ["none", "hqq", "bnb-nf4"], "adapter.r": [13]}
    assert all(row.state == "failed" for row in go(
        comparison(STEPS, both, reference=False), tmp_path / "all").table.rows)  # fmt: skip


def test_what_was_interrupted_goes_on_and_what_has_ended_is_not_run_again(tmp_path) -> None:
    out, made = tmp_path / "out", comparison(STEPS, {"adapter.r": [8, 99, 16]}, reference=False)

    def ctrl_c(event: str, facts: Mapping[str, Any]) -> None:
        if event == "progress" and facts.get("step") == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(made, out, ctrl_c)
    assert list(states(out).values()) == ["finished", "interrupted", "waiting"]
    assert json.loads((out / "compare.json").read_text())["state"] == "interrupted"
    again = Events()
    result = go(made, out, again)
    assert again.started() == ["hqq-lora-r-99-seed0", "hqq-lora-r-16-seed0"]
    assert legs(out)["hqq-lora-r-99-seed0"] == [[0, 7], [7, 90]]
    assert {row.state for row in result.table.rows if row.cell} == {"finished"}


def test_a_signal_ends_it_with_its_code_and_tells_the_runs(tmp_path) -> None:
    def told(event: str, facts: Mapping[str, Any]) -> None:
        if event == "progress" and facts.get("step") == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="SIGTERM") as caught:
        go(comparison(STEPS, {"adapter.r": [99, 8]}, reference=False), tmp_path / "out", told)
    assert caught.value.exit_code == 143
    assert list(states(tmp_path / "out").values()) == ["interrupted", "waiting"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


KILLED = """
import sys
from pathlib import Path
from quantadapt.comparing.processes import Job, Processes
folder = Path(sys.argv[1])
sleeper = "import os,sys,time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
job = Job("a", [sys.executable, "-c", sleeper, str(folder / "pid")], folder, folder / "log")
Processes([{}], lambda *_: None, lambda *_: None).run([job])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the children")
def test_a_killed_comparison_leaves_no_run_behind(tmp_path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)])
    file = tmp_path / "pid"
    while not (file.exists() and file.read_text()):
        assert parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    for _ in range(400):
        if not Path(f"/proc/{file.read_text()}").exists():
            return
        time.sleep(0.05)
    pytest.fail("the run goes on")


def test_a_run_that_was_cut_off_is_taken_up(tmp_path) -> None:
    """As after a kill of all: the journal says that it runs."""
    out, made = tmp_path / "out", comparison(STEPS, {"adapter.r": [8, 16]}, reference=False)
    go(made, out)
    journal = json.loads((out / "quantadapt-compare.json").read_text())
    journal["runs"]["hqq-lora-r-8-seed0"] |= {"state": "running", "results": {}}
    (out / "quantadapt-compare.json").write_text(json.dumps(journal))
    again = Events()
    go(made, out, again)
    assert again.started() == ["hqq-lora-r-8-seed0"]


def test_runs_share_the_slots(tmp_path) -> None:
    """Each gets the environment of its own, and no more run at a time than there are slots."""
    seen: list[str] = []

    def start(job: Job, environment: Mapping[str, str]) -> Any:
        seen.append(environment["CUDA_VISIBLE_DEVICES"])
        return start_process(job, environment)

    code = "import time; time.sleep(0.3)"
    jobs = [Job(str(i), [sys.executable, "-c", code], tmp_path, tmp_path / "log") for i in range(5)]
    places = [{"CUDA_VISIBLE_DEVICES": "2"}, {"CUDA_VISIBLE_DEVICES": "5"}]
    ended: list[str] = []
    work = Processes(places, lambda *_: None, lambda job, end: ended.append(end.state), start=start)
    work.run(jobs)
    assert seen[:2] == ["2", "5"]
    assert len(seen) == 5
    assert set(seen) == {"2", "5"}
    assert ended == ["finished"] * 5


def test_each_gpu_is_a_slot(monkeypatch) -> None:
    two = Machine(cuda=((9, 0), (9, 0)))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert slots("auto", two) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    assert slots("auto", two, gpus=1) == [{"CUDA_VISIBLE_DEVICES": "0"}]
    assert slots("cuda:1", two) == slots("cpu", two) == slots("auto", Machine()) == [{}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-abc")
    assert slots("cuda", two) == [
        {"CUDA_VISIBLE_DEVICES": "3"},
        {"CUDA_VISIBLE_DEVICES": "GPU-abc"},
    ]


def test_runs_that_share_a_gpu_share_the_cores_too(monkeypatch) -> None:
    """Unless the user has shared the cores."""
    two = Machine(cuda=((9, 0), (9, 0)))
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 128)  # of which a container may use a part
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert slots("auto", two, at_once=2) == [
        {"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": "4"} for gpu in "0101"
    ]
    assert slots("cpu", two, at_once=40) == [{"OMP_NUM_THREADS": "1"}] * 40
    assert slots("cpu", two) == [{}]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert slots("cpu", two, at_once=2) == [{}, {}]


def test_runs_at_once_are_told_in_the_table(tmp_path) -> None:
    made = comparison(STEPS, {"adapter": ["lora", "dora", "vera"]}, reference=False, at_once=2)
    events = Events()
    found = go(made, tmp_path / "out", events)
    assert [facts["slots"] for event, facts in events if event == "batch"] == [2]
    assert [event for event, _ in events if event in ("start", "ended")][:2] == ["start"] * 2
    assert set(states(tmp_path / "out").values()) == {"finished"}
    remarks = [text for text in found.table.remarks if text.startswith("up to 2 runs at a time")]
    assert len(remarks) == 1
    assert remarks[0][1:] in " ".join((tmp_path / "out/compare.html").read_text().split())
    again = go(made, tmp_path / "out")  # nothing is left to do, and nothing is told twice
    assert again.table.remarks == found.table.remarks


def test_what_the_runs_on_a_gpu_want_together_is_known_before(tmp_path, monkeypatch) -> None:
    gpu = Machine(cuda=((9, 0),), memory=(80 * 2**30,), host=2**40)
    monkeypatch.setattr("quantadapt.comparing.stage.this_machine", lambda: gpu)
    cells = [SimpleNamespace(memory_gib=size, plan=None) for size in (30.0, 10.0, 25.0)]
    monkeypatch.setattr("quantadapt.comparing.stage.plan_cells", lambda *_: cells)
    grid = {"adapter": ["lora", "dora", "vera"]}
    for at_once in (1, 2, 3):
        look_at(comparison(STEPS, grid, reference=False, at_once=at_once), tmp_path / "out")
    # Each takes 0.6 GiB for CUDA, and 5% are lost between blocks.
    with pytest.raises(SpecError, match=r"91.4 GiB, the GPU has 80[\s\S]*use 2") as caught:
        look_at(comparison(STEPS, grid, reference=False, at_once=3, seeds=2), tmp_path / "out")
    cells[1:] = [SimpleNamespace(memory_gib=39.0, plan=None)] * 2
    with pytest.raises(SpecError, match=r"83.4 GiB, the GPU has 80[\s\S]*use 1"):
        look_at(comparison(STEPS, grid, reference=False, at_once=2), tmp_path / "out")
    assert caught.value.problems[0].where == "compare.at_once"


def test_merged_models_that_nobody_asked_for_are_removed(tmp_path) -> None:
    def leaving(job: Job, environment: Mapping[str, str]) -> Any:
        (job.folder / "merged").mkdir(parents=True)
        return pretending(job, environment)

    grid = {"adapter": ["lora", "dora"]}
    for name, options in (("removed", {}), ("kept", {"keep_merged": True})):
        made = comparison(STEPS, grid, reference=False, **options)
        run_comparison(made, tmp_path / name, listener=lambda *_: None, start=leaving)
    asked = comparison({**STEPS, "export": {"merge": "dense"}}, grid, reference=False)
    run_comparison(asked, tmp_path / "asked", listener=lambda *_: None, start=leaving)
    left = {
        name: len([*(tmp_path / name).glob("runs/*/merged")])
        for name in ("removed", "kept", "asked")
    }
    assert left == {"removed": 0, "kept": 2, "asked": 2}


# The folder ---------------------------------------------------------------------------------------


def test_another_comparison_is_refused_and_more_values_are_not(tmp_path) -> None:
    out = tmp_path / "out"
    go(comparison(STEPS, {"adapter": ["lora", "dora"]}, reference=False), out)
    cases = {
        "train.max_steps": (
            comparison({"train": {"max_steps": 30}}, {"adapter": ["lora", "dora"]}),
            "30",
        ),
        "grid.adapter": (comparison(STEPS, {"adapter": ["lora", "vera"]}), "dora"),
        "grid.train.warmup_ratio": (
            comparison(STEPS, {"adapter": ["lora", "dora"], "train.warmup_ratio": [0.1]}),
            "axis",
        ),
        "compare.budget": (comparison(STEPS, {"adapter": ["lora", "dora"]}, budget=1), "no budget"),
    }
    before = (out / "compare.json").read_bytes()
    for where, (other, what) in cases.items():
        with pytest.raises(PlanRefused) as caught:
            go(other, out)
        assert [p for p in caught.value.problems if p.where == where and what in p.what], where
    assert (out / "compare.json").read_bytes() == before
    again = Events()
    go(comparison(STEPS, {"adapter": ["lora", "dora", "vera"]}, reference=False), out, again)
    assert again.started() == ["hqq-vera-seed0"]
    go(comparison(STEPS, {"adapter": ["lora", "vera"]}), out, again, overwrite=True)
    assert len(again.started()) == 4


def test_only_comparisons_of_ours_are_replaced(tmp_path) -> None:
    made = comparison(STEPS, {"adapter": ["lora", "dora"]}, reference=False)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("years of work")
    with pytest.raises(PlanRefused, match="holds no comparison"):
        go(made, theirs, overwrite=True)
    with pytest.raises(PlanRefused, match="a file is in the way"):
        go(made, theirs / "thesis.tex")
    out = tmp_path / "out"
    go(made, out)
    (out / "runs" / "hqq-lora-seed0" / "notes.txt").write_text("mine")
    with pytest.raises(PlanRefused, match=r"notes\.txt"):
        go(made, out, overwrite=True)
    assert (out / "runs" / "hqq-lora-seed0" / "notes.txt").read_text() == "mine"


def test_one_writer(tmp_path) -> None:
    lock = take(tmp_path / "out")
    try:
        with pytest.raises(FolderInUse):
            go(comparison(STEPS, PAIRS), tmp_path / "out")
    finally:
        lock.release()


def test_a_damaged_journal_is_told(tmp_path) -> None:
    made = comparison(STEPS, {"adapter": ["lora", "dora"]}, reference=False)
    go(made, tmp_path / "out")
    (tmp_path / "out" / "quantadapt-compare.json").write_text('{"version": "0", "runs": [1]}')
    with pytest.raises(PlanRefused, match="cannot be used"):
        go(made, tmp_path / "out")


FIGURE = {"unit": "", "better": "lower", "values": {"tuned": 1.0}}


@pytest.mark.parametrize(
    ("key", "result"),
    [
        ("many", {}),
        ("all", {"evaluations": [1]}),
        ("all", {"evaluations": {"perplexity": [1]}}),
        ("all", {"evaluations": {"perplexity": {"perplexity": 3}}}),
        ("all", {"evaluations": {"p": {"p": {**FIGURE, "unit": [1]}}}}),
        ("all", {"evaluations": {"p": {"p": {**FIGURE, "values": {"tuned": "x"}}}}}),
        ("all", {"evaluations": {"p": {"p": {**FIGURE, "errors": 3}}}}),
        ("all", {"steps": "many"}),
        ("all", {"steps": math.inf}),
        ("2", {"data": 3}),
        ("2", {"warnings": {"a": 1}}),
    ],
)
def test_results_in_a_journal_that_are_none_are_told(key, result, tmp_path) -> None:
    made = comparison(STEPS, {"adapter": ["lora", "dora"]}, reference=False)
    go(made, tmp_path / "out")
    file = tmp_path / "out" / "quantadapt-compare.json"
    journal = json.loads(file.read_text())
    next(iter(journal["runs"].values()))["results"] = {key: result}
    file.write_text(json.dumps(journal))
    with pytest.raises(PlanRefused, match=r"cannot be used: runs"):
        go(made, tmp_path / "out")


@pytest.mark.parametrize("place", ["logs/{name}.txt", "runs/{name}", "specs", "compare.csv"])
def test_a_comparison_writes_through_no_link_that_leads_out(place, tmp_path) -> None:
    made = comparison(STEPS, {"adapter": ["lora", "dora"]}, reference=False)
    out, mine = tmp_path / "out", tmp_path / "mine"
    go(made, out)
    mine.mkdir()
    link = out / place.format(name=next(iter(made.runs)).name)
    shutil.rmtree(link) if link.is_dir() else link.unlink()
    link.symlink_to(mine)
    with pytest.raises(PlanRefused, match="a link that leads out of the folder"):
        go(made, out, retry=True)
    assert not list(mine.iterdir())


def test_trust_in_code_is_kept_nowhere(tmp_path) -> None:
    made = comparison(
        {**STEPS, "trust_remote_code": True}, {"adapter": ["lora", "dora"]}, reference=False
    )
    commands: list[Any] = []

    def start(job: Job, environment: Mapping[str, str]) -> Any:
        commands.append(job.command)
        trusting = [word for word in job.command if word != "--trust-remote-code"]
        return pretending(replace(job, command=trusting), environment)

    run_comparison(made, tmp_path / "out", listener=lambda *_: None, start=start, trusted=True)
    assert all("--trust-remote-code" in command for command in commands)
    for file in (tmp_path / "out").rglob("*"):
        if file.is_file() and file.suffix in (".json", ".yaml"):
            assert "trust_remote_code: true" not in file.read_text()
            assert '"trust_remote_code": true' not in file.read_text()


# Successive halving -------------------------------------------------------------------------------


def test_rungs_are_as_few_as_the_budget_allows() -> None:
    cost = halving.Cost(fixed=10, step=1)
    assert halving.choose(9, 90, cost, 1, budget=9 * 100) == [90]
    # 9 to 30 steps, then the best 3 from there to 90: 9 * 40 + 3 * 70
    assert halving.seconds(9, [30, 90], cost, 1) == 570
    assert halving.choose(9, 90, cost, 1, budget=899) == [30, 90]
    # 9 * 20 + 3 * 30 + 1 * 70
    assert halving.seconds(9, [10, 30, 90], cost, 1) == 340
    assert halving.choose(9, 90, cost, 1, budget=569) == [10, 30, 90]
    assert halving.choose(9, 90, cost, 2, budget=1000) == [10, 30, 90]
    assert halving.choose(9, 90, cost, 1, budget=1) == [10, 30, 90]
    # where starting costs more than training, further rungs make it dearer
    assert halving.choose(9, 90, halving.Cost(fixed=100, step=0.1), 1, budget=1) == [90]
    assert halving.most_rungs(2, 90) == 1
    assert halving.most_rungs(27, 90) == 4
    assert halving.most_rungs(27, 10) == 2


def test_the_best_third_goes_on_and_the_best_reference() -> None:
    badness = {"a": 3.0, "b": 1.0, "c": 2.0, "d": 4.0, "e": 5.0, "x": 9.0, "y": 8.0}
    assert halving.survivors(badness, ["x", "y"]) == ["b", "c", "y"]
    assert halving.survivors(badness, []) == ["b", "c", "a"]
    assert halving.survivors(badness, [], most=1) == ["b"]
    assert halving.survivors({"a": 1.0}, ["a"]) == ["a"]


RATES = [1e-4, 2e-4, 3e-4, 4e-4, 5e-4, 6e-4, 7e-4, 8e-4, 9e-4]


def test_halving_keeps_the_best_and_never_trains_again_from_the_start(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(halving, "choose", lambda *_: [10, 30, 90])
    out = tmp_path / "out"
    made = comparison(
        {"train": {"max_steps": 90}}, {"train.learning_rate": RATES}, budget=1, reference=False
    )
    told = Events()
    result = go(made, out, told)
    whole = [row.label for row in result.table.judged()]
    assert whole == ["hqq x lora, learning_rate=0.0003"] == [result.verdict.row.label]
    found = legs(out)
    assert found["hqq-lora-learning_rate-0.0003-seed0"] == [[0, 10], [10, 30], [30, 90]]
    ends = sorted(runs[-1][1] for runs in found.values())
    assert ends == [10] * 6 + [30] * 2 + [90]
    rows = {row.label: row for row in result.table.rows}
    assert rows["hqq x lora, learning_rate=0.0009"].state == "dropped"
    assert rows["hqq x lora, learning_rate=0.0009"].steps == 10
    dropped = [facts for event, facts in told if event == "dropped"]
    assert [len(facts["dropped"]) for facts in dropped] == [6, 2]
    assert all("perplexity" in words for facts in dropped for words in facts["dropped"].values())
    page = (out / "compare.html").read_text()
    assert "Successive halving" in page
    assert "dropped after 10 steps" in page
    again = Events()
    go(made, out, again)
    assert again.started() == []


@pytest.mark.slow
def test_halving_goes_on_where_it_was_interrupted(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(halving, "choose", lambda *_: [10, 30, 90])
    made = comparison(
        {"train": {"max_steps": 90}}, {"train.learning_rate": RATES}, budget=1, reference=False
    )
    straight = go(made, tmp_path / "straight")

    def ctrl_c(event: str, facts: Mapping[str, Any]) -> None:
        if event == "ended" and facts["job"].steps == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(made, tmp_path / "out", ctrl_c)
    monkeypatch.setattr(halving, "choose", lambda *_: pytest.fail("decided already"))
    result = go(made, tmp_path / "out")
    assert legs(tmp_path / "out") == legs(tmp_path / "straight")
    assert result.verdict.row.label == straight.verdict.row.label


def test_a_budget_that_is_too_small_says_what_is_needed(tmp_path) -> None:
    made = comparison(STEPS, {"train.learning_rate": RATES}, budget=1e-4, reference=False)

    def slowly(job: Job, environment: Mapping[str, str]) -> Any:
        time.sleep(0.1)
        return pretending(job, environment)

    with pytest.raises(QuantadaptError, match=r"too small: 9 runs of 10 steps alone take about"):
        run_comparison(made, tmp_path / "out", listener=lambda *_: None, start=slowly)


def test_a_budget_that_ends_in_the_middle_ends_the_run_with_a_checkpoint(tmp_path) -> None:
    """And more hours go on from there."""
    out, grid = tmp_path / "out", {"adapter.r": [99, 8]}
    told = Events()
    made = comparison(STEPS, grid, budget=0.5 / 3600, reference=False)
    result = go(made, out, told)
    assert "spent" in next(facts["text"] for event, facts in told if event == "note")
    assert {row.reason for row in result.table.rows if row.cell} == {
        "the budget of 0.000138889 hours is spent"
    }
    assert "No run was trained whole" not in result.verdict.words
    assert json.loads((out / "compare.json").read_text())["state"] == "interrupted"
    assert 'class="state interrupted">interrupted<' in (out / "compare.html").read_text()
    result = go(comparison(STEPS, grid, budget=1, reference=False), out)
    assert {row.state for row in result.table.rows if row.cell} == {"finished"}
    assert json.loads((out / "compare.json").read_text())["state"] == "finished"


# What the table says ------------------------------------------------------------------------------

LOSS = Quality("perplexity", "", "lower")
SHARE = Quality("exact", "share", "higher")


def row(
    label: str, after: tuple[float, ...], size: float, quality: Quality = LOSS, **more: Any
) -> Row:
    numbers = {"size_mib": Stat((size,))}
    more.setdefault("cell", Cell(label, "", {}))
    return Row(label, state="finished", after={quality.name: Stat(after)}, numbers=numbers, **more)


def test_ticks_that_are_near_each_other_read_apart() -> None:
    def labels(words: Callable[[float], str], *values: float) -> list[str]:
        points = [Point(float(x), y, "") for x, y in enumerate(values, 1)]
        drawn = drawing("t", points, Axis("size", short), Axis("quality", words))
        found = re.findall(r'text-anchor="end" class="axis">([^<]+)<', drawn)
        return [label for label in found if not label.startswith("size")]

    assert labels(short, 1.326, 1.335) == ["1.326", "1.328", "1.33", "1.332", "1.334"]
    near = labels(lambda value: f"{100 * value:.3g}%", 0.99991, 0.99995)
    assert near[:2] == ["99.991%", "99.992%"]
    assert labels(short, 1.0, 2.0)[0] == "1.00"


@pytest.mark.parametrize("lines", [1, 6, 40])
def test_the_labels_of_lines_meet_neither_each_other_nor_a_line(lines: int) -> None:
    """One for each line, beside the plot: every point had its own, across the lines. Of too many
    the lowest have none."""
    draw = random.Random(0)
    points = [
        Point(rate, 3 + draw.random(), f"backend-{n} x {'lora' * (1 + n % 12)}", group=str(n))
        for n in range(lines)
        for rate in (1e-4, 2e-4, 4e-4)
    ]
    drawn = drawing("t", points, Axis("learning_rate", short), Axis("perplexity", short))
    found = re.findall(r'<text x="([\d.]+)" y="([\d.]+)"[^>]*class="label">([^<]+)<', drawn)
    labels = [(float(x), float(y), text) for x, y, text in found]
    assert len(labels) == len({text for *_, text in labels}) == min(lines, 21)
    path = " ".join(re.findall(r'<polyline points="([^"]+)"', drawn))
    ends = [tuple(map(float, place.split(","))) for place in path.split()]
    assert all(x > max(end for end, _ in ends) for x, *_ in labels)
    assert all(x + 6.9 * len(text) <= WIDE for x, _, text in labels)
    heights = sorted(y for _, y, _ in labels)
    assert all(low - high >= 16 - 1e-6 for high, low in itertools.pairwise(heights))
    assert all(26 <= y <= 400 for y in heights)


def test_a_line_is_called_by_what_its_points_have_in_common() -> None:
    settings = {"backend": "hqq", "adapter": "lora", "adapter.r": 8, "train.weight_decay": 0.1}
    rates = (1e-4, 3e-4)
    rows = [
        row(
            f"{rate}", (3 + rate,), 1.0, cell=Cell("", "", settings | {"train.learning_rate": rate})
        )
        for rate in rates
    ]
    table = SimpleNamespace(quality=LOSS, judged=lambda: rows)
    page = sweeps(table, {"train.learning_rate": rates, "seed": [0]})
    label = f"hqq {TIMES} lora(r=8), weight_decay=0.1"
    assert page.count(f'class="label">{label}<') == 1


def test_the_front_is_what_nothing_beats() -> None:
    draw = random.Random(1)
    rows = [
        row(str(i), (draw.choice([1, 2, 3, 4, 5]) + draw.random(),), draw.randint(1, 9))
        for i in range(60)
    ]

    def beaten(one: Row) -> bool:
        at = one.numbers["size_mib"].mean, one.after["perplexity"].mean
        others = [
            (o.numbers["size_mib"].mean, o.after["perplexity"].mean) for o in rows if o is not one
        ]
        return any(a <= at[0] and b <= at[1] and (a, b) != at for a, b in others)

    expected = {one.label for one in rows if not beaten(one)}
    assert {one.label for one in front(rows, LOSS, "size_mib")} == expected
    shares = [
        row(one.label, (-one.after["perplexity"].mean,), one.numbers["size_mib"].mean, SHARE)
        for one in rows
    ]
    assert {one.label for one in front(shares, SHARE, "size_mib")} == expected


def test_noise_is_pooled_over_cells() -> None:
    rows = [
        row("a", (0.50, 0.54), 1, SHARE),
        row("b", (0.60, 0.62, 0.64), 1, SHARE),
        row("c", (0.7,), 1, SHARE),
    ]
    noise = noise_of(rows, SHARE)
    # squared distances from the means: 2 * 0.02^2 and 2 * 0.02^2, over 1 + 2 degrees of freedom
    assert noise == Noise(pytest.approx(math.sqrt(0.0016 / 3)), 3)
    apart = noise.of(rows[0].after["exact"], rows[1].after["exact"])
    assert apart == pytest.approx(3.182 * math.sqrt(0.0016 / 3) * math.sqrt(1 / 2 + 1 / 3))
    assert noise_of(rows[2:], SHARE) is None


@pytest.mark.parametrize(
    ("freedom", "t"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (6, 2.447), (8, 2.306),
     (10, 2.228), (15, 2.131), (20, 2.086), (30, 2.042), (60, 2.000), (1000, 1.962)],
)  # fmt: skip
def test_students_t_is_that_of_the_tables(freedom, t) -> None:
    assert student(freedom) == pytest.approx(t, abs=0.01)


def judged(*rows: Row, quality: Quality = LOSS, **options: Any) -> Any:
    ranked = sorted(rows, key=lambda r: quality.sign * r.after[quality.name].mean)
    return verdict(Table(ranked, {quality.name: quality}), Options(**options))


def test_the_smallest_near_the_best_is_taken_and_the_words_say_why() -> None:
    rows = [row("big", (2.00,), 16), row("small", (2.019,), 4), row("tiny", (2.03,), 2)]
    found = judged(*rows)
    assert found.row.label == "small"
    assert (
        "the smallest of the 2 within 1% of the best; big has 2.000 and takes 16.0 MiB"
        in found.words
    )
    assert "--seeds 3" in found.words
    assert judged(*rows, within=0.02).row.label == "tiny"
    assert judged(*rows, within=0.0).row.label == "big"


def test_points_are_meant_where_figures_are_in_percent() -> None:
    rows = [
        row("best", (0.50,), 9, SHARE),
        row("near", (0.495,), 4, SHARE),
        row("far", (0.48,), 2, SHARE),
    ]
    found = judged(*rows, quality=SHARE)
    assert found.row.label == "near"
    assert "within 1 points" in found.words


def test_where_nothing_was_trained_whole_the_furthest_are_judged() -> None:
    rows = [row("a", (2.0,), 4), row("b", (3.0,), 4), row("c", (1.0,), 4)]
    for each, steps in zip(rows, (30, 30, 10), strict=True):
        each.state, each.steps = "dropped", steps
    found = verdict(Table(rows, {"perplexity": LOSS}), Options())
    assert found.row.label == "a"
    assert found.words.startswith("No run was trained whole; this is after 30 steps.")


def test_what_is_chance_is_told() -> None:
    close = [row("a", (2.00, 2.02), 9), row("b", (2.01, 2.03), 4), row("c", (2.005, 2.02), 5)]
    assert "All 3 differ by no more than chance" in judged(*close).words
    apart = [row("a", (2.000, 2.001), 9), row("b", (3.0, 3.001), 4), row("c", (4.0, 4.001), 4)]
    assert "better than all others by more than chance" in judged(*apart).words


def test_the_error_by_what_was_asked_is_told() -> None:
    """As lm-evaluation-harness gives it: 1.96 * sqrt(2) * 1.5 points."""
    best = row("a", (0.5,), 4, SHARE, errors={"exact": Stat((0.015,))})
    assert (
        "may be 4.2 points apart" in judged(best, row("b", (0.4,), 4, SHARE), quality=SHARE).words
    )


def test_the_dense_reference_is_compared_with() -> None:
    dense = row("none x lora", (1.98,), 16, reference=True)
    found = judged(dense, row("hqq x lora", (2.0,), 4))
    assert found.row.label == "hqq x lora"
    assert "none x lora, on the dense base, is 1% better." in found.words


def test_a_warning_of_what_is_taken_is_told() -> None:
    found = judged(row("a", (2.0,), 4, warnings=["training made it worse"]), row("b", (3.0,), 4))
    assert "Look at it first, though: training made it worse." in found.words


def test_nothing_is_recommended_where_nothing_was_measured() -> None:
    found = judged()
    assert found.row is None
    assert "nothing to recommend" in found.words


def test_gain_kept_is_in_nats_and_from_the_files() -> None:
    def kept(
        before: float | None, tuned: float, merged: float, unit: str = "nats per token"
    ) -> Any:
        values = {"quantized": before, "tuned": tuned, "merged": merged}
        return gain_kept({"perplexity": {"loss": {"unit": unit, "values": values}}})

    assert kept(3.0, 1.0, 1.5) == pytest.approx(0.75)
    assert kept(1.0, 1.2, 1.1) is None
    assert kept(None, 1.0, 1.1) is None
    assert kept(3, 1, 2, "bits") is None


# The page -----------------------------------------------------------------------------------------


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        self.loaded += [str(given[key]) for key in ("src", "action") if key in given]
        if tag == "link":
            self.loaded.append(str(given["href"]))
        assert not [key for key in given if key.startswith("on")]


EVIL = '"><script>alert(1)</script>\x1b]0;x\x07'


def evil_page() -> str:
    made = comparison(
        {"model": EVIL, "data": {"path": EVIL}, **STEPS},
        {"adapter": ["lora", "dora"], "skip_modules": [[EVIL], ["x"]]},
    )
    journal = Journal(version=EVIL, started="2026-11-29T16:00:00+00:00", state="finished")
    for index, run in enumerate(made.runs):
        figure = {
            "unit": EVIL,
            "better": "lower",
            "values": {"quantized": 3.0, "tuned": 1.5 + index},
        }
        result = {"steps": 9, "memory_gib": 1.0 + index, "base_mib": 4, "adapter_mib": 1 + index,
                  "evaluations": {EVIL: {EVIL: figure}}, "warnings": [EVIL]}  # fmt: skip
        journal.runs[run.name] = Record(state="finished", seconds=9, results={"all": result})
    journal.runs[made.runs[-1].name] = Record(state="failed", reason=EVIL)
    table = table_of(made, journal)
    return render(Shown(journal, made, table, verdict(table, made.options), EVIL))


def test_the_page_escapes_all_text_and_loads_nothing() -> None:
    page = evil_page()
    found = Tags()
    found.feed(page)
    assert "script" not in found.tags
    assert {"svg", "table", "polyline"} & set(found.tags)
    assert all(url.startswith("data:") for url in found.loaded)
    assert "\x1b" not in page
    assert "&lt;script&gt;" in page


def test_the_page_of_a_comparison_that_has_just_begun_is_whole() -> None:
    made, journal = comparison(STEPS, PAIRS), Journal(version="1", started="2026-11-29T16:00")
    table = table_of(made, journal)
    page = render(Shown(journal, made, table, verdict(table, made.options)))
    assert "Nothing to recommend yet" in page
    assert page.endswith("</html>\n")


def test_the_yaml_on_the_page_asks_for_the_same_comparison() -> None:
    made = comparison(STEPS, PAIRS, seeds=2, budget=3.0, prefer="memory")
    values = parse(to_yaml(yaml_of(made)))
    again = comparison(values, values.pop("grid"), **values.pop("compare"))
    assert again.to_dict() == made.to_dict()


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("chromium") or shutil.which("google-chrome")), reason="there is no browser"
)
def test_points_tell_of_themselves_and_nothing_sticks_out(tmp_path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    (tmp_path / "page.html").write_text(evil_page(), encoding="utf-8")
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        for width in (1100, 400):
            page = browser.new_page(viewport={"width": width, "height": 900})
            page.goto(f"file://{tmp_path / 'page.html'}")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            point = page.locator("svg:visible .point").first
            tip = point.locator(".tip")
            assert float(tip.evaluate("e => getComputedStyle(e).opacity")) == 0
            point.locator(".reach").hover(force=True)
            page.wait_for_function(
                "e => getComputedStyle(e).opacity == 1", arg=tip.element_handle()
            )
        browser.close()


def test_python_compares_and_takes_a_spec(tmp_path, monkeypatch) -> None:
    import quantadapt as qa

    monkeypatch.setattr(processes, "start_process", pretending)
    made = qa.Spec(train={"max_steps": 90, "learning_rate": 3e-4}, adapter={"name": "lora", "r": 4})
    grid = {"backend": ["hqq", "bnb-nf4"]}
    told = Events()
    found = qa.compare(made, grid, output=tmp_path / "out", reference=False, listener=told)
    assert repr(found) == f"<ComparisonResult {str(tmp_path / 'out')!r}; {found.verdict.words}>"
    assert found.verdict.row.label == "bnb-nf4 x lora(r=4)"
    assert told.started() == ["hqq-lora-r-4-seed0", "bnb-nf4-lora-r-4-seed0"]
    spec = parse((tmp_path / "out" / "specs" / "hqq-lora-r-4-seed0.yaml").read_text())
    assert spec["adapter"] == {"name": "lora", "r": 4}


def test_progress_is_shown_in_lines_and_obeys_no_name(tmp_path) -> None:
    text = io.StringIO()
    with CompareDisplay(Screen(text, width=200)) as shown:
        go(comparison(STEPS, {"adapter.r": [8, 13]}, reference=False), tmp_path / "out", shown)
        failed = Ending("failed", "\x1b[2J [red]gone", 3.0)
        job = Job("[bold]x", [], tmp_path, tmp_path)
        shown("ended", {"job": job, "ending": failed, "result": {}})
    lines = text.getvalue().splitlines()
    assert lines[0].startswith("✓    1/2  hqq-lora-r-8-seed0   perplexity 21.12 → 3.193")
    assert lines[1].startswith("about ")
    assert "✗    2/2  hqq-lora-r-13-seed0   failed: it cannot be done; leave it out" in lines[2]
    assert "[bold]x   failed: \\x1b[2J [red]gone   3.0 s" in lines[3]


def test_what_is_left_is_told_anew_where_runs_turn_out_slower(tmp_path) -> None:
    """Two at a time: 40 s for each of the other 9 take 3 min; 60 s on average for the other 7,
    3 min 30 s."""
    text, job = io.StringIO(), Job("x", [], tmp_path, tmp_path)
    with CompareDisplay(Screen(text, width=200)) as shown:
        shown("batch", {"count": 10, "steps": None, "slots": 2})
        for seconds in (40.0, 40.0, 100.0, 60.0):
            shown("ended", {"job": job, "ending": Ending("finished", "", seconds), "result": {}})
    told = [line for line in text.getvalue().splitlines() if line.startswith("about")]
    assert told == [
        "about 3 min for the other 9, if all are like the first",
        "about 3 min 30 s for the other 7, if all are like the first 3",
    ]


# The command --------------------------------------------------------------------------------------


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "quantadapt", "compare", *arguments]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_the_command_shows_the_plan(tmp_path) -> None:
    file = tmp_path / "grid.yaml"
    grid = {**PAIRS, "backend": ["hqq", "bnb-nf4"]}
    file.write_text(to_yaml({**STEPS, "grid": grid, "compare": {"seeds": 2, "prefer": "time"}}))
    axis, out = "train.warmup_ratio=[0.1, 0.2]", str(tmp_path / "out")
    wanted = "hqq, hqq(bits=3)"
    done = command(str(file), "--backends", wanted, "--set", axis, "-o", out, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "hqq(bits=3) x dora, warmup_ratio=0.2" in done.stdout
    assert "bnb-nf4" not in done.stdout
    assert "20 runs of 10 cells with 2 seeds, 90 steps" in done.stdout
    assert not (tmp_path / "out").exists()


def test_the_command_refuses_with_exit_code_2(tmp_path) -> None:
    done = command("--backends", "hqq,hqx(bits=", "-o", str(tmp_path / "out"), "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["problems"][0]["where"] == "--backends"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_real_runs_go_on_from_their_rung_and_come_to_what_a_run_in_one_go_does(
    tmp_path, monkeypatch
) -> None:
    """With a constant learning rate: any other schedule has another end."""
    import quantadapt as qa

    monkeypatch.setattr(halving, "choose", lambda *_: [2, 4])
    monkeypatch.setattr(halving, "most_rungs", lambda *_: 2)
    common = {
        "backend": "none",  # the others take longer to import
        "train": {"max_steps": 4, "lr_scheduler_type": "constant", "warmup_ratio": 0.0},
        "data": {"max_examples": 64},
        "evaluate": {"max_examples": 8, "samples": 0},
        "device": "cpu",
    }

    def start(job: Job, environment: Mapping[str, str]) -> Any:
        return (pretending if "1e-06" in job.name else start_process)(job, environment)

    grid = {"train.learning_rate": [1e-6, 4e-3]}
    made = comparison(common, grid, budget=1, reference=False)
    result = run_comparison(made, tmp_path / "out", listener=lambda *_: None, start=start)
    best = result.verdict.row
    assert best.label == "none x lora, learning_rate=0.004"
    folder = tmp_path / "out" / "runs" / best.names[0]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["train"]["resumed_from"] == 2
    assert metrics["train"]["steps"] == 4
    found = metrics["evaluations"]["perplexity"]
    assert best.after["perplexity"].mean == found["perplexity"]["values"]["tuned"]
    nats = found["loss"]["values"]
    kept = (nats["quantized"] - nats["merged"]) / (nats["quantized"] - nats["tuned"])
    assert best.numbers["gain_kept"].mean == pytest.approx(kept)
    assert metrics["exports"]["merged-requantized"]["state"] == "written"
    assert not (folder / "merged").exists()
    assert (folder / "adapter").is_dir()
    other = next(row for row in result.table.rows if row.state == "dropped")
    assert other.steps == 2

    rate = {**common["train"], "learning_rate": 4e-3}
    own = {"train": rate, "export": {"merge": "never"}, "output": str(tmp_path / "one")}
    spec = qa.Spec(**{**common, **own})
    straight = qa.run(spec, verbose=False).metrics["evaluations"]["perplexity"]["loss"]["values"]
    assert nats["tuned"] == pytest.approx(straight["tuned"], rel=1e-6)
