"""Resuming: the run that was not interrupted, bit by bit, or a refusal in a sentence."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

import quantadapt as qa
from quantadapt.distributed import World
from quantadapt.errors import (
    EXIT_OUT_OF_TIME,
    Interrupted,
    OutputError,
    PlanRefused,
    TrainingError,
)
from quantadapt.folders.checkpoints import last_whole
from quantadapt.folders.run_folder import RunFolder
from quantadapt.folders.written import LIST, write_list
from quantadapt.planning import resuming
from quantadapt.spec import Spec
from quantadapt.training import stopping
from quantadapt.training.stopping import Stop

OPTIONS = {
    "max_steps": 6,
    "save_steps": 2,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "seed": 3,
}


def adapted(adapter: str = "lora", **options: Any) -> Any:
    """A random model of two layers, all of whose linear layers are adapted."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = qa.quantize(LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, **heads)), "none")
    torch.manual_seed(1)
    return qa.attach(model, adapter, target_modules="all-linear", **options)


@pytest.fixture
def trained(tokenizer: Any, random_data: Dataset, tmp_path: Path) -> Any:
    """Train a new model into a folder; return (result, trained weights)."""

    def train(folder: str, adapter: str = "lora", data: Any = None, **options: Any) -> Any:
        model = adapted(adapter)
        given = {"output": tmp_path / folder, "tokenizer": tokenizer, **OPTIONS, **options}
        result = qa.train(model, random_data if data is None else data, **given)
        return result, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    return train


class Killed(BaseException):
    pass


def until(step: int) -> Any:
    def on_log(entry: dict[str, Any]) -> None:
        if entry["step"] >= step:
            raise Killed

    return on_log


def same(one: Any, other: Any) -> None:
    """Losses and weights are the same bit by bit."""
    assert one[0].losses == other[0].losses
    assert all(torch.equal(weight, other[1][name]) for name, weight in one[1].items())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adapter": "dora"},
        pytest.param({"adapter": "vera"}, marks=pytest.mark.slow),
        {"gradient_accumulation_steps": 3},
        {"logging_steps": 4, "save_steps": 3, "max_steps": 8},
        pytest.param({"optim": "adafactor"}, marks=pytest.mark.slow),
        {"packing": True},
        {"max_steps": -1, "num_train_epochs": 0.3},
    ],
    ids=str,
)
def test_a_resumed_run_is_the_one_that_was_not_interrupted(trained: Any, options: Any) -> None:
    whole = trained("whole", **options)
    with pytest.raises(Killed):
        trained("parts", on_log=until(4), **options)
    resumed = trained("parts", resume=True, **options)
    assert 0 < resumed[0].resumed_from < resumed[0].steps == whole[0].steps
    same(whole, resumed)


