"""Rows of figures are run side by side on the GPUs that there are; the commands here want none."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import published
from published import Gpus, Row, run, with_what_they_need


def stamped(seconds: float) -> str:
    """A command that tells when it began, on which GPUs, and when it ended; without blanks."""
    gpus = "__import__('os').environ['CUDA_VISIBLE_DEVICES']"
    code = f"t=__import__('time');b=t.time();t.sleep({seconds});print(b,t.time(),{gpus})"
    return f"-c {code}"


def ran(names: list[str], out: Path) -> dict[str, str]:
    gpus = Gpus(["4", "7"])
    with ThreadPoolExecutor(2) as pool:
        told = pool.map(lambda name: run(name, gpus, out), with_what_they_need(names))
        return {line.partition(":")[0]: line for line in told}


def test_rows_share_gpus_and_wait_for_each_other(tmp_path: Path, monkeypatch) -> None:
    rows = {
        "model": Row(stamped(0.3), 1),
        "one": Row(stamped(0.3), 1, after="model"),
        "both": Row(stamped(0.3), 1, gpus=2),
        "four": Row(stamped(0), 1, gpus=4),
        "broken": Row("-c raise(SystemExit(3))", 1),
        "endless": Row(stamped(60), 0.02),
    }
    monkeypatch.setattr(published, "ROWS", rows)
    told = ran(["one", "both", "four", "broken", "endless"], tmp_path)
    times = {n: (tmp_path / f"{n}.txt").read_text().split() for n in ("model", "one", "both")}
    assert float(times["model"][1]) <= float(times["one"][0])
    assert {times["model"][2], times["one"][2]} <= {"4", "7"}
    assert sorted(times["both"][2].split(",")) == ["4", "7"]
    spans = [tuple(map(float, span[:2])) for span in times.values()]
    both = tuple(map(float, times["both"][:2]))
    assert all(end <= both[0] or both[1] <= begin for begin, end in spans if (begin, end) != both)
    assert told["four"] == "four: not run, it wants 4 GPUs"
    assert told["broken"].startswith("broken: failed")
    assert told["endless"].startswith("endless: failed")
    assert "not done after 0.02 minutes" in (tmp_path / "endless.err").read_text()
    again = ran(["one", "broken"], tmp_path)
    assert again["one"] == "one: done before"


def test_rows_after_one_that_failed_are_not_run(tmp_path: Path, monkeypatch) -> None:
    rows = {"model": Row("-c raise(SystemExit(3))", 1), "one": Row(stamped(0), 1, after="model")}
    monkeypatch.setattr(published, "ROWS", rows)
    assert ran(["one"], tmp_path)["one"] == "one: not run, as model failed"


@pytest.mark.parametrize("name", published.ROWS)
def test_what_a_row_runs_is_there(name: str) -> None:
    script, *_ = published.ROWS[name].arguments.split()
    assert script == "-m" or (published.ROOT / script).is_file()
