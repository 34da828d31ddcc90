"""The command line: what a user sees, on which stream, and the exit code."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pluggy
import pytest
from few_rows import few_rows

import quantadapt.pipeline
from quantadapt import cli, demo
from quantadapt.cli.commands import COMMANDS, TRACEBACK
from quantadapt.errors import OptionsError, PlanRefused, TrainingError
from quantadapt.folders.run_folder import RunFolder
from quantadapt.hookspecs import hookimpl
from quantadapt.machine import Machine
from quantadapt.protocols import Figure
from quantadapt.registry.discovery import Provenance, registry
from quantadapt.testing.small_demo import small_model

TRAIN = str(demo.TRAIN_FILE)


@dataclass
class Shown:
    """What a command left on the screen."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run_cli(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv(TRACEBACK, raising=False)

    def call(*arguments: str) -> Shown:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        code = ended.value.code
        return Shown(code if isinstance(code, int) else 0, *capsys.readouterr())

    return call


def python(*lines: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "\n".join(lines)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)


@pytest.mark.parametrize("line", ["--help", "--version", "schema", "init demo --output -"])
def test_a_reader_that_leaves_early_ends_it_without_words(line: str):
    """As with `| head`."""
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "quantadapt", *line.split()]
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writes)
    assert (done.returncode, done.stderr) == (1, "")


def test_where_no_temporary_file_can_be_written_the_way_out_is_told():
    """As on a full disk, which Python takes for no folder at all."""
    lines = ["import tempfile", "from quantadapt import cli"]
    lines += ["tempfile._candidate_tempdir_list = lambda: ['/nowhere']", "cli.main(['schema'])"]
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "No usable temporary directory found in ['/nowhere']" in done.stderr
    assert "fix: make room in one of them, or name another folder by TMPDIR" in done.stderr
    assert "not expected" not in done.stderr


# How fast it starts ------------------------------------------------------------------------------


def test_import_loads_nothing_heavy():
    heavy = ["torch", "peft", "transformers", "pydantic", "typer", "rich", "hqq"]
    done = python("import quantadapt, sys", f"print([m for m in {heavy} if m in sys.modules])")
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_load_neither_typer_nor_rich(flag: str):
    heavy = ["torch", "typer", "rich", "pydantic", "pluggy", "importlib.metadata"]
    done = python(
        "import sys, quantadapt.cli",
        "try:",
        f"    quantadapt.cli.main([{flag!r}])",
        "finally:",
        f"    print([m for m in {heavy} if m in sys.modules])",
    )
    assert done.stdout.strip().endswith("[]")


def test_help_takes_less_than_a_third_of_a_second():
    command = [sys.executable, "-m", "quantadapt.cli", "--help"]
    best = 10.0
    for _ in range(5):
        before = os.times()
        subprocess.run(command, capture_output=True, check=True)
        after = os.times()
        used = after.children_user + after.children_system
        best = min(best, used - before.children_user - before.children_system)
    assert best < 0.3, f"{best} s of processor time"


def test_planning_loads_no_torch(tmp_path: Path):
    done = python(
        "import sys, quantadapt.cli",
        "try:",
        "    quantadapt.cli.main(['plan', '--json'])",
        "except SystemExit:",
        "    pass",
        "print([m for m in ('torch', 'peft', 'hqq') if m in sys.modules], file=sys.stderr)",
    )
    assert done.stderr.strip().endswith("[]")


# Help --------------------------------------------------------------------------------------------


def test_overview_lists_every_command_and_the_exit_codes(run_cli):
    shown = run_cli("--help")
    assert shown.code == 0
    assert all(f"│ {name} " in shown.out or f"| {name} " in shown.out for name in COMMANDS)
    assert "Exit codes: 0 done, 1 failed, 2 refused" in shown.out
    assert all(len(line) <= 100 for line in shown.out.splitlines())
    assert run_cli().out == shown.out


def test_version(run_cli):
    assert run_cli("--version").out == "quantadapt 0.1.0\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_examples(name: str, run_cli):
    shown = run_cli(name, "--help")
    assert shown.code == 0
    assert COMMANDS[name].help.rstrip(".") in " ".join(shown.out.split())
    assert "Examples" in shown.out
    assert f"quantadapt {name}" in shown.out


def test_unknown_command_is_corrected(run_cli):
    shown = run_cli("rnu")
    assert shown.code == 2
    assert "Did you mean 'run'?" in shown.err


# Flags, YAML and --set ---------------------------------------------------------------------------


def planned(run_cli, *arguments: str) -> dict[str, Any]:
    shown = run_cli("plan", "--json", *arguments)
    assert shown.code == 0, shown.err
    assert shown.err == ""
    return shown.json


def test_plan_without_anything_is_the_demo(run_cli):
    made = planned(run_cli)
    assert (made["backend"]["name"], made["adapter"]["name"]) == ("hqq", "lora")
    assert made["model"] == str(demo.MODEL_DIR)
    assert made["spec"]["output"] == "runs/hqq-lora"


