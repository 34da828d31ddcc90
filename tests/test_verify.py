"""`matrix --verify`: one broken backend or cell stops no other, and finished work is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from quantadapt import cli
from quantadapt.cli.verifying import VerifyDisplay
from quantadapt.errors import (
    DataError,
    MissingDependency,
    OutputError,
    PlanRefused,
    Problem,
    SpecError,
)
from quantadapt.matrix import process, results, verify
from quantadapt.matrix.process import Job
from quantadapt.matrix.results import Verified, read_verified
from quantadapt.matrix.verify import Verification, parse_options
from quantadapt.registry import registry

# Options as text ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "options"),
    [
        (["bits=3,group_size=32"], {"bits": 3, "group_size": 32}),
        (["bits=3", "group_size=32", "bits=2"], {"bits": 2, "group_size": 32}),
        (["bits: 3, axis: 0"], {"bits": 3, "axis": 0}),
        (["{bits: 3}"], {"bits": 3}),
        (["layers=[1, 2], name='a=b', fast=true"], {"layers": [1, 2], "name": "a=b", "fast": True}),
        (["scales={a: 1}, bits=3"], {"scales": {"a": 1}, "bits": 3}),
        (['bits=3, scales={"a": 1}'], {"scales": {"a": 1}, "bits": 3}),
        ([], {}),
    ],
)
def test_options_are_read(texts: list[str], options: dict[str, Any]):
    assert parse_options(texts) == options


@pytest.mark.parametrize("text", ["3", "bits", "bits=3,[", "= 3", "1=3"])
def test_what_names_no_options_is_an_error(text: str):
    with pytest.raises(SpecError, match="write them as name=value"):
        parse_options([text])


# What becomes of a process, with stand-ins for the suite ------------------------------------------

CHILD = """
import json, os, signal, sys, time
adapters, what = sys.argv[1].split(","), json.loads(sys.argv[2])
with open(os.environ["TEST_STARTS"], "a") as file:
    file.write(",".join(adapters) + "\\n")

def begin(test, part):
    with open(os.environ["QUANTADAPT_PROGRESS"], "a") as file:
        file.write(json.dumps({"test": test, "part": part, "number": 1, "of": 9}) + "\\n")
    how = what.get(part)
    if how == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "exit":
        print("the vendor's last words", flush=True)
        os._exit(11)
    if how == "hang":
        time.sleep(600)
    if how == "alone" and len(adapters) > 1:
        os._exit(11)

if "" in what:
    sys.exit("ERROR: it never began")
begin("test_layers", "base")
cells = []
for name in adapters:
    begin(f"test_loss_falls[{name}]", name)
    outcome = "failed" if what.get(name) == "fail" else "passed"
    cells.append({"backend": "none", "options": {}, "adapter": name, "device": "cpu",
                  "dtype": "float32", "declared": "REQUANTIZE", "verified": outcome,
                  "merge_error": 1.23456e-7})
begin("test_rules", "rest")
if what.get("all") != "silent":
    with open(os.environ["QUANTADAPT_RESULTS"], "w") as file:
        json.dump({"cells": cells}, file)
sys.exit(int(any(cell["verified"] == "failed" for cell in cells)))
"""
FOUR = ("lora", "dora", "vera", "ia3")


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that verifies `none`, with processes that do `what`."""
    starts = tmp_path / "starts"
    monkeypatch.setenv("TEST_STARTS", str(starts))

    def run(
        what: dict[str, str] | None = None, adapters: tuple[str, ...] = FOUR, **options: Any
    ) -> tuple[dict[str, results.VerifiedCell], list[str]]:
        starts.write_text("")
        verification = Verification(
            tmp_path / "deep" / "m.json",
            timeout=options.pop("timeout", 60),
            listener=options.pop("listener", None),
            start=lambda job: [
                sys.executable, "-c", CHILD, ",".join(job.adapters), json.dumps(what or {})
            ],
        )  # fmt: skip
        known = registry()
        records = [known.adapter(name) for name in adapters]
        cells = verification.run([known.backend("none")], records, **options)
        return {cell.adapter: cell for cell in cells}, starts.read_text().split()

    run.file = tmp_path / "deep" / "m.json"  # type: ignore[attr-defined]
    return run


