"""Bases that several runs have in common: made once, the same to the bit, and told in the table."""

import errno
import json
import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from few_rows import few_rows
from safetensors.torch import load_file, save_file
from test_comparing import Events, go, states

import quantadapt as qa
from quantadapt.comparing import processes
from quantadapt.comparing.bases import Bases, Disk, disk_of, groups_of
from quantadapt.comparing.folder import CompareFolder
from quantadapt.comparing.grid import comparison
from quantadapt.comparing.planned import plan_cells
from quantadapt.comparing.processes import Job
from quantadapt.comparing.stage import look_at
from quantadapt.errors import ModelError, PlanRefused, QuantadaptError
from quantadapt.exporting.saving import take_base
from quantadapt.folders.written import LIST
from quantadapt.inputs.fingerprints import fingerprint_of
from quantadapt.paths import MANIFEST
from quantadapt.planning.reusing import base_in, difference, making_of, settings_of
from quantadapt.quantizing.making import digest_of
from quantadapt.spec import Spec, apply_overrides
from quantadapt.testing.small_demo import small_model

STEPS = {"train": {"max_steps": 90, "learning_rate": 3e-4}}
ADAPTERS = {"backend": ["gptq"], "adapter": ["lora", "dora", "vera"]}


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch) -> None:
    monkeypatch.setattr(processes, "POLL", 0.01)


# A run that takes the base of another -------------------------------------------------------------


def told(output: Path, adapter: str, **more: Any) -> Spec:
    common = {
        "model": str(small_model()),
        "backend": {"name": "gptq", "group_size": 32},
        "adapter": adapter,
        "data": {"path": few_rows(), "calibration_examples": 6},
        "train": {"max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1},
        "evaluate": {"max_examples": 6, "samples": 0, "unquantized": False},
        "export": {"merge": "requantize", "rounding": "dithered", "min_gain": 0.0},
        "device": "cpu",
    }
    return Spec(**{**common, "output": str(output), **more})


def losses(run: qa.RunResult) -> list[float]:
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def weights(run: qa.RunResult) -> bytes:
    return (run.folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def maker(tmp_path_factory) -> qa.RunResult:
    return qa.run(told(tmp_path_factory.mktemp("maker") / "lora", "lora"), verbose=False)


def test_its_numbers_are_those_of_a_run_alone(maker, tmp_path) -> None:
    """To the bit: losses, figures, the merge that is measured from disk, the adapter."""
    alone = qa.run(told(tmp_path / "alone", "ia3"), verbose=False)
    notes: list[str] = []
    took = qa.run(
        told(tmp_path / "took", "ia3", reuse_base=str(maker.folder)),
        listener=lambda event, data: notes.append(data.get("text", "")),
    )
    assert losses(took) == losses(alone)
    assert len(set(losses(took))) == 3
    for part in ("evaluations", "merge", "size"):
        assert took.metrics[part] == alone.metrics[part]
    assert {"quantized", "tuned", "merged"} <= set(
        took.metrics["evaluations"]["perplexity"]["loss"]["values"]
    )
    assert weights(took) == weights(alone)
    ids, runs = torch.arange(40)[None] + 100, (took, alone)
    told_of = [(each.folder / "adapter" / "adapter_config.json").read_text() for each in runs]
    assert told_of[0] == told_of[1]  # the base that it is for, too
    kept = [json.loads((each.folder / "adapter" / MANIFEST).read_text()) for each in runs]
    assert [key for key in kept[0] if kept[0][key] != kept[1][key]] == ["base_id"]
    with torch.no_grad():
        logits = [qa.load(each.folder).eval()(input_ids=ids).logits for each in (took, alone)]
    assert torch.equal(*logits)

    names = [each.folder / "base" / "model.safetensors" for each in (maker, took)]
    assert os.path.samefile(*names)  # it is there once
    spent = took.metrics["quantize"]
    assert spent["taken_from"] == str(maker.folder)
    assert alone.metrics["quantize"]["taken_from"] == ""
    assert spent["seconds"] == maker.metrics["quantize"]["seconds"] > 0
    assert took.metrics["stages"]["quantize"] < spent["seconds"]
    assert any(note.startswith(f"the base is taken from {maker.folder}") for note in notes)
    third = qa.run(told(tmp_path / "third", "vera", reuse_base=str(took.folder)), verbose=False)
    assert third.metrics["quantize"] == spent  # whoever it was handed on by
    again = Spec.load(took.folder / "spec.yaml")
    assert again.reuse_base is None  # what it is told runs without the other folder
    assert (took.folder / "spec.yaml").read_text() == (
        alone.folder / "spec.yaml"
    ).read_text().replace(str(alone.folder), str(took.folder))
    assert f"calibrated in {maker.folder}" in (took.folder / "report.html").read_text()


def copied(base: Path, to: Path) -> Path:
    """Return a copy of a run's base in a run folder of its own."""
    shutil.copytree(base, to / "base")
    return to / "base"


def notes_of(spec: Spec) -> tuple[qa.RunResult, str]:
    notes: list[str] = []
    run = qa.run(spec, listener=lambda event, data: notes.append(data.get("text", "")))
    return run, "\n".join(notes)


def test_a_model_that_was_changed_in_place_is_another_one(maker, tmp_path) -> None:
    """Beyond what a fingerprint looks at: 600 numbers in. Its losses are those of the new one."""
    model = tmp_path / "model"
    shutil.copytree(small_model(), model)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"].view(-1)[600:] *= 3
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint_of(str(model)) == fingerprint_of(str(small_model()))
    spec = told(tmp_path / "took", "ia3", model=str(model), reuse_base=str(maker.folder))
    took, notes = notes_of(spec)
    assert "quantizes its own: it was made from another model" in notes
    alone = qa.run(told(tmp_path / "alone", "ia3", model=str(model)), verbose=False)
    assert losses(took) == losses(alone)
    assert took.metrics["evaluations"] == alone.metrics["evaluations"]


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "modeling_own.py"])
def test_whatever_of_a_checkpoint_comes_into_a_base_tells_it_apart(name, tmp_path) -> None:
    """A config that computes the same, the tokenizer that lies in the base, and code."""
    model = tmp_path / "model"
    shutil.copytree(small_model(), model)
    before = digest_of(str(model))
    (model / "README.md").write_text("of no account")
    assert digest_of(str(model)) == before != ""
    with (model / name).open("a") as file:
        file.write(" \n")
    assert digest_of(str(model)) not in ("", before)
    assert digest_of(str(tmp_path)) == ""  # and that is like no other:
    assert difference({"model": ""}, {"model": ""}) == "it was made from another model"