@pytest.mark.parametrize(
    ("length", "words"),
    [("train.max_steps=20", "20 steps,"), ("train.max_steps=1", "1 step,"),
     ("train.num_train_epochs=1", "1 epoch,"), ("train.num_train_epochs=2", "2 epochs,")],
)  # fmt: skip
def test_a_plan_says_how_long_training_is(run_cli, length: str, words: str):
    steps = ["--set", "train.max_steps=-1"] if "epochs" in length else []
    shown = run_cli("plan", "--adapter", "lora", *steps, "--set", length)
    assert f"{words} 8 examples in a step" in shown.out


def test_plan_for_people(run_cli):
    shown = run_cli("plan", "--adapter", "lily")
    assert shown.code == 0
    assert "hqq (bits=4, group_size=64, axis=1)" in shown.out
    assert "no merged model (lily-no-merge)" in shown.out


def test_flags_win_over_the_file_and_set_over_both(run_cli):
    text = "backend: {name: hqq, bits: 3}\ntrain: {max_steps: 7}\nseed: 1\n"
    Path("c.yaml").write_text(text)
    made = planned(
        run_cli, "c.yaml", "--backend", "hqq", "--max-steps", "8", "--set", "train.max_steps=9",
        "--set", "backend.group_size=32", "--lr", "0.5", "--merge", "never", "--data", TRAIN,
    )  # fmt: skip
    assert made["backend"]["options"] == {"bits": 3, "group_size": 32, "axis": 1}
    spec = made["spec"]
    assert (spec["train"]["max_steps"], spec["train"]["learning_rate"]) == (9, 0.5)
    assert (spec["seed"], spec["export"]["merge"], spec["data"]["path"]) == (1, "never", TRAIN)


def test_flags_win_over_the_short_form_of_the_file(run_cli):
    Path("c.yaml").write_text("data: nix.jsonl\nbackend: none\nadapter: dora\n")
    made = planned(run_cli, "c.yaml", "--data", TRAIN, "--backend", "hqq", "--adapter", "lora")
    assert made["spec"]["data"]["path"] == TRAIN
    assert (made["backend"]["name"], made["adapter"]["name"]) == ("hqq", "lora")


def test_cards_that_are_asked_about_are_the_device(run_cli, monkeypatch):
    monkeypatch.setattr("quantadapt.planning.stage.this_machine", Machine)
    for flags in ((), ("--device", "cuda")):
        out = run_cli("plan", "--gpus", "2", "--card", "24", *flags).out
        assert "2 x cuda (ddp), computing in bfloat16" in out
        assert "cpu" not in out


def test_another_backend_does_not_get_the_options_of_the_file(run_cli):
    Path("c.yaml").write_text("backend: {name: hqq, bits: 3}\n")
    made = planned(run_cli, "c.yaml", "--backend", "none")
    assert made["backend"] == {"name": "none", "options": {}}


def test_schema_knows_the_options_of_backends(run_cli):
    schema = run_cli("schema").json
    by_name = {
        rule["if"]["properties"]["name"]["const"]: rule["then"]["properties"]
        for rule in schema["$defs"]["BackendSpec"]["allOf"]
    }
    assert by_name["hqq"]["bits"]["enum"] == [1, 2, 3, 4, 8]
    assert {"type": "string"} in schema["properties"]["backend"]["anyOf"]


# Bad input ---------------------------------------------------------------------------------------


def write_checkpoint(folder: Path, weights: str, content: bytes) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / weights).write_bytes(content)
    return folder


def test_mistakes_in_keys_and_in_options_are_told_together(run_cli):
    options = ["--set", "backend.bit=3", "--set", "adapter.rr=5", "--set", "train.max_stepz=5"]
    shown = run_cli("plan", "--model", "./nix", "--data", "nix.jsonl", *options, "--dtype", "int8")
    assert shown.code == 2
    assert "the spec cannot be used, 6 problems:" in shown.err
    for key in ("dtype", "train.max_stepz", "model", "data.path", "backend.bit", "adapter.rr"):
        assert f"  - {key}: " in shown.err


def test_a_prediction_for_a_card_asks_for_no_free_folder(run_cli, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").touch()
    assert run_cli("plan", "--output", "taken").code == 2
    assert "fits 24 GiB: yes" in run_cli("plan", "--output", "taken", "--card", "24").out


def test_perplexities_keep_their_zeros():
    from quantadapt.cli.progress import four_digits

    shown = [four_digits(value) for value in (14, 1.0317, 18.163, 1234.5)]
    assert shown == ["14.00", "1.032", "18.16", "1234"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--backend", "hqqq"], "did you mean 'hqq'?"),
        (["--adapter", "loar"], "did you mean 'lora'?"),
        (["--set", "backend.bit=3"], "did you mean 'bits'?"),
        (["--set", "backend.bits=5"], "use one of 1, 2, 3, 4 or 8"),
        (["--set", "adapter.rr=5"], "did you mean 'r'?"),
        (["--set", "train.max_stepz=5"], "did you mean 'max_steps'?"),
        (["--set", "train=5", "--max-steps", "3"], "train: 5 is no mapping"),
        (["--set", "nonsense"], "write it as key=value"),
        (["--dtype", "float8"], "use one of 'auto', 'float32'"),
        (["--device", "gpu"], "'gpu' is no device"),
        (["--data", "nix.jsonl"], "nix.jsonl does not exist"),
        (["--model", "./nix"], "./nix does not exist"),
        (["--adapter", "glora"], "[rule glora-not-supported]"),
        (["--adapter", "lily", "--merge", "dense"], "[rule lily-no-merge]"),
        (["--max-steps", "many"], "Invalid value for '--max-steps'"),
        (["missing.yaml"], "missing.yaml: cannot read it: No such file or directory"),
    ],
)
def test_mistakes_are_refused_in_a_sentence(arguments: list[str], expected: str, run_cli):
    shown = run_cli("plan", *arguments)
    assert shown.code == 2
    assert expected in shown.err
    assert shown.out == ""
    assert "Traceback" not in shown.err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("backend: hqq\n  bits: [3\n", "c.yaml:2: not valid YAML"),
        ("- a\n", "the file holds no mapping"),
        ("modle: x\n", "did you mean 'model'?"),
    ],
)
def test_bad_yaml_is_refused(text: str, expected: str, run_cli):
    Path("c.yaml").write_text(text)
    shown = run_cli("plan", "c.yaml")
    assert shown.code == 2
    assert expected in shown.err