def outcomes(cells: dict[str, results.VerifiedCell]) -> dict[str, str]:
    return {name: cell.verified for name, cell in cells.items()}


def test_adapters_share_a_process(stand_in):
    cells, starts = stand_in()
    assert starts == ["lora,dora,vera,ia3"]
    assert set(outcomes(cells).values()) == {"passed"}
    assert cells["lora"].figures == {"merge_error": 1.23456e-7}
    assert cells["lora"].declared == "requantize"
    assert cells["lora"].origin["versions"]["peft"]


def test_many_adapters_are_spread_over_processes(stand_in, monkeypatch):
    monkeypatch.setattr(verify, "AT_ONCE", 3)
    cells, starts = stand_in(jobs=2)
    assert sorted(starts) == ["ia3", "lora,dora,vera"]
    assert set(outcomes(cells).values()) == {"passed"}


def test_what_crashes_on_one_adapter_spares_the_others(stand_in):
    cells, starts = stand_in({"dora": "segfault", "vera": "exit"})
    assert outcomes(cells) == {
        "lora": "passed", "dora": "crashed", "vera": "crashed", "ia3": "passed"
    }  # fmt: skip
    assert starts == ["lora,dora,vera,ia3", "lora,vera,ia3", "lora,ia3", "vera", "dora"]
    died = "killed by SIGSEGV in test_loss_falls[dora]: Fatal Python error: Segmentation fault File"
    assert cells["dora"].detail.startswith(died)
    assert cells["vera"].detail == (
        "ended with exit code 11 in test_loss_falls[vera]: the vendor's last words"
    )
    assert cells["vera"].origin["versions"] == cells["lora"].origin["versions"]


def test_what_hangs_is_ended_and_says_where(stand_in):
    cells, starts = stand_in({"dora": "hang"}, ("dora",), timeout=3)
    assert starts == ["dora"]
    assert cells["dora"].verified == "crashed"
    assert cells["dora"].detail.startswith(
        "no sign of life for 3 s in test_loss_falls[dora]: Fatal"
    )
    assert "line" in cells["dora"].detail


@pytest.mark.parametrize("part", ["base", ""])
def test_a_crash_before_the_adapters_is_tried_once_more_only(stand_in, part):
    cells, starts = stand_in({part: "exit"})
    assert starts == ["lora,dora,vera,ia3", "lora"]
    assert set(outcomes(cells).values()) == {"crashed"}
    words = {"base": "the vendor's last words", "": "it never began"}[part]
    assert all(words in cell.detail for cell in cells.values())


def test_a_crash_that_no_adapter_is_named_for_is_looked_for_one_by_one(stand_in):
    cells, starts = stand_in({"rest": "alone"})
    assert starts == ["lora,dora,vera,ia3", *FOUR]
    assert set(outcomes(cells).values()) == {"passed"}


def test_a_backend_that_recovers_is_verified_one_by_one(stand_in):
    cells, starts = stand_in({"base": "alone"})
    assert starts == ["lora,dora,vera,ia3", *FOUR]
    assert set(outcomes(cells).values()) == {"passed"}


def test_an_end_without_results_is_no_success(stand_in):
    cells, _ = stand_in({"all": "silent"}, ("lora",))
    assert outcomes(cells) == {"lora": "crashed"}
    assert cells["lora"].detail.startswith("ended with exit code 0")