def test_one_that_is_being_deleted_is_not_taken(maker, tmp_path) -> None:
    base = copied(maker.folder / "base", tmp_path / "half")
    (base / "model.safetensors").unlink()
    took, notes = notes_of(told(tmp_path / "took", "lora", reuse_base=str(base.parent)))
    assert "quantizes its own: model.safetensors is not there any more" in notes
    assert took.metrics["quantize"]["taken_from"] == ""
    assert losses(took) == losses(maker)
    (base / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(ModelError, match=r"model\.safetensors is not as it was written"):
        take_base(base, tmp_path / "other" / "base", "half", "model")
    assert not (tmp_path / "other" / "base").exists()


def altered(base: Path) -> None:
    """Change the last byte of its weights; size and time stay."""
    file = base / "model.safetensors"
    before, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_one_that_was_altered_at_the_same_size_is_not_taken(maker, tmp_path) -> None:
    base = copied(maker.folder / "base", tmp_path / "one")
    take_base(base, tmp_path / "two" / "base", str(base.parent), "model")  # and from there
    altered(base)
    for place in ("one", "two"):  # which is a second name of the same file
        with pytest.raises(ModelError, match=r"model\.safetensors is not as it was written"):
            take_base(tmp_path / place / "base", tmp_path / "other", place, "model")
    took, notes = notes_of(told(tmp_path / "took", "lora", reuse_base=str(base.parent)))
    assert "quantizes its own: model.safetensors is not as it was written" in notes
    assert losses(took) == losses(maker)


def test_a_list_without_checksums_tells_by_sizes(maker, tmp_path) -> None:
    """As bases of before have it."""
    base = copied(maker.folder / "base", tmp_path / "old")
    listed = json.loads((base / LIST).read_text())
    for facts in listed["files"].values():
        del facts["sha256"]
    (base / LIST).write_text(json.dumps(listed))
    take_base(base, tmp_path / "new" / "base", str(base.parent), "model")
    with (base / "model.safetensors").open("ab") as file:
        file.write(b" ")
    with pytest.raises(ModelError, match=r"model\.safetensors is not as it was written"):
        take_base(base, tmp_path / "other", str(base.parent), "model")


def test_a_run_does_not_go_on_upon_an_altered_base(tmp_path) -> None:
    train = {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2}
    spec = told(tmp_path / "run", "lora", train=train)
    run = qa.run(spec, verbose=False)
    more = spec.model_copy(update={"train": spec.train.model_copy(
        update={"max_steps": 3, "resume": True})})  # fmt: skip
    altered(run.folder / "base")
    with pytest.raises(ModelError, match=r"model\.safetensors is not as it was written") as error:
        qa.run(more, verbose=False)
    assert "put it back as it was" in error.value.problems[0].fix
    altered(run.folder / "base")  # back again
    assert qa.run(more, verbose=False).metrics["train"]["steps"] == 3


def test_a_base_is_handed_on_as_it_lies_there(maker, tmp_path, monkeypatch) -> None:
    """Files that somebody made read-only stay so, as they are his, too; elsewhere they are copied.
    It is said to be of the model as the run that takes it calls that."""
    base = copied(maker.folder / "base", tmp_path / "one")
    (base / "model.safetensors").chmod(0o440)
    take_base(base, tmp_path / "two" / "base", str(base.parent), "a/copy")
    there = tmp_path / "two" / "base"
    assert os.path.samefile(base / "model.safetensors", there / "model.safetensors")
    assert stat.S_IMODE((base / "model.safetensors").stat().st_mode) == 0o440
    assert json.loads((there / MANIFEST).read_text())["base"] == "a/copy"
    assert json.loads((base / MANIFEST).read_text())["base"] == str(small_model())

    def on_another_disk(*_: Any, **__: Any) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", on_another_disk)
    take_base(base, tmp_path / "three" / "base", str(base.parent), "a/copy")
    far = tmp_path / "three" / "base" / "model.safetensors"
    assert far.read_bytes() == (base / "model.safetensors").read_bytes()
    assert far.stat().st_nlink == 1
    assert far.stat().st_mode & 0o600 == 0o600


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"seconds": float("inf")}, "seconds should be a finite number, not Infinity"),
        ({"of": {"backend": "x" * 1000}}, r"with backend 'x{49}\.\.\., and this run has 'gptq'"),
    ],
)
def test_a_note_from_elsewhere_is_told_in_short(values, what, maker, tmp_path) -> None:
    base = copied(maker.folder / "base", tmp_path / "odd")
    noted = json.loads((base / MANIFEST).read_text())
    noted["making"] |= values
    (base / MANIFEST).write_text(json.dumps(noted))
    with pytest.raises(PlanRefused, match=what):
        qa.plan(told(tmp_path / "run", "lora", reuse_base=str(base.parent)))