@pytest.mark.parametrize("command", [("plan", "--model"), ("eval",), ("quantize", "-o", "q")])
def test_bad_models_are_refused(command: tuple[str, ...], run_cli):
    folder = Path("empty")
    folder.mkdir()
    assert "is empty" in run_cli(*command, folder).err
    (folder / "notes.txt").write_text("hello")
    assert "no readable config.json" in run_cli(*command, folder).err
    pickles = write_checkpoint(Path("pickle"), "pytorch_model.bin", b"x")
    assert "which can run code when read" in run_cli(*command, pickles).err
    header = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
    content = len(header).to_bytes(8, "little") + header + b"1234"
    cut = write_checkpoint(Path("cut"), "model.safetensors", content)
    shown = run_cli(*command, cut)
    assert shown.code == 2
    assert "model.safetensors is cut short" in shown.err


def test_all_problems_come_at_once(run_cli, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    quantadapt.machine.this_machine.cache_clear()
    shown = run_cli(
        "plan", "--json", "--set", "backend.bits=5", "--set", "adapter.rr=8", "--device", "cuda",
        "--data", "nix.jsonl",
    )  # fmt: skip
    quantadapt.machine.this_machine.cache_clear()
    found = shown.json["error"]
    assert (shown.code, found["exit_code"], found["type"]) == (2, 2, "PlanRefused")
    where = {problem["where"] for problem in found["problems"]}
    assert where == {"device", "backend.bits", "adapter.rr", "data.path"}
    assert "there is no CUDA device here" in shown.err


@pytest.mark.parametrize(
    ("arguments", "cannot"),
    [
        (["init", "--model", "x"], "cannot write a config"),
        (["data", TRAIN, "--column", "nonsense"], "cannot show what is learnt"),
        (["quantize", demo.MODEL_DIR, "-o", "q", "--set", "nonsense"], "cannot quantize"),
        (["export", demo.MODEL_DIR, "vllm", "--set", "nonsense"], "cannot export"),
        (["eval", demo.MODEL_DIR, "--limit", "3"], "cannot measure"),
        (["eval", demo.MODEL_DIR, "--set", "nonsense"], "cannot measure"),
        (["generate", demo.MODEL_DIR, "--file", "q.txt", "--out", "taken"], "cannot generate"),
        (["generate", demo.MODEL_DIR, "-p", "x", "--max-new-tokens", "0"], "cannot generate"),
        (["chat", demo.MODEL_DIR, "--layout", "odd"], "cannot chat"),
        (["serve", demo.MODEL_DIR, "--adapter", "x"], "cannot serve"),
        (["judge", "a", "a", "--pairs-only", "--prompts", "q.txt"], "cannot judge"),
        (["people", "nix.jsonl", "--report"], "cannot ask for votes"),
        (["demo", demo.MODEL_DIR, "--host", "0.0.0.0"], "cannot show the demo"),
        (["studio", "taken"], "cannot open the studio"),
        (["matrix", "--jobs", "2"], "cannot show the matrix"),
        (["plan", "--set", "nonsense"], "the spec cannot be used"),
        (["compare", "--backends", "("], "the spec cannot be used"),
    ],
)
def test_what_cannot_be_done_is_told_in_the_words_of_the_command(arguments, cannot, run_cli):
    Path("taken").write_text("precious")
    Path("q.txt").write_text("a question")
    shown = run_cli(*arguments)
    assert shown.code == 2
    assert shown.err.startswith(f"Error: {cannot}, 1 problem:\n  - "), shown.err
    assert Path("taken").read_text() == "precious"


def test_every_command_without_a_spec_says_what_it_cannot_do():
    entries = COMMANDS.items()
    of_a_spec = {"run", "plan", "compare", "schema"}
    assert {name for name, entry in entries if not entry.cannot} == of_a_spec
    assert all(e.cannot.startswith("cannot ") for name, e in entries if name not in of_a_spec)


def test_options_of_no_spec_are_called_options_in_python():
    with pytest.raises(OptionsError, match="these options cannot be used, 1 problem:"):
        quantadapt.generate(None, "one text")


def test_an_output_of_somebody_else_stays(run_cli):
    other = Path("other")
    other.mkdir()
    (other / "thesis.tex").write_text("precious")
    for extra in ((), ("--overwrite",)):
        shown = run_cli("quantize", demo.MODEL_DIR, "--output", other, *extra)
        assert shown.code == 2
        assert "was not made by quantadapt" in shown.err
    shown = run_cli("quantize", demo.MODEL_DIR, "--output", other, "--set", "bits=5")
    assert "was not made by quantadapt" in shown.err
    assert "use one of 1, 2, 3, 4 or 8" in shown.err
    assert [file.name for file in other.iterdir()] == ["thesis.tex"]


def test_a_forbidden_merge_is_refused_before_loading(run_cli):
    adapter = Path("run/adapter")
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    record = {"base": "x", "backend": "hqq", "options": {}, "dtype": "float32", "adapter": "lily"}
    record |= {"format": 1, "skip_modules": []}
    (adapter / "quantadapt.json").write_text(json.dumps(record))
    shown = run_cli("merge", "run")
    assert shown.code == 2
    assert "[rule lily-no-merge]" in shown.err


def test_where_there_is_nothing_to_merge_all_is_told_at_once(run_cli):
    Path("typo").mkdir()
    (Path("typo") / "thesis.txt").write_text("x")
    shown = run_cli("merge", "typo", "--output", "typo/thesis.txt")
    assert shown.code == 2
    assert "typo: there is no adapter here" in shown.err
    shown = run_cli("merge", "typo", "--onto", "./nix", "--kind", "requantize", "--output", ".")
    assert shown.code == 2
    for text in ("there is no adapter here", "./nix does not exist", "the result is dense"):
        assert text in shown.err


# Runs, with the pipeline replaced by one that does nothing ------------------------

METRICS = {
    "evaluations": {
        "perplexity": {
            "perplexity": {
                "unit": "",
                "better": "lower",
                "values": {"unquantized": 16.0, "quantized": 17.0, "tuned": 2.0, "merged": 2.0},
            }
        },
        "exact": {"exact": {"unit": "share", "better": "higher", "values": {"tuned": 0.4166}}},
    },
    "failed_evaluations": {"tasks": "it failed, on the tuned model"},
    "samples": [{"prompt": "add [a] and b", "before": "#", "after": "return a + b"}],
    "exports": {"merged-dense": {"words": "written to merged/, KL below 1e-7", "refusals": []}},
}


def fake_run(work: Any) -> Any:
    """Return a `pipeline.run` that makes a folder, calls `work`, and tells its listener."""

    def run(plan: Any, *, listener: Any, command: str = "") -> Any:
        folder = RunFolder.create(plan.spec.output, overwrite=plan.spec.overwrite)
        listener("stage", {"name": "train", "state": "start"})
        work()
        for step in (1, 2, 40):
            entry = {"step": step, "max_steps": 40, "loss": 1.5, "learning_rate": 1e-3}
            listener("log", entry)
        listener("stage", {"name": "train", "state": "done", "seconds": 1.0})
        figures = {"exact": Figure(0.4166, "share", "higher"), "count": Figure(12)}
        listener("figures", {"evaluation": "exact", "model": "tuned", "figures": figures})
        listener("stage", {"name": "evaluate", "state": "done", "seconds": 1.0})
        listener("note", {"text": "a note"})
        listener("something new", {})
        return SimpleNamespace(folder=folder.path, metrics=METRICS)

    return run


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch):
    def replace(work: Any = lambda: None) -> None:
        monkeypatch.setattr(quantadapt.pipeline, "run", fake_run(work))

    return replace