def test_what_has_a_result_is_passed_over(stand_in, monkeypatch):
    stand_in({"dora": "fail", "vera": "exit"})
    cells, starts = stand_in()
    assert starts == []
    assert outcomes(cells) == {
        "lora": "passed", "dora": "failed", "vera": "crashed", "ia3": "passed"
    }  # fmt: skip
    cells, starts = stand_in(adapters=(*FOUR, "adalora"))
    assert starts == ["adalora"]
    cells, starts = stand_in(adapters=("dora",), fresh=True)
    assert (starts, outcomes(cells)) == (["dora"], {"dora": "passed"})
    assert len(read_verified(stand_in.file).cells) == 5
    monkeypatch.setattr(results, "__version__", "9.9")
    assert stand_in(adapters=("lora",))[1] == ["lora"]


def test_what_was_declared_otherwise_is_verified_again(stand_in):
    stand_in(adapters=("lora",))
    text = stand_in.file.read_text()
    stand_in.file.write_text(text.replace('"requantize"', '"dense"'))
    assert stand_in(adapters=("lora",))[1] == ["lora"]


def test_results_are_kept_as_they_come(stand_in):
    """An interruption costs the process that is at work, and nothing else."""

    def interrupt(event: str, facts: Any) -> None:
        if event == "test" and facts["job"].adapters == ("ia3",):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "AT_ONCE", 3)
        with pytest.raises(KeyboardInterrupt):
            stand_in({"ia3": "hang"}, listener=interrupt)
        found = [cell.adapter for cell in read_verified(stand_in.file).cells]
        assert found == ["lora", "dora", "vera"]
        assert stand_in()[1] == ["ia3"]


def test_the_file_holds_one_cell_a_line_and_what_they_share_once(stand_in):
    stand_in()
    lines = stand_in.file.read_text().splitlines()
    assert sum('"adapter"' in line for line in lines) == len(FOUR)
    assert sum('"transformers"' in line for line in lines) == 1
    part = read_verified(stand_in.file)
    assert part.cells[0].merge_error == 1.23e-7
    assert {"date", "device", "python"} < set(part.generated)
    assert Verified.of(part.cells).to_json() == stand_in.file.read_text()


def test_cells_of_other_origin_say_so(tmp_path: Path, stand_in):
    stand_in()
    part = read_verified(stand_in.file)
    old = {**part.cells[0].origin, "date": "2020-01-01", "versions": {"torch": "1.0"}}
    cells = [results.VerifiedCell("none", "boft", "passed", origin=old), *part.cells]
    mixed = Verified.of(cells)
    (tmp_path / "m.json").write_text(mixed.to_json())
    again = read_verified(tmp_path / "m.json")
    assert "torch" not in again.generated["versions"]
    assert {cell.key: cell.origin for cell in again.cells} == {c.key: c.origin for c in cells}
    assert again.origin.startswith("2020-01-01 to 2")


def test_what_is_missing_is_not_run(stand_in, monkeypatch):
    no = Problem("it needs spam, which is not installed", where="backend")
    monkeypatch.setattr(verify, "obstacles", lambda *_: [no])
    cells, starts = stand_in()
    assert starts == []
    assert {cell.verified for cell in cells.values()} == {"not run"}
    assert cells["lora"].detail == "it needs spam, which is not installed"
    monkeypatch.undo()


def test_a_result_of_another_machine_is_not_thrown_away(stand_in, monkeypatch):
    stand_in(adapters=("lora",))
    no = Problem("it needs spam", where="backend")
    monkeypatch.setattr(verify, "obstacles", lambda *_: [no])
    cells, _ = stand_in(adapters=("lora", "dora"), fresh=True)
    assert outcomes(cells) == {"lora": "passed", "dora": "not run"}