def test_of_another_version_it_is_another(maker, tmp_path) -> None:
    base = copied(maker.folder / "base", tmp_path / "old")
    values = json.loads((base / MANIFEST).read_text())
    values["making"]["of"]["the version of gptqmodel"] = "1.0"
    (base / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(
        PlanRefused, match=r"made with the version of gptqmodel '1\.0', and this run"
    ):
        qa.plan(told(tmp_path / "run", "lora", reuse_base=str(base.parent)))


def test_another_base_is_not_taken(maker, tmp_path) -> None:
    """One of other examples: that shows once the data are read, and costs time alone."""
    notes: list[str] = []
    took = qa.run(
        told(tmp_path / "took", "lora", reuse_base=str(maker.folder), seed=1),
        listener=lambda event, data: notes.append(data.get("text", "")),
    )
    assert any("is not taken, and this run quantizes its own" in note for note in notes)
    assert any("calibrated on other examples" in note for note in notes)
    of = [making_of(each.folder / "base").of for each in (maker, took)]
    assert [key for key in of[0] if of[0][key] != of[1][key]] == ["examples"]
    assert took.metrics["quantize"]["taken_from"] == ""


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"backend": {"name": "gptq", "group_size": 64}}, "with backend.group_size 32, and this"),
        ({"backend": "awq"}, "with backend 'gptq', and this run has 'awq'"),
        ({"dtype": "bfloat16"}, "with dtype 'float32', and this run has 'bfloat16'"),
        ({"skip_modules": ["k_proj"]}, r"with skip_modules None, and this run has \['k_proj'\]"),
        ({"reuse_base": "nowhere"}, "there is no base of a run in nowhere"),
        ({"reuse_base": "half"}, "there is no base of a run in half"),
        ({"reuse_base": "other"}, "nothing tells what the base in other was calibrated on"),
    ],
)
def test_what_cannot_be_the_same_is_refused_by_the_plan(
    more, what, maker, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "half" / ".base.01234567.tmp").mkdir(parents=True)
    (tmp_path / "half" / ".base.01234567.tmp" / "quantadapt.json").write_text("{}")
    (tmp_path / "other" / "base").mkdir(parents=True)
    (tmp_path / "other" / "base" / "quantadapt.json").write_text("{}")
    with pytest.raises(PlanRefused, match=what) as caught:
        qa.plan(told(tmp_path / "run", "lora", **{"reuse_base": str(maker.folder), **more}))
    assert {problem.where for problem in caught.value.problems} == {"reuse_base"}