def test_run_prints_plan_progress_and_results(run_cli, pipeline):
    pipeline()
    shown = run_cli("run", "--output", "out")
    assert shown.code == 0, shown.err
    for text in (
        "lora(r=16, lora_alpha=32) on hqq(bits=4",
        "train step 40/40   loss 1.5000   lr 1.00e-03",
        "✓ train",
        "note: a note",
        "✓ evaluate",
        "exact tuned 41.7%",
        "higher is better",
        "tuned: quantized and tuned",
        "tasks: it failed, on the tuned model",
        "add [a] and b",
        "merged-dense: written to merged/, KL below 1e-7",
        "report: out/report.html",
    ):
        assert text in shown.out
    assert shown.err == ""


def test_run_as_json_prints_nothing_else_to_stdout(run_cli, pipeline):
    pipeline(lambda: print("vendor banner"))
    shown = run_cli("run", "--output", "out", "--json")
    found = shown.json["metrics"]["evaluations"]["perplexity"]["perplexity"]
    assert found["values"]["tuned"] == 2.0
    assert shown.json["folder"] == "out"
    assert "✓ train" in shown.err


def test_a_run_folder_in_the_home_folder_gets_the_log(run_cli, pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    pipeline(lambda: print("vendor banner"))
    assert run_cli("run", "--output", "~/out").code == 0
    assert "vendor banner" in (tmp_path / "home" / "out" / "log.txt").read_text()


def chatter() -> None:
    print("from python")
    print("to stderr", file=sys.stderr)
    os.write(1, b"to descriptor 1\n")
    ctypes.CDLL(None).puts(b"from C")
    ctypes.CDLL(None).fflush(None)
    warnings.warn("a vendor's warning", DeprecationWarning, stacklevel=1)
    subprocess.run([sys.executable, "-c", "print('from a child')"], check=True)


@pytest.mark.slow
def test_vendors_are_kept_off_the_screen_and_in_the_log(tmp_path: Path):
    """In a process of its own, for the sake of the real descriptors 1 and 2."""
    done = python(
        "import ctypes, os, subprocess, sys, warnings",
        f"os.chdir({str(tmp_path)!r})",
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})",
        "warnings.simplefilter('always')",
        "import quantadapt.pipeline, test_cli",
        "quantadapt.pipeline.run = test_cli.fake_run(test_cli.chatter)",
        "test_cli.cli.main(['run', '--output', 'out'])",
    )
    log = (tmp_path / "out" / "log.txt").read_text()
    for text in (
        "from python",
        "to stderr",
        "to descriptor 1",
        "from C",
        "a vendor's warning",
        "from a child",
    ):
        assert text in log
        assert text not in done.stdout + done.stderr
    assert "report: out/report.html" in done.stdout