def test_mistakes_are_told_before_any_process(stand_in, tmp_path, monkeypatch):
    with pytest.raises(PlanRefused, match="'none' has no option 'bits'"):
        stand_in(options={"bits": 3})
    with pytest.raises(PlanRefused, match="no CUDA device"):
        stand_in(device="cuda:9")
    (tmp_path / "file").write_text("")
    with pytest.raises((OutputError, DataError)):
        Verification(tmp_path / "file" / "m.json").run([], [])
    (tmp_path / "wrong.json").write_text("[]")
    with pytest.raises(DataError, match="not a file of verified results"):
        Verification(tmp_path / "wrong.json")
    monkeypatch.setattr(verify, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="pip install pytest"):
        stand_in()
    assert not Path(os.environ["TEST_STARTS"]).read_text()


@pytest.mark.parametrize("terminal", [True, False])
def test_the_display_shows_tests_on_a_terminal_and_cells_everywhere(stand_in, tmp_path, terminal):
    from rich.console import Console

    with (tmp_path / "shown").open("w") as file:
        console = Console(file=file, force_terminal=terminal, width=120, color_system=None)
        with VerifyDisplay(console) as display:
            job = Job(registry().backend("none"), ("ia3",), {}, "cpu", "float32")
            display("job", {"job": job})
            display("test", {"job": job, "test": "test_x[ia3]", "number": 3, "of": 9})
            display._live.refresh()
            display("ended", {"job": job})
            stand_in({"dora": "exit"}, ("lora", "dora"), listener=display)
            stand_in(adapters=("lora",), listener=display)
    shown = (tmp_path / "shown").read_text()
    assert ("2/9 test_x[ia3]" in shown) is terminal
    assert "none x lora" in shown
    assert "crashed  ended with exit code 11 in test_loss_falls[dora]" in shown
    assert "none: 1 of 1 cells need no run" in shown


# The real suite in real processes -----------------------------------------------------------------