def test_where_nothing_is_calibrated_it_has_no_effect_and_says_so(maker, tmp_path) -> None:
    made = qa.plan(told(tmp_path / "run", "lora", backend="hqq", reuse_base=str(maker.folder)))
    assert "reuse_base has no effect: this backend needs no data" in made.notes


def test_a_head_that_began_at_random_is_trained_on_a_base_from_disk(tmp_path) -> None:
    """What is new is known of a base that was saved: a resumed run, or one that took it, would
    leave it as it began."""
    from quantadapt.exporting.loading import load_base
    from quantadapt.exporting.saving import save_base
    from quantadapt.quantizing.state import state_of

    model = qa.quantize(
        str(small_model()), "hqq", device="cpu", head="sequence", labels=["bad", "good"]
    )
    save_base(model, state_of(model), tmp_path / "base")
    loaded = load_base(tmp_path / "base", "cpu")
    for name in ("head", "labels", "begun_at_random", "new_modules", "skip_modules"):
        assert getattr(state_of(loaded), name) == getattr(state_of(model), name)
    assert state_of(loaded).begun_at_random == ("score",)
    assert torch.equal(loaded.score.weight, model.score.weight)


# Who makes it, and who waits ----------------------------------------------------------------------


def makers(out: Path) -> list[str]:
    """Return the runs that made their base."""
    bases = sorted((out / "runs").glob("*/base"))
    return [base.parent.name for base in bases if not making_of(base).taken_from]


def test_runs_of_one_base_are_those_that_quantizing_cannot_tell_apart() -> None:
    grid = {
        "backend": ["gptq", {"name": "gptq", "bits": 3}, "hqq"],
        "adapter": ["lora", "ia3"],
        "train.learning_rate": [1e-4, 2e-4],
        "skip_modules": [["q_proj"], ["k_proj"]],
    }
    made = comparison({}, grid, seeds=2, reference=False)
    cells = {each.cell.label: each for each in plan_cells(made, Path("nowhere"))}
    groups = groups_of(made.runs, cells)
    # By bits, layers and seeds, which choose what is shown; adapters and rates are none of it.
    assert [len(group) for group in groups] == [4] * (2 * 2 * 2)
    assert all(run.spec.backend.name == "gptq" for group in groups for run in group)
    rates = comparison({"objective": "pretrain"}, {**grid, "backend": ["gptq"]}, reference=False)
    cells = {each.cell.label: each for each in plan_cells(rates, Path("nowhere"))}
    # How many rows are read, of which examples are chosen, may follow from the training there.
    assert [len(group) for group in groups_of(rates.runs, cells)] == [2] * 4