def test_our_own_warnings_are_shown(run_cli, pipeline):
    def warn() -> None:
        warnings.warn("another base", quantadapt.BaseMismatchWarning, stacklevel=1)

    pipeline(warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert "note: another base" in run_cli("run", "--output", "out").err


def test_streams_are_as_before_afterwards(run_cli, pipeline):
    pipeline()
    before = sys.stdout, sys.stderr, warnings.showwarning, os.fstat(1), os.fstat(2)
    run_cli("run", "--output", "out")
    after = sys.stdout, sys.stderr, warnings.showwarning, os.fstat(1), os.fstat(2)
    assert [getattr(x, "st_ino", x) for x in before] == [getattr(x, "st_ino", x) for x in after]


def raises(error: BaseException) -> Any:
    def work() -> None:
        raise error

    return work


def test_a_failure_is_a_sentence_and_exit_1(run_cli, pipeline):
    pipeline(raises(TrainingError("the loss is no number", fix="lower the rate")))
    shown = run_cli("run", "--output", "out")
    assert shown.code == 1
    assert shown.err == "Error: the loss is no number\n    fix: lower the rate\n"


def test_a_bug_is_one_line_and_the_log_has_the_traceback(run_cli, pipeline, monkeypatch):
    pipeline(raises(ZeroDivisionError("division by zero")))
    shown = run_cli("run", "--output", "out")
    assert shown.code == 1
    assert "Error: ZeroDivisionError: division by zero" in shown.err
    assert "the traceback is in out/log.txt" in shown.err
    assert "Traceback" not in shown.err
    assert "Traceback" in Path("out/log.txt").read_text()
    monkeypatch.setenv(TRACEBACK, "1")
    assert "Traceback" in run_cli("run", "--output", "out", "--overwrite").err


@pytest.mark.parametrize("distribution", ["others", "quantadapt"])
def test_a_bug_of_a_plugin_names_its_authors(
    distribution, run_cli, pipeline, tmp_path, monkeypatch
):
    """Those of our own are reported to us."""
    others: dict[str, Any] = {"__name__": "others_plugin.backend"}
    code = "def work(*args, **kwargs):\n    return {}['W_q']\n"
    exec(compile(code, "others_plugin/backend.py", "exec"), others)
    provenance = Provenance("theirs", "others_plugin", distribution, "1.0")
    monkeypatch.setitem(registry().plugins, "theirs", provenance)
    pipeline(others["work"])
    shown = run_cli("run", "--output", "out")
    assert shown.code == 1
    theirs = distribution == "others"
    assert ("This was not expected" in shown.err) is not theirs
    assert ("plugin theirs: it failed: KeyError: 'W_q'" in shown.err) is theirs
    assert ("tell its authors (theirs (others 1.0)): others_plugin/backend.py:2" in shown.err) is (
        theirs
    )


def test_ctrl_c_is_one_line_and_130(run_cli, pipeline):
    pipeline(raises(KeyboardInterrupt()))
    shown = run_cli("run", "--output", "out")
    assert (shown.code, shown.err) == (130, "Interrupted.\n")


def test_traceback_flag(run_cli, pipeline, monkeypatch):
    monkeypatch.setenv(TRACEBACK, "")  # so that it is restored afterwards
    pipeline(raises(ZeroDivisionError()))
    assert "Traceback" in run_cli("run", "--output", "out", "--traceback").err


def test_no_temporary_log_is_left_behind(run_cli, tmp_path, monkeypatch):
    logs = tmp_path / "logs"
    logs.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(logs))
    run_cli("backends")
    run_cli("plan", "--backend", "nix")
    assert list(logs.iterdir()) == []


# Lists -------------------------------------------------------------------------------------------


def test_backends(run_cli):
    shown = run_cli("backends")
    assert "half-quadratic quantization" in shown.out
    facts = {backend["name"]: backend for backend in run_cli("backends", "--json").json}
    assert facts["hqq"]["plugin"].startswith("hqq (")
    assert facts["hqq"]["merge"] == "requantize"