TOYS = """
    import os, time
    from functools import cached_property

    from quantadapt import Backend, LayerwiseQuantizer, Merge, hookimpl
    from quantadapt.protocols import LayerwiseTarget


    class Target(LayerwiseTarget):
        def matches(self, module):
            return type(module).__name__ == "ToyLinear"

        def dequantize(self, module):
            return module.codes * module.scale


    class Honest(LayerwiseQuantizer):
        @cached_property
        def target(self):
            return Target(self)

        def quantize_linear(self, linear):
            from toy_layer import ToyLinear

            return ToyLinear(linear)

        def load_linear(self, linear, state):
            from toy_layer import ToyLinear

            if "bias" not in state:
                linear.bias = None
            module = ToyLinear(linear.requires_grad_(False).to_empty(device="cpu"))
            module.load_state_dict(state)
            return module

        def quantization_config(self):
            return {"quant_method": "toy"}

        @classmethod
        def from_checkpoint(cls, quantization_config):
            return cls() if quantization_config.get("quant_method") == "toy" else None

        @classmethod
        def from_model(cls, model):
            return cls() if any(type(m).__name__ == "ToyLinear" for m in model.modules()) else None


    class Dies(Honest):
        def quantize(self, source, **options):
            os._exit(11)


    class Hangs(Honest):
        def model_post_init(self, context):
            if "QUANTADAPT_PROGRESS" in os.environ:  # where it is verified, not where it is listed
                time.sleep(600)


    class Raises(Honest):
        def quantize(self, source, **options):
            raise RuntimeError("the vendor is out of order")


    @hookimpl
    def quantadapt_backends():
        kinds = {"dies": Dies, "hangs": Hangs, "honest": Honest, "raises": Raises}
        return [
            Backend(f"toy-{name}", "a test", kind, devices=("cpu",), merge=Merge.REQUANTIZE)
            for name, kind in kinds.items()
        ]
"""
LAYER = """
    import torch
    from torch import nn


    class ToyLinear(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            weight = linear.weight.detach()
            scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-8) / 127
            codes = (weight / scale).round().clamp(-127, 127)
            self.register_buffer("codes", codes.to(torch.int8))
            self.register_buffer("scale", scale)
            self.bias = linear.bias

        def forward(self, x):
            return nn.functional.linear(x, self.codes * self.scale, self.bias)
"""


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The backends above as an installed distribution, here and in other processes."""
    folder = tmp_path / "site"
    info = folder / "qa_toys-1.2.dist-info"
    info.mkdir(parents=True)
    (folder / "qa_toys_plugin.py").write_text(textwrap.dedent(TOYS))
    (folder / "toy_layer.py").write_text(textwrap.dedent(LAYER))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: qa-toys\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[quantadapt]\ntoys = qa_toys_plugin\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    registry.cache_clear()
    yield tmp_path
    registry.cache_clear()
    for name in ("qa_toys_plugin", "toy_layer"):
        sys.modules.pop(name, None)


def run_cli(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main(["matrix", "--verify", "--adapter", "lora", *arguments])
    shown = capsys.readouterr()
    return int(ended.value.code or 0), shown.out, shown.err


@pytest.mark.slow
def test_one_broken_backend_stops_no_other(toys: Path, capsys, monkeypatch):
    started = []
    popen = subprocess.Popen

    def counted(command: list[str], **options: Any) -> Any:
        if "--backend" in command:  # no trial of a plugin
            started.append(command[command.index("--backend") + 1])
        return popen(command, **options)

    monkeypatch.setattr(process.subprocess, "Popen", counted)
    code, out, _ = run_cli(capsys, "--backend", "toy-hangs", "--timeout", "3")
    assert (code, started) == (1, ["toy-hangs"])
    names = [f"toy-{name}" for name in ("dies", "hangs", "honest", "raises")]
    backends = [word for name in names for word in ("--backend", name)]
    code, out, _ = run_cli(capsys, *backends, "--jobs", "2")
    assert code == 1
    assert sorted(started) == sorted(names)
    assert "toy-hangs: 1 of 1 cells need no run" in out
    assert "2 crashed, 1 passed, 1 failed; results are in matrix.json" in out
    cells = {cell.backend: cell for cell in read_verified(toys / "matrix.json").cells}
    assert {name: cell.verified for name, cell in cells.items()} == {
        "toy-dies": "crashed",
        "toy-hangs": "crashed",
        "toy-honest": "passed",
        "toy-raises": "failed",
    }
    assert cells["toy-dies"].detail.startswith("ended with exit code 11 in test_")
    assert cells["toy-hangs"].detail.startswith("no sign of life for 3 s")
    assert "RuntimeError: the vendor is out of order" in cells["toy-raises"].detail
    honest = cells["toy-honest"]
    assert honest.origin["versions"]["qa-toys"] == "1.2"
    assert honest.merge_error is not None
    assert honest.merge_error < 1e-5
    assert honest.figures["bits"] == pytest.approx(8, abs=0.5)
    again = "pytest --pyargs quantadapt.testing --backend toy-raises --adapter lora --device cpu"
    assert again in out

    started.clear()
    code, out, _ = run_cli(capsys, *backends, "--json")
    document = json.loads(out)
    assert (code, started) == (1, [])
    assert document["count"] == {"crashed": 2, "passed": 1, "failed": 1}
    code, out, _ = run_cli(capsys, "--backend", "toy-honest")
    assert (code, started) == (0, [])
    assert "1 passed; results are in matrix.json" in out


def test_a_wrong_command_line_is_refused(toys: Path, capsys):
    assert run_cli(capsys, "--backend", "toy-honst")[0] == 2
    assert run_cli(capsys, "--backend", "toy-honest", "--backend-options", "3")[0] == 2
    assert run_cli(capsys, "--backend", "toy-honest", "--backend-options", "bits=3")[0] == 2
    assert run_cli(capsys, "--backend", "toy-honest", "--device", "cuda:9")[0] == 2
    assert not (toys / "matrix.json").exists()
    with pytest.raises(SystemExit, match="2"):
        cli.main(["matrix", "--fresh"])
    assert "--fresh without --verify" in capsys.readouterr().err