def test_two_at_once_make_one_base_and_what_waits_holds_up_nobody(tmp_path) -> None:
    seen = Events()
    grid = {"backend": ["gptq", "hqq"], "adapter": ["lora", "dora", "vera"]}
    out = tmp_path / "out"
    result = go(comparison(STEPS, grid, reference=False, at_once=2), out, seen)
    assert makers(out) == ["gptq-lora-seed0"]
    assert seen.started()[:2] == ["gptq-lora-seed0", "hqq-lora-seed0"]
    assert sorted(seen.started()) == sorted(states(out))
    assert {row.state for row in result.table.rows if row.cell} == {"finished"}
    notes = [facts["text"] for event, facts in seen if event == "note"]
    assert notes == ["what shares the base of gptq-lora-seed0 begins once that is calibrated"]


def test_each_row_has_the_time_of_its_base_and_the_table_says_so(tmp_path) -> None:
    out = tmp_path / "out"
    result = go(comparison(STEPS, ADAPTERS, reference=False), out)
    rows = {row.label: row for row in result.table.rows if row.cell}
    runs = json.loads((out / "compare.json").read_text())["runs"]
    for name in ("lora", "dora", "vera"):
        taken = 0.0 if name == "lora" else 100.0
        own = runs[f"gptq-{name}-seed0"]["seconds"]
        assert own < 20  # what it really took
        numbers = rows[f"gptq x {name}"].numbers
        assert numbers["seconds"].mean == pytest.approx(own + taken)
        assert numbers["quantize_seconds"].mean == 100.0
        assert numbers["quantize_memory_gib"].mean == 5.0
        assert numbers["memory_gib"].mean == 0.7  # of training, on a GPU
    words = "that of gptq-lora-seed0 by 3 runs (1 min 40 s, 5.00 GiB at the peak)"
    assert words in result.table.shared
    for file in ("compare.html", "compare.json"):
        assert words in (out / file).read_text()
    assert "to calibrate" in (out / "compare.html").read_text()


def test_on_a_cpu_the_peak_of_a_row_has_that_of_its_base() -> None:
    from quantadapt.comparing.results import _peak

    train = {"peak_memory_gib": 0.7}
    assert _peak(train, {"peak_memory_gib": 5.0, "device": "cpu"}) == 5.0
    assert _peak(train, {"peak_memory_gib": 5.0, "device": "cuda:0"}) == 0.7
    assert _peak(train, {}) == 0.7
    assert _peak({}, {}) is None


def test_a_base_that_cannot_be_made_fails_its_rows_and_no_others(tmp_path) -> None:
    out, seen = tmp_path / "out", Events()
    grid = {
        "backend": [{"name": "gptq", "group_size": 16}, "gptq"],
        "adapter": ["lora", "dora", "vera"],
    }
    made = comparison(STEPS, grid, reference=False, at_once=2)
    go(made, out, seen)
    failed = {name: run for name, run in journal(out).items() if run["state"] == "failed"}
    assert len(failed) == 3
    first = "gptq-group_size-16-lora-seed0"
    assert failed.pop(first)["reason"] == "it does not converge; leave it out"
    for run in failed.values():
        assert run["reason"] == (
            f"its base could not be quantized, see {first}: it does not converge; leave it out"
        )
        assert run["seconds"] == 0
    assert set(failed).isdisjoint(seen.started())
    assert makers(out) == ["gptq-lora-seed0"]
    again = Events()
    go(made, out, again, retry=True)
    assert again.started() == [first]  # and the others are told of it again


def journal(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "quantadapt-compare.json").read_text())["runs"]
    return found


@pytest.mark.parametrize(("wrong", "maker"), [(13, "8"), (66, "66"), (14, "14")])
def test_a_run_that_fails_of_itself_costs_its_row_alone(wrong, maker, tmp_path) -> None:
    """Before it quantizes: the next one makes the base. Afterwards the base is there."""
    out = tmp_path / "out"
    grid = {"backend": ["gptq"], "adapter.r": [wrong, 8, 16]}
    go(comparison(STEPS, grid, reference=False), out)
    assert [*states(out).values()] == ["failed", "finished", "finished"]
    assert makers(out) == [f"gptq-lora-r-{maker}-seed0"]