def test_a_backend_with_its_options(run_cli):
    shown = run_cli("backends", "show", "hqq")
    assert "1 | 2 | 3 | 4 | 8" in shown.out
    assert "integer >= 8, multiple of 8 | null" in shown.out
    assert "bits per weight" in shown.out
    options = run_cli("backends", "show", "hqq", "--json").json["options"]
    assert options[0]["default"] == 4
    assert "Rules" not in run_cli("backends", "show", "none").out
    assert run_cli("backends", "show", "hqw").code == 2


def test_rules_are_shown_with_reason_and_fix(run_cli):
    out = run_cli("adapters", "show", "lily").out
    assert "lily-no-merge" in out
    assert "fix: keep the adapter beside the base" in out


def test_adapters(run_cli):
    facts = {adapter["name"]: adapter for adapter in run_cli("adapters", "--json").json}
    options = {option["name"]: option for option in facts["dora"]["options"]}
    assert options["use_dora"]["default"] is True
    assert "lora" in run_cli("adapters").out
    assert "Lora attention dimension" in run_cli("adapters", "show", "lora").out


def test_matrix(run_cli):
    shown = run_cli("matrix", "--backend", "hqq", "--adapter", "lora", "--adapter", "glora")
    assert "requant" in shown.out
    assert "glora-not-supported" in shown.out
    cells = run_cli("matrix", "--backend", "hqq", "--adapter", "lora", "--json").json["declared"]
    assert cells[0]["declared"] == "requantize"
    assert run_cli("matrix", "--markdown").out.startswith("### Declared\n")
    assert run_cli("matrix", "--adapter", "loar").code == 2


def test_matrix_shows_verified_results_apart(run_cli):
    generated = {"date": "2026-01-01", "device": "cpu", "versions": {"torch": "2.0"}}
    cell = {"backend": "hqq", "adapter": "lora", "verified": "passed", "merge_error": 1e-7}
    Path("m.json").write_text(json.dumps({"generated": generated, "cells": [cell]}))
    shown = run_cli("matrix", "--backend", "hqq", "--verified", "m.json")
    declared, verified = shown.out.split("Verified, on 2026-01-01, cpu, torch 2.0")
    assert "passed" not in declared
    assert "passed 1e-07" in verified
    Path("m.json").write_text('{"cells": [{"verified": "maybe"}]}')
    shown = run_cli("matrix", "--verified", "m.json")
    assert shown.code == 1
    assert "m.json: not a file of verified results" in shown.err


# Commands of plugins -----------------------------------------------------------------------------


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch):
    def install(**modules: Any) -> None:
        from quantadapt import hookspecs

        manager = pluggy.PluginManager(hookspecs.PROJECT)
        manager.add_hookspecs(hookspecs)
        for name, module in modules.items():
            manager.register(module, name)
        found = SimpleNamespace(manager=manager)
        monkeypatch.setattr("quantadapt.registry.discovery.registry", lambda: found)

    return install


class Greeting:
    @hookimpl
    def quantadapt_commands(self, app: Any) -> None:
        @app.command()
        def greet() -> None:
            """Say hello."""
            print("hello")


class Broken:
    @hookimpl
    def quantadapt_commands(self, app: Any) -> None:
        raise RuntimeError("out of order")


class Exits:
    @hookimpl
    def quantadapt_commands(self, app: Any) -> None:
        raise SystemExit(3)


def test_a_plugin_may_add_commands(run_cli, plugins):
    plugins(greeting=Greeting(), broken=Broken(), exits=Exits())
    shown = run_cli("greet")
    assert (shown.code, shown.out) == (0, "hello\n")
    assert "plugin broken could not add its commands: RuntimeError('out of order')" in shown.err
    assert "plugin exits could not add its commands: SystemExit(3)" in shown.err


def test_plugins_are_left_alone_for_our_own_commands(run_cli, monkeypatch):
    from quantadapt.cli import app

    monkeypatch.setattr(app, "add_plugin_commands", raises(AssertionError("called")))
    assert run_cli("plan").code == 0


# The real thing ----------------------------------------------------------------------------------


def test_run_eval_generate_and_merge_for_real(run_cli):
    quick = [
        "train.per_device_train_batch_size=1",
        "evaluate.max_examples=4",
        "evaluate.samples=0",
        "evaluate.unquantized=false",
    ]
    settings = [part for item in quick for part in ("--set", item)]
    flags = ["--backend", "none", "--max-steps", "2", "--output", "out", "--merge", "never"]
    flags += ["--model", str(small_model()), "--data", few_rows()]
    shown = run_cli("run", *flags, *settings)
    assert shown.code == 0, shown.err
    assert shown.err == ""
    assert Path("out/report.html").exists()
    shown = run_cli("eval", "out", "--max-examples", "2", "--json")
    assert shown.code == 0, shown.err
    assert shown.json["perplexity"] > 1
    shown = run_cli("generate", "out", "--prompt", "def add", "--max-new-tokens", "2")
    assert shown.code == 0, shown.err
    shown = run_cli("merge", "out", "--json")
    assert shown.code == 0, shown.err
    assert shown.json["kl"] < 1e-3
    assert Path("out/merged/model.safetensors").exists()