@pytest.mark.parametrize("key", ["max_steps", "num_train_epochs"])
def test_more_steps_go_on(trained: Any, key: str) -> None:
    """With a constant rate, as if it had been the longer run from the beginning."""
    few, many = {"max_steps": (4, 6), "num_train_epochs": (0.25, 0.375)}[key]
    options = {"max_steps": -1, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    whole = trained("whole", **options | {key: many})
    first = trained("parts", **options | {key: few})
    assert first[0].steps == 4
    longer = trained("parts", **options | {key: many}, resume=True)
    assert (longer[0].resumed_from, longer[0].steps) == (4, 6)
    same(whole, longer)


def test_more_steps_have_the_rates_of_the_longer_schedule(trained: Any) -> None:
    """At the end of a linear schedule the rate is 0; the longer one's is not."""
    rates: dict[int, float] = {}

    def on_log(entry: dict[str, Any]) -> None:
        rates[entry["step"]] = entry["learning_rate"]

    options = {"lr_scheduler_type": "linear", "warmup_ratio": 0.0}
    trained("run", max_steps=4, **options)
    trained("run", max_steps=8, resume=True, on_log=on_log, **options)
    assert rates == {step: pytest.approx(1e-2 * (9 - step) / 8) for step in range(5, 9)}


@pytest.mark.parametrize(
    "options", [{"max_steps": 3}, {"max_steps": -1, "num_train_epochs": 0.1}], ids=str
)
def test_fewer_steps_than_were_done_are_refused(trained: Any, options: Any) -> None:
    trained("run")
    with pytest.raises(TrainingError, match=r"less than what checkpoint-6 has done: .*\n +fix"):
        trained("run", resume=True, **options)


def test_a_run_that_goes_on_says_where(trained: Any) -> None:
    notes = list[str]()
    trained("run", max_steps=4)
    trained("run", max_steps=8, resume=True, on_note=notes.append)
    assert [note for note in notes if "step 4" in note] == ["training goes on after step 4"]


def test_a_run_that_was_over_says_so(trained: Any) -> None:
    first, notes = trained("run"), list[str]()
    again = trained("run", resume=True, on_note=notes.append)
    same(first, again)
    assert "all 6 steps had been done: nothing was trained" in notes


def test_intervals_are_those_of_the_spec_that_resumes(trained: Any, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        trained("run", on_log=until(3))
    trained("run", resume=True, save_steps=5)
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"checkpoint-2", "checkpoint-5", "checkpoint-6"}


def test_other_data_are_refused(trained: Any, random_data: Dataset) -> None:
    trained("run", max_steps=2)
    with pytest.raises(TrainingError, match="32 examples then, 31 now"):
        trained("run", resume=True, data=random_data.select(range(31)))


FILES = [
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "quantadapt-checkpoint.json",
    "quantadapt-files.json",
]


def lose(file: Path) -> None:
    file.unlink()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def flip(file: Path) -> None:
    contents = bytearray(file.read_bytes())
    contents[len(contents) // 2] ^= 1
    file.write_bytes(contents)


@pytest.fixture(scope="module")
def interrupted(tokenizer: Any, random_data: Dataset, tmp_path_factory: Any) -> Any:
    """A run that ended after step 5, and the whole run."""
    folder = tmp_path_factory.mktemp("interrupted")
    given = {"tokenizer": tokenizer, **OPTIONS}
    whole = qa.train(adapted(), random_data, output=folder / "whole", **given)
    with pytest.raises(Killed):
        qa.train(adapted(), random_data, output=folder / "run", on_log=until(5), **given)
    return folder / "run", whole


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", [lose, cut, flip])
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_taken(
    interrupted: Any, tmp_path: Path, name: str, harm: Any
) -> None:
    run = shutil.copytree(interrupted[0], tmp_path / "run")
    harm(run / "checkpoints" / "checkpoint-4" / name)
    found = last_whole(run)
    assert found is not None
    assert found.step == 2
    (told,) = found.skipped
    assert re.match(r"checkpoint-4 is damaged: ", told)
    if name != "quantadapt-files.json":
        assert name in told


class Runs:
    """What a pickle runs where it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt"])
def test_a_checkpoint_that_somebody_made_up_runs_nothing(
    interrupted: Any, trained: Any, tmp_path: Path, name: str
) -> None:
    run = shutil.copytree(interrupted[0], tmp_path / "run")
    checkpoint = run / "checkpoints" / "checkpoint-4"
    torch.save({"a": Runs(tmp_path / "ran")}, checkpoint / name)
    (checkpoint / LIST).unlink()
    write_list(checkpoint, checksums=True)  # so it is whole
    with pytest.raises(TrainingError, match="cannot be taken up"):
        trained("run", resume=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "text", ['{"global_step": 4}', '{"global_step": NaN}', "{}", "[" * 100_000]
)
def test_a_state_that_is_none_is_damage(interrupted: Any, tmp_path: Path, text: str) -> None:
    run = shutil.copytree(interrupted[0], tmp_path / "run")
    checkpoint = run / "checkpoints" / "checkpoint-4"
    (checkpoint / "trainer_state.json").write_text(text)
    (checkpoint / LIST).unlink()
    write_list(checkpoint, checksums=True)
    found = last_whole(run)
    assert found is not None
    assert (found.step, len(found.skipped)) == (2, 1)
    assert "trainer_state.json" in found.skipped[0]


@pytest.mark.parametrize(("name", "harm"), [("optimizer.pt", lose), ("rng_state.pth", flip)])
def test_from_the_one_before_the_losses_are_the_same(
    interrupted: Any, trained: Any, tmp_path: Path, name: str, harm: Any
) -> None:
    run, notes = shutil.copytree(interrupted[0], tmp_path / "run"), list[str]()
    harm(run / "checkpoints" / "checkpoint-4" / name)
    resumed, _ = trained("run", resume=True, on_note=notes.append)
    assert resumed.resumed_from == 2
    assert resumed.losses == interrupted[1].losses
    assert any("checkpoint-4 is damaged" in n and "going on from checkpoint-2" in n for n in notes)
    last = last_whole(run)
    assert (last.step, last.skipped) == (6, ())


def test_without_a_whole_checkpoint_it_is_refused(interrupted: Any, tmp_path: Path) -> None:
    run = shutil.copytree(interrupted[0], tmp_path / "run")
    for checkpoint in (run / "checkpoints").iterdir():
        lose(checkpoint / "optimizer.pt")
    with pytest.raises(OutputError, match=r"checkpoint-4 .* checkpoint-2 (.|\n)*fix: .*step 0"):
        last_whole(run)


# Ending early ------------------------------------------------------------------------------------


def test_when_the_time_is_over_there_is_a_checkpoint(
    interrupted: Any, trained: Any, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted, match=r"max_time.*after step 1 of 6; checkpoint-1 ") as caught:
        trained("run", max_time=1e-6, save_steps=None)
    assert caught.value.exit_code == EXIT_OUT_OF_TIME
    resumed, _ = trained("run", resume=True)
    assert resumed.resumed_from == 1
    assert resumed.losses == interrupted[1].losses


def test_a_signal_waits_for_the_step_and_outside_of_training_it_does_not() -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        own = signal.signal(number, signal.SIG_DFL)  # under nohup, SIGHUP is ignored
        with Stop().listening() as stop:
            stop.hold()
            signal.raise_signal(number)
            assert stop.due(1, 1, None)
            assert stop.error(1, 2).exit_code == 128 + number
            with pytest.raises(Interrupted, match=f"by {number.name}") as caught:
                stop.obey()
            assert caught.value.exit_code == 128 + number
            signal.raise_signal(number)  # once is enough
        with Stop().listening() as stop:
            stop.hold()
            stop.obey()
            with pytest.raises(Interrupted):
                signal.raise_signal(number)
        assert signal.getsignal(number) is signal.SIG_DFL
        signal.signal(number, own)


def test_all_processes_end_where_one_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the others say: two processes, of which the other one has got SIGTERM."""
    monkeypatch.setattr(stopping, "world", lambda: World(size=2))
    monkeypatch.setattr(stopping, "reduced", lambda value, *_: max(value, 128.0 + signal.SIGTERM))
    stop = Stop(1e-9)
    stop.hold()
    assert not stop.due(1, 2, None)  # they talk at each second step
    assert stop.due(2, 2, None)
    assert stop.error(2, 9).exit_code == 128 + signal.SIGTERM
    assert str(stop.error(2, 9)).startswith("by SIGTERM after step 2 of 9; checkpoint-2 is saved")
    with pytest.raises(Interrupted, match="by SIGTERM"):
        stop.obey("cpu")
    stop.obey()  # asked alone, nobody has told this one


def test_a_forked_worker_just_ends() -> None:
    with Stop().listening() as stop:
        stop.hold()
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM
        assert not stop.due(1, 1, None)


def test_somebody_elses_handler_stays() -> None:
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        with Stop().listening() as stop:
            signal.raise_signal(signal.SIGTERM)
        assert seen == [1]
        assert not stop.due(1, 1, None)
    finally:
        signal.signal(signal.SIGTERM, before)


# The command line --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: Any) -> Path:
    from quantadapt.testing.small_demo import small_model

    folder = tmp_path_factory.mktemp("small")
    rows = ({"text": f"Line {i}. " * (1 + i % 3)} for i in range(12))
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(small_model(), folder / "model")
    return folder


def spec_of(small: Path, output: Path, train: Any = None, **values: Any) -> Spec:
    first = {
        "model": str(small / "model"),
        "backend": "none",
        "adapter": {"name": "lora", "r": 2},
        "data": {"path": str(small / "data.jsonl"), "max_length": 16},
        "evaluate": {"evaluations": [], "samples": 0, "unquantized": False},
        "export": {"merge": "never"},
        "device": "cpu",
        "output": str(output),
    }
    steps = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2}
    return Spec(**first | values, train=steps | (train or {}))


@pytest.fixture(scope="module")
def finished(small: Path, tmp_path_factory: Any) -> Path:
    output = tmp_path_factory.mktemp("runs") / "run"
    qa.run(spec_of(small, output))
    return output


ROWS: dict[str, Any] = {
    "pairs": lambda i: {"prompt": f"{i}?", "chosen": "yes " * (1 + i % 3), "rejected": "no"},
    "labels": lambda i: {"text": f"Line {i}. " * (1 + i % 3), "label": "ab"[i % 2]},
    "words": lambda i: {"tokens": ["one", "two"][: 1 + i % 2], "ner_tags": ["A", "B"][: 1 + i % 2]},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "rows"),
    [
        *((name, "pairs") for name in ("dpo", "orpo", "simpo", "reward")),
        *(("classify", "labels"), ("classify-tokens", "words")),
    ],
)
def test_each_objective_goes_on_bit_by_bit_and_stops_at_what_is_no_number(
    objective: str, rows: str, small: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(ROWS[rows](i)) + "\n" for i in range(12)))
    values = {"objective": objective, "data": {"path": str(data), "max_length": 16}}
    train = {"learning_rate": 1e-2, "logging_steps": 1}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    qa.run(spec_of(small, whole, train, **values))
    shutil.copytree(whole, cut)  # and what a kill before the last checkpoint would leave
    for name in ("adapter", "checkpoints/checkpoint-4"):
        shutil.rmtree(cut / name)
    RunFolder(cut).set_state("running")
    result = qa.run(spec_of(small, cut, {**train, "resume": True}, **values))
    assert result.metrics["train"]["steps"] == 4
    losses = [{m["step"]: m["loss"] for m in RunFolder(f).read_metrics()} for f in (whole, cut)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
    weights = [(f / "adapter" / "adapter_model.safetensors").read_bytes() for f in (whole, cut)]
    assert weights[0] == weights[1]
    with pytest.raises(TrainingError, match="no number any more at step"):
        qa.run(spec_of(small, tmp_path / "nan", {**train, "learning_rate": 1e30}, **values))
    assert RunFolder(tmp_path / "nan").marker["state"] == "failed"


def test_every_key_of_the_spec_has_its_row() -> None:
    keys = set(resuming.keys_of(Spec))
    named = resuming.KEPT | resuming.UNUSED | resuming.LONGER | resuming.NOT_KEPT
    assert named <= keys
    assert {"backend", "train.max_steps", "data.columns", "export.merge"} <= keys
    pages = Path(__file__).parent.parent / "docs" / "reference" / "resuming.md"
    page = pages.read_text(encoding="utf-8")
    assert all(f"`{key}`" in page for key in keys)


OTHER: dict[str, Any] = {
    "model": "other",
    "seed": 5,
    "dtype": "bfloat16",
    "skip_modules": ["lm_head", "q_proj"],
    "skip_misfits": True,
    "towers": ["vision"],
    "data.image_folder": "pictures",
    "data.max_pixels": 4096,
    "data.path": "other.jsonl",
    "data.eval_path": "other.jsonl",
    "data.eval_fraction": 0.3,
    "data.format": "text",
    "data.columns": {"text": "text"},
    "new_modules": ["lm_head"],
    "unused_modules": ["model.layers.9"],
    "data.sources": ["other.jsonl"],
    "data.eval_examples": 1,
    "data.split_seed": 5,
    "data.max_length": 24,
    "data.max_examples": 4,
    "train.learning_rate": 1e-3,
    "train.lr_scheduler_type": "linear",
    "train.lr_scheduler_kwargs": {"num_cycles": 0.25},
    "train.warmup_ratio": 0.5,
    "train.weight_decay": 0.1,
    "train.optim": "adamw_torch",
    "train.packing": True,
    "train.merge_aware": True,
    "train.per_device_train_batch_size": 3,
    "train.gradient_accumulation_steps": 2,
    "train.compute": "fp8",
    "train.context_parallel_size": 2,
}


def test_what_must_not_change_is_refused(small: Path, finished: Path) -> None:
    assert OTHER.keys() == resuming.KEPT
    for name in ("model", "data.path", "data.eval_path"):
        OTHER[name] = str(small / OTHER[name])
    shutil.copytree(small / "model", small / "other", dirs_exist_ok=True)
    shutil.copy(small / "data.jsonl", small / "other.jsonl")
    for key, value in OTHER.items():
        values = spec_of(small, finished, {"resume": True}).model_dump(exclude_none=True)
        section, _, name = key.rpartition(".")
        (values[section] if section else values)[name] = value
        with pytest.raises(PlanRefused) as caught:
            qa.plan(Spec(**values))
        assert key in {problem.where for problem in caught.value.problems}, key


def test_what_may_change_is_not_refused(small: Path, finished: Path) -> None:
    train = {"resume": True, "max_steps": 9, "save_steps": 3, "max_grad_norm": 0.5}
    spec = spec_of(small, finished, train, evaluate={"samples": 1})
    assert qa.plan(spec).spec.train.max_steps == 9
    with pytest.raises(PlanRefused, match="less than what checkpoint-4 has done"):
        qa.plan(spec_of(small, finished, {"resume": True, "max_steps": 3}))


def test_what_has_no_effect_is_told_and_not_written_down(small: Path, finished: Path) -> None:
    data = {"path": str(small / "data.jsonl"), "max_length": 16, "calibration_examples": 7}
    made = qa.plan(spec_of(small, finished, {"resume": True}, data=data))
    assert any("data.calibration_examples has no effect" in note for note in made.notes)
    assert made.spec.data.calibration_examples == 128


def test_a_run_with_more_steps_goes_on(small: Path, finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    result = qa.run(spec_of(small, run, {"resume": True, "max_steps": 6}))
    assert (result.metrics["train"]["resumed_from"], result.metrics["train"]["steps"]) == (4, 6)
    assert yaml.safe_load((run / "spec.yaml").read_text())["train"]["max_steps"] == 6


@pytest.mark.parametrize("lost", [("spec.yaml", "plan.json"), ("plan.json",)], ids=str)
def test_a_run_that_ended_between_its_first_files_is_resumed(
    small: Path, tmp_path: Path, lost: Any
) -> None:
    run = tmp_path / "run"
    with RunFolder.create(run) as folder:
        if "spec.yaml" not in lost:
            made = qa.plan(spec_of(small, run), check_output=False)
            folder.write_text("spec.yaml", made.spec.to_yaml())
    assert qa.run(spec_of(small, run, {"resume": True})).metrics["train"]["steps"] == 4


def test_a_trained_adapter_that_somebody_changed_is_refused_before_any_work(
    small: Path, finished: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "adapter" / "notes.txt").write_text("mine")
    with pytest.raises(PlanRefused, match=r"notes\.txt"):
        qa.plan(spec_of(small, run, {"resume": True, "max_steps": 6}))


@pytest.mark.slow
def test_sigterm_ends_a_run_as_interrupted_with_its_code(small: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    spec = spec_of(small, run, {"max_steps": 100000, "save_steps": None, "logging_steps": 1})
    (tmp_path / "spec.yaml").write_text(spec.to_yaml())
    command = [sys.executable, "-m", "quantadapt", "run", str(tmp_path / "spec.yaml")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    metrics = run / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, text = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, text.decode()
    assert b"Interrupted by SIGTERM after step" in text
    assert RunFolder.open(run).marker["state"] == "interrupted"
    last = last_whole(run)
    assert f"checkpoint-{last.step} is saved" in text.decode()
    assert json.loads((last.path / "trainer_state.json").read_text())["max_steps"] == 100000