def test_where_who_makes_a_base_is_killed_another_makes_it(tmp_path) -> None:
    out, seen = tmp_path / "out", Events()
    grid = {"backend": ["gptq"], "adapter.r": [67, 8, 16]}
    go(comparison(STEPS, grid, reference=False, at_once=2), out, seen)
    assert [*states(out).values()] == ["failed", "finished", "finished"]
    assert makers(out) == ["gptq-lora-r-8-seed0"]
    assert "killed by SIGKILL" in journal(out)["gptq-lora-r-67-seed0"]["reason"]
    text = (
        "gptq-lora-r-67-seed0 was killed while it made its base; gptq-lora-r-8-seed0 makes it now"
    )
    notes = [facts["text"] for event, facts in seen if event == "note"]
    assert notes.count(text) == 1
    assert [note for note in notes if "was killed" in note] == [text]


def test_a_base_that_kills_another_maker_too_is_given_up(tmp_path) -> None:
    out, seen = tmp_path / "out", Events()
    made = comparison(STEPS, {"backend": ["gptq"], "adapter.r": [67, 68, 8, 16]}, reference=False)
    go(made, out, seen)
    names = [f"gptq-lora-r-{r}-seed0" for r in (67, 68, 8, 16)]
    assert seen.started() == names[:2]
    assert [*states(out).values()] == ["failed"] * 4
    for name in names[2:]:
        reason = journal(out)[name]["reason"]
        assert reason.startswith(f"its base could not be quantized, see {names[1]}: it was killed")
    again = Events()
    go(made, out, again, retry=True)
    assert again.started() == names[:2]  # the same two attempts


def test_one_that_fails_in_words_after_a_kill_ends_it_with_these_words(tmp_path) -> None:
    out = tmp_path / "out"
    backend = [{"name": "gptq", "group_size": 16}]
    go(comparison(STEPS, {"backend": backend, "adapter.r": [67, 8, 16]}, reference=False), out)
    names = [f"gptq-group_size-16-lora-r-{r}-seed0" for r in (67, 8, 16)]
    what = f"its base could not be quantized, see {names[1]}: it does not converge; leave it out"
    assert journal(out)[names[2]]["reason"] == what


def test_what_was_cut_off_while_it_quantized_makes_the_base_when_it_goes_on(tmp_path) -> None:
    out, seen = tmp_path / "out", Events()
    grid = {"backend": [{"name": "gptq", "group_size": 32}], "adapter": ["lora", "dora"]}
    made = comparison(STEPS, grid, reference=False, at_once=2)

    def killed(event: str, facts: Mapping[str, Any]) -> None:
        if event == "progress" and facts.get("step") == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(made, out, killed)
    name = "gptq-group_size-32-lora-seed0"
    assert [*states(out).values()] == ["interrupted", "waiting"]
    assert (out / "runs" / name / ".base.01234567.tmp").exists()  # half written, and nobody's base
    assert base_in(out / "runs" / name) is None
    go(made, out, seen)
    assert seen.started() == [name, "gptq-group_size-32-dora-seed0"]
    assert makers(out) == [name]
    assert [*states(out).values()] == ["finished", "finished"]


def test_more_adapters_take_the_base_that_is_there(tmp_path) -> None:
    out = tmp_path / "out"
    go(comparison(STEPS, {"backend": ["gptq", "hqq"]}, reference=False), out)
    assert makers(out) == ["gptq-lora-seed0"]
    go(
        comparison(
            STEPS, {"backend": ["gptq", "hqq"], "adapter": ["lora", "dora"]}, reference=False
        ),
        out,
    )
    assert makers(out) == ["gptq-lora-seed0"]
    taken = making_of(out / "runs" / "gptq-dora-seed0" / "base").taken_from
    assert Path(taken) == out / "runs" / "gptq-lora-seed0"


def test_a_base_of_an_older_version_is_left_alone(tmp_path) -> None:
    """It does not tell what it was made from."""
    out = tmp_path / "out"
    go(comparison(STEPS, {"backend": ["gptq", "hqq"]}, reference=False), out)
    (out / "runs" / "gptq-lora-seed0" / "base" / "quantadapt.json").write_text("{}")
    grid = {"backend": ["gptq", "hqq"], "adapter": ["lora", "dora", "vera"]}
    go(comparison(STEPS, grid, reference=False), out)
    taken = making_of(out / "runs" / "gptq-vera-seed0" / "base").taken_from
    assert Path(taken) == out / "runs" / "gptq-dora-seed0"