# Data --------------------------------------------------------------------------------------------


@pytest.fixture
def lossy(tmp_path: Path) -> str:
    """30 examples, of which 10 are longer than 32 tokens and 3 have empty answers."""
    answers = ["word " * 60] * 10 + [""] * 3 + ["fine"] * 17
    rows = [{"prompt": "say [b]\x1b[31m ", "completion": answer} for answer in answers]
    file = tmp_path / "lossy.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_data_shows_what_is_learnt(run_cli, lossy):
    shown = run_cli("data", lossy, "--max-length", "32", "--limit", "1")
    assert shown.code == 0
    lines = [line.rstrip() for line in shown.out.splitlines()]
    count, whole = re.fullmatch(
        r"(\d+) of (\d+) tokens, \d+ of them learnt", lines[0].removeprefix(f"{lossy}:1   ")
    ).groups()
    assert count == "32"
    assert f"  cut    | {int(whole) - 32} more tokens" in lines
    assert lines[1] == r"  given  | <s>say [b]\x1b[31m"
    assert lines[2].startswith("  learnt | word word")
    assert "27 examples" in shown.out
    assert "10 cut to 32 tokens" in shown.out
    assert "3 dropped (3 with an empty answer)" in shown.out
    assert "\x1b" not in shown.out
    assert f"warning: 43% of the examples in {lossy}" in shown.err
    assert "--max-length is 32" in shown.err
    assert "quantadapt data" not in shown.err


def test_data_as_json_gives_tokens_and_masks(run_cli, lossy):
    shown = run_cli("data", lossy, "--max-length", "32", "--limit", "2", "--json")
    first, _ = shown.json["examples"]
    assert first["where"] == f"{lossy}:1"
    lengths = {len(first[key]) for key in ("tokens", "input_ids", "completion_mask")}
    assert lengths == {32}
    assert first["cut"] > 0
    pairs = zip(first["tokens"], first["completion_mask"], strict=True)
    assert "".join(token for token, on in pairs if on).startswith("word word")
    (file,) = shown.json["files"]
    assert (file["rows"], file["cut"], file["dropped"]) == (30, 10, {"with an empty answer": 3})


def test_data_tells_all_lines_that_cannot_be_read(run_cli, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text"\n{"text": "x", "text": "y"}\n')
    shown = run_cli("data", tmp_path / "a.jsonl")
    assert shown.code == 1
    assert "a.jsonl:2: not valid JSON" in shown.err
    assert "a.jsonl:3: not readable as JSON: the key 'text' is there twice" in shown.err


def test_data_reads_columns_of_any_name(run_cli, tmp_path):
    (tmp_path / "a.csv").write_text("q,a\nx,y\n")
    names = ("--column", "prompt=q", "--column", "completion=a")
    assert "prompt-completion, 1 example," in run_cli("data", tmp_path / "a.csv", *names).out
    shown = run_cli("data", tmp_path / "a.csv")
    assert shown.code == 1
    assert "name yours in --column, e.g. --column prompt=question --column compl" in shown.err
    assert "data.columns" not in shown.err
    shown = run_cli("data", tmp_path / "a.csv", "--column", "prompt=who", "--column", "text=a")
    assert "--column names 'who', which is not there" in shown.err
    (tmp_path / "b.jsonl").write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
    fix = "say which columns hold it, e.g. --column prompt=prompt --column completion=chosen"
    assert fix in run_cli("data", tmp_path / "b.jsonl").err
    (tmp_path / "c.jsonl").write_text('{"text": "p", "label": 1}\n')
    assert "set --format text" in run_cli("data", tmp_path / "c.jsonl").err
    assert "data.format" not in run_cli("data", tmp_path / "a.csv", "--format", "odd").err


def test_plan_tells_formats_and_rows(run_cli, lossy, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # the folder's name is long
    assert "prompt-completion, 30 rows" in run_cli("plan", "--data", lossy).out
    assert run_cli("plan", "--data", lossy, "--json").json["data"]["files"][0]["rows"] == 30
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{')
    shown = run_cli("plan", "--data", tmp_path / "bad.jsonl")
    assert shown.code == 2
    assert "bad.jsonl:2" in shown.err


@pytest.mark.slow
def test_a_run_tells_what_became_of_its_data(run_cli, lossy):
    arguments = ("--data", lossy, "--set", "data.max_length=32", "--max-steps", "1")
    small = ("--set", "evaluate.unquantized=false", "--merge", "never", "--output", "out")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        shown = run_cli("run", *arguments, *small)
    assert shown.code == 0, shown.err
    folder = Path("out")
    words = "27 examples (1 of them held out)"
    for text in (shown.out, (folder / "log.txt").read_text()):
        assert words in text
        assert "10 cut to 32 tokens" in text
    warning = f"43% of the examples in {lossy} are cut or dropped"
    assert f"warning: {warning}" in shown.err
    assert warning in (folder / "log.txt").read_text()
    data = json.loads((folder / "metrics.json").read_text())["data"]
    assert data["max_length"] == 32
    assert data["files"][0]["dropped"] == {"with an empty answer": 3}
    page = (folder / "report.html").read_text()
    assert "3 with an empty answer" in page
    assert "10 to 32 tokens" in page

    # What is measured later is cut as the run's data were.
    manifest = json.loads((folder / "adapter" / "quantadapt.json").read_text())
    assert manifest["max_length"] == 32
    from quantadapt.data.reading import load_held_out

    lengths = []
    for path in (folder, folder / "adapter"):
        shown = run_cli("eval", path, "--data", lossy, "--json")
        lengths.append(shown.json["tokens"])
    from transformers import AutoTokenizer

    rows = load_held_out(lossy, AutoTokenizer.from_pretrained(demo.MODEL_DIR), max_length=32)
    assert lengths == [sum(sum(row["completion_mask"][1:]) for row in rows)] * 2
    model = quantadapt.load(folder)
    assert quantadapt.evaluate(model, lossy)["tokens"] == lengths[0]
    assert quantadapt.evaluate(model, lossy, max_length=512)["tokens"] > lengths[0]


# Words and files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", ["60", "80", "120"])
@pytest.mark.parametrize(
    "command",
    [
        *(["backends"], ["adapters"], ["evaluations"], ["exports"], ["objectives"], ["plan"]),
        *(["backends", "show", "hqq"], ["adapters", "show", "lora"], ["matrix"]),
        ["doctor", "--no-imports"],
    ],
    ids=" ".join,
)
def test_no_word_is_broken_in_the_middle(run_cli, monkeypatch, command, width) -> None:
    """Each word of a narrow page is one of the widest."""
    monkeypatch.setenv("COLUMNS", "3000")
    whole = {word.strip("(),") for word in run_cli(*command).out.split()}
    monkeypatch.setenv("COLUMNS", width)
    lines = run_cli(*command).out
    other = {"by"}  # options that do not fit stand one below the other, with "by default"
    broken = {word.strip("(),") for word in lines.split()} - whole - other
    assert broken == set()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_lines_on_a_terminal_end_between_words(monkeypatch, width) -> None:
    """Which would break them where it is full; a path stays in one piece."""
    import io

    from quantadapt.cli import session

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(session, "_width", lambda stream: width)
    monkeypatch.setenv("TERM", "xterm")
    screen, path = Terminal(), "/a/path/" + "that-is-longer-than-the-screen/" * 6
    text = f"note: {'something happened ' * 9}in {path} and was told"
    session._console(screen).print(text, markup=False, soft_wrap=True)
    lines = screen.getvalue().splitlines()
    assert len(lines) > 2
    assert " ".join(" ".join(lines).split()) == text
    assert [line for line in lines if len(line.rstrip()) > width] == [path]


@pytest.mark.parametrize(
    "command", ["plan", "backends", "adapters", "objectives", "evaluations", "matrix", "exports"]
)
def test_no_line_ends_with_blanks(command, run_cli) -> None:
    shown = run_cli(command)
    assert shown.code == 0
    lines = shown.out.splitlines()
    assert len(lines) > 5
    assert [line for line in lines if line != line.rstrip()] == []


@pytest.mark.parametrize("flag", ["--backend", "--adapter", "--objective"])
def test_an_unknown_name_is_answered_with_where_to_look(flag, run_cli, monkeypatch) -> None:
    kind = flag.strip("-")
    error = " ".join(run_cli("plan", flag, "nothing-like-it").err.split())
    assert f"no {kind} is called 'nothing-like-it'" in error
    where = f"`quantadapt {kind}s` lists what is here, `quantadapt doctor` what is installed"
    assert f"; {where}" in error
    near = {"backend": ("hqqq", "hqq"), "adapter": ("lroa", "lora"), "objective": ("stf", "sft")}
    wrong, right = near[kind]
    error = " ".join(run_cli("plan", flag, wrong).err.split())
    assert f"did you mean '{right}'? {where}" in error
    monkeypatch.setenv("QUANTADAPT_PLUGINS", "hqq")
    assert "; QUANTADAPT_PLUGINS loads hqq alone" in run_cli("plan", flag, "nothing-like-it").err


def test_no_log_is_left_in_the_temporary_folder(capsys, tmp_path, monkeypatch) -> None:
    import tempfile

    from quantadapt.cli.session import session

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv(TRACEBACK, raising=False)

    def ends_with(error: BaseException) -> str:
        def work() -> None:
            with session():
                os.write(2, b"what a vendor prints\n")
                assert list(tmp_path.iterdir()) == []  # also while it runs: it may be killed
                raise error

        with pytest.raises(SystemExit):
            work()
        return capsys.readouterr().err

    for quiet in (SystemExit(1), KeyboardInterrupt(), PlanRefused([])):
        ends_with(quiet)
        assert list(tmp_path.iterdir()) == []
    told = ends_with(RuntimeError("a bug"))
    (log,) = tmp_path.iterdir()
    assert f"the traceback is in {log}" in told
    assert log.read_text().startswith("what a vendor prints")
    assert "RuntimeError: a bug" in log.read_text()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_for_temporary_files_is_told_in_words(number, monkeypatch, capsys) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), "/full")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(SystemExit) as end:
        cli.main(["plan"])
    told = capsys.readouterr().err
    assert end.value.code == 1
    assert "/full: the disk is full" in told
    assert "not expected" not in told