def test_runs_on_another_device_make_a_base_of_their_own(tmp_path) -> None:
    """As where a comparison is taken up elsewhere: each refused the base that it was told of."""
    out = tmp_path / "out"
    both = {"backend": ["gptq", "hqq"]}
    go(comparison(STEPS, both, reference=False), out)
    manifest = out / "runs" / "gptq-lora-seed0" / "base" / MANIFEST
    values = json.loads(manifest.read_text())
    values["making"]["of"]["device"] = "another"
    manifest.write_text(json.dumps(values))
    more = comparison(STEPS, {**both, "adapter": ["lora", "dora", "vera"]}, reference=False)
    assert disk_of(more, plan_cells(more, out), out).bases == 1
    go(more, out)
    assert makers(out) == ["gptq-dora-seed0", "gptq-lora-seed0"]
    taken = making_of(out / "runs" / "gptq-vera-seed0" / "base").taken_from
    assert Path(taken) == out / "runs" / "gptq-dora-seed0"


def test_nobody_waits_for_a_run_whose_base_is_not_for_others(tmp_path) -> None:
    """It was cut off as it trained, on another device, and goes on with what it has."""
    out, seen = tmp_path / "out", Events()
    grid = {"backend": ["gptq"], "adapter.r": [99, 8]}
    made = comparison(STEPS, grid, reference=False, at_once=2)
    first = "gptq-lora-r-99-seed0"

    def cut(event: str, facts: Mapping[str, Any]) -> None:
        if event == "progress" and facts.get("step") == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(made, out, cut)
    assert states(out)[first] == "interrupted"
    manifest = out / "runs" / first / "base" / MANIFEST
    values = json.loads(manifest.read_text())
    values["making"]["of"]["device"] = "another"
    manifest.write_text(json.dumps(values))
    shutil.rmtree(out / "runs" / "gptq-lora-r-8-seed0", ignore_errors=True)
    record = json.loads((out / "quantadapt-compare.json").read_text())
    record["runs"]["gptq-lora-r-8-seed0"] = {"state": "waiting"}
    (out / "quantadapt-compare.json").write_text(json.dumps(record))
    go(made, out, seen)
    assert seen.started() == [first, "gptq-lora-r-8-seed0"]
    assert not [
        facts["text"] for event, facts in seen if event == "note" and "begins once" in str(facts)
    ]
    assert makers(out) == ["gptq-lora-r-8-seed0", first]


def test_a_base_that_is_done_in_this_moment_is_not_made_again(tmp_path, monkeypatch) -> None:
    """It had not been there when it was looked for, and then nobody was making it any more."""
    made = comparison(STEPS, {**ADAPTERS, "adapter": ["lora", "ia3"]}, reference=False)
    cells = {each.cell.label: each for each in plan_cells(made, tmp_path)}
    folder = CompareFolder(tmp_path)
    first, second = (folder.run(run.name) for run in made.runs)
    folder.record(first.name).state = "running"
    job = Job(second.name, [], second, folder.log(second.name))
    bases = Bases.of(made.runs, cells, folder)
    has = Bases._has

    def then_done(self, name: str) -> bool:
        found = has(self, name)
        (first / "base").mkdir(parents=True, exist_ok=True)
        (first / "base" / MANIFEST).write_text("{}")
        return found

    monkeypatch.setattr(Bases, "_has", then_done)
    assert bases.look(job) is None


def test_a_run_is_told_of_a_base_in_any_folder(tmp_path) -> None:
    out = tmp_path / 'of "Zoë" 😀: [a, b] #1'
    made = comparison(STEPS, {**ADAPTERS, "adapter": ["lora", "ia3"]}, reference=False)
    cells = {each.cell.label: each for each in plan_cells(made, out)}
    folder = CompareFolder(out)
    first, second = (folder.run(run.name) for run in made.runs)
    (first / "base").mkdir(parents=True)
    plan = cells[made.runs[0].cell.label].plan
    making = {"of": settings_of(plan), "seconds": 1.0, "peak_memory_gib": 1.0, "device": "cpu"}
    (first / "base" / MANIFEST).write_text(json.dumps({"making": making}))
    folder.record(first.name).state = "finished"
    job = Job(second.name, ["--json"], second, folder.log(second.name))
    found = Bases.of(made.runs, cells, folder).look(job)
    assert found.command[:2] == ["--json", "--set"]
    assert apply_overrides({}, found.command[2:]) == {"reuse_base": str(first)}


def test_a_budget_counts_each_base_once(tmp_path) -> None:
    """The first run took 100 s for its base, as it says: there is no time for one of three."""
    grid = {
        "backend": [{"name": "gptq", "bits": b} for b in (2, 3, 4)],
        "adapter": ["lora", "dora"],
    }
    with pytest.raises(QuantadaptError, match=r"too small: 6 runs of 30 steps alone take about"):
        go(comparison(STEPS, grid, budget=250 / 3600, reference=False), tmp_path / "short")
    seen = Events()
    go(comparison(STEPS, grid, budget=500 / 3600, reference=False), tmp_path / "enough", seen)
    guess = next(facts["seconds"] for event, facts in seen if event == "rungs")
    assert 300 < guess < 400  # and not 600
    assert len(makers(tmp_path / "enough")) == 3


def test_a_budget_counts_no_base_that_is_taken_from_elsewhere(tmp_path) -> None:
    """It took 100 s, as it says, and none of these 90."""
    go(comparison(STEPS, {"backend": ["gptq", "hqq"]}, reference=False), tmp_path / "first")
    base = str(tmp_path / "first" / "runs" / "gptq-lora-seed0")
    seen, out = Events(), tmp_path / "out"
    common = {**STEPS, "reuse_base": base}
    result = go(comparison(common, ADAPTERS, budget=90 / 3600, reference=False), out, seen)
    # The row has its time, as if it had been made here, and so that is told.
    rows = [row for row in result.table.rows if row.cell]
    assert len(rows) == 3
    assert all(row.numbers["seconds"].mean > 100 for row in rows)
    assert "that of gptq-lora-seed0 by 3 runs (1 min 40 s, 5.00 GiB" in result.table.shared
    guess = next(facts["seconds"] for event, facts in seen if event == "rungs")
    assert 0 < guess < 90
    assert makers(out) == []


def test_the_disk_is_looked_at_before(tmp_path, monkeypatch) -> None:
    made = comparison(STEPS, ADAPTERS, seeds=2, reference=False)
    cells, out = plan_cells(made, tmp_path / "out"), tmp_path / "out"
    disk = disk_of(made, cells, out)
    assert (disk.bases, disk.runs) == (2, 6)
    assert disk.words.startswith(
        "2 bases are calibrated once for 6 runs, and kept in their folders"
    )
    monkeypatch.setattr("quantadapt.comparing.bases.free_space", lambda path: disk.needed - 1)
    with pytest.raises(PlanRefused, match="too little room on the disk: 2 bases"):
        look_at(made, out)
    assert Disk(0, 0, 0, 0).words == ""
    assert Disk(1, 1, None, None).words == "1 base is calibrated, and kept in its folder"


@pytest.mark.slow
def test_a_real_comparison_gives_what_its_runs_give_alone(tmp_path) -> None:
    common = told(tmp_path, "lora").model_dump(mode="json", exclude_unset=True)
    for key in ("output", "adapter", "backend", "export"):
        del common[key]
    grid = {"backend": [{"name": "gptq", "group_size": 32}], "adapter": ["lora", "ia3"]}
    out = tmp_path / "out"
    qa.compare(common, grid, output=out, reference=False, at_once=2)
    assert makers(out) == ["gptq-group_size-32-lora-seed0"]
    for adapter in ("lora", "ia3"):
        folder = out / "runs" / f"gptq-group_size-32-{adapter}-seed0"
        spec = Spec.load(out / "specs" / f"{folder.name}.yaml", [f"output={tmp_path / adapter}"])
        alone = qa.run(spec, verbose=False)
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics["evaluations"] == json.loads(json.dumps(alone.metrics["evaluations"]))
        assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == weights(alone)
