"""The configs that come along: each one plans as it stands, and `init` fills it in."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantadapt import cli, demo
from quantadapt.comparing.grid import comparison
from quantadapt.comparing.stage import look_at
from quantadapt.errors import SpecError
from quantadapt.inputs import configs
from quantadapt.inputs.commented_yaml import changed
from quantadapt.machine import Machine
from quantadapt.planning import plan
from quantadapt.spec import Spec

ROOT = Path(__file__).resolve().parent.parent
each = pytest.mark.parametrize("name", configs.names())


@pytest.fixture
def init(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run `quantadapt init` in a folder of its own; return exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["init", *map(str, arguments)])
        return (ended.value.code or 0, *capsys.readouterr())  # type: ignore[return-value]

    return call


@each
def test_a_config_plans_by_its_name(name: str) -> None:
    made = plan(Spec.load(name), machine=Machine())
    assert made.spec.output == f"runs/{name}"


@pytest.mark.parametrize("name", configs.names(configs.COMPARISONS))
def test_a_comparison_plans(name: str, tmp_path: Path) -> None:
    values = yaml.safe_load(configs.located(name, configs.COMPARISONS).read_text(encoding="utf-8"))
    made = comparison(values, values.pop("grid"), **values.pop("compare", {}))
    assert not [cell.reason for cell in look_at(made, tmp_path / "out") if cell.refusals]


@each
def test_a_config_says_what_it_is_for(name: str) -> None:
    summary = configs.summary(name)
    assert summary.endswith(".")
    assert len(summary) < 100


@each
def test_a_model_of_the_user_is_not_trained_as_the_demo_is(name: str) -> None:
    """The demo, of 3.7 million parameters, takes steps that would break a real model; a config with
    such steps says at their place what to take instead."""
    spec, text = Spec.load(name), configs.located(name).read_text()
    vera = spec.adapter.name == "vera"  # scales of fixed matrices: VeRA's own authors take 1e-2
    told = re.search(r"learning_rate: \S+  # of the demo; \S+ to \S+ for a model of yours\n", text)
    assert told or spec.train.learning_rate <= (1e-2 if vera else 2e-4)
    assert spec.model is None
    assert spec.data.path is None


def test_a_name_that_is_no_config_is_refused_with_the_likely_one() -> None:
    with pytest.raises(SpecError, match="did you mean 'qlora'"):
        Spec.load("qlroa")


def test_a_file_goes_before_a_config_of_its_name(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("qlora").write_text("backend: none\n")
    assert Spec.load("qlora").backend.name == "none"
    assert Spec.load(f"{tmp_path}/qlora").backend.name == "none"


# init ---------------------------------------------------------------------------------------------


def test_without_a_use_they_are_listed(init) -> None:
    code, out, _ = init()
    assert code == 0
    assert all(name in out for name in configs.names())
    code, out, _ = init("--json")
    assert [use["name"] for use in json.loads(out)] == configs.names()


DATA = {
    **dict.fromkeys(("dpo", "kto", "orpo", "reward", "simpo"), "preferences/train.jsonl"),
    "classify": "labelled/sequence/train.jsonl",
    "classify-tokens": "labelled/token/train.jsonl",
}


@each
def test_what_is_given_is_filled_in_and_all_comments_stay(name: str, init) -> None:
    model, data = demo.MODEL_DIR, demo.DEMO_DIR / DATA.get(name, "train.jsonl")
    given = ("--model", model, "--data", data, "--set", "seed=7", "--set", "train.save_steps=9")
    assert init(name, *given, "-o", "mine.yaml")[0] == 0
    text, template = Path("mine.yaml").read_text(), configs.located(name).read_text()
    # PyYAML's own reading of both, with what was said put in by hand.
    meant = yaml.safe_load(template)
    meant |= {"model": str(model), "seed": 7, "output": "runs/mine"}
    meant["data"]["path"] = str(data)
    meant["train"] = {**meant.get("train", {}), "save_steps": 9}
    assert yaml.safe_load(text) == meant
    comments = [line.partition("#")[2] for line in template.splitlines() if "#" in line]
    assert [line.partition("#")[2] for line in text.splitlines() if "#" in line] == comments
    assert cli_plans("mine.yaml")


def cli_plans(file: str) -> bool:
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", file])
    return not ended.value.code


def test_another_backend_takes_no_options_of_the_one_before(init) -> None:
    code, out, _ = init("demo", "--backend", "bnb-nf4", "-o", "-")
    assert code == 0
    assert yaml.safe_load(out)["backend"] == {"name": "bnb-nf4"}
    assert yaml.safe_load(out)["output"] == "runs/demo"


def test_nothing_is_replaced_unless_it_is_said(init, tmp_path) -> None:
    assert init("demo")[0] == 0
    mine = Path("demo.yaml")
    mine.write_text("# mine\n")
    code, _, err = init("demo")
    assert code == 1
    assert "--overwrite" in err
    assert mine.read_text() == "# mine\n"
    assert init("demo", "--overwrite")[0] == 0
    assert Spec.load(mine).backend.options["bits"] == 4
    assert [file.name for file in tmp_path.iterdir()] == ["demo.yaml"]
    assert "it is a folder" in init("demo", "-o", str(tmp_path))[2]


def test_data_of_another_task_are_refused_as_by_plan(init, tmp_path) -> None:
    code, _, err = init("dpo", "--data", demo.TRAIN_FILE)
    assert code == 2
    assert "no column 'chosen', 'rejected'" in err
    assert not list(tmp_path.iterdir())


def test_what_plan_refuses_is_not_written_but_for_another_machine(init, tmp_path) -> None:
    wrong = ("qlora", "--model", "./absent", "--data", "absent.jsonl")
    code, _, err = init(*wrong)
    assert code == 2
    assert "./absent does not exist" in err
    assert "absent.jsonl does not exist" in err
    assert not list(tmp_path.iterdir())
    assert init(*wrong, "--no-check")[0] == 0
    assert Spec.load("qlora.yaml").model == "./absent"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("qlroa",), "did you mean 'qlora'"),
        (("--model", "x"), "for which use?"),
        (("demo", "--set", "train.stepz=3", "--no-check"), "unknown key 'stepz'"),
        (("demo", "--set", "seed=x", "--set", "dtype=y"), "2 problems"),
    ],
)
def test_mistakes_are_refused(given, told: str, init, tmp_path) -> None:
    code, _, err = init(*given)
    assert code == 2
    assert told in err
    assert not list(tmp_path.iterdir())


BLOCKS = """\
# first
a: {b: 1, c: [1, 2]}  # of a
d:
  # of e
  e: "x"  # after e

  f:
    - 1
    - 2  # two
# of g
g: null  # last
"""


@pytest.mark.parametrize(
    "after",
    [
        {"a": {"b": 2, "c": [3]}, "d": {"e": "# y: [", "f": [1, 2]}, "g": None},
        {"a": {"b": 1, "c": [1, 2], "new": {"x": 1}}, "d": {"e": "x", "f": [1, 2]}, "g": "2e3"},
        {"a": {"c": [1, 2]}, "d": {"e": "x", "f": [], "h": "no"}, "g": 5, "i": {"j": {"k": "é"}}},
        {"a": {"b": 1, "c": [1, 2]}, "d": {"f": [{"n": "m"}]}, "g": "a\nb"},
    ],
)
@pytest.mark.parametrize("end", ["", "\n"])
def test_yaml_is_changed_where_it_stands(after: dict[str, Any], end: str) -> None:
    text = BLOCKS.rstrip("\n") + end
    made = changed(text, yaml.safe_load(text), after)
    assert yaml.safe_load(made) == after
    kept = ("# first", "# of a", "# of g", "# last")
    assert all(comment in made for comment in kept)


# The wheel ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_installed_wheel_has_the_configs(tmp_path: Path) -> None:
    from hatchling.builders.wheel import WheelBuilder

    wheel = next(WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"]))
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)  # what an installer does with a wheel of pure Python
    program = "import sys; sys.path.insert(0, sys.argv.pop(1)); from quantadapt.cli import main"
    command = [sys.executable, "-c", f"{program}; main(sys.argv[1:])", str(site)]
    for arguments in (
        ["init", "qlora", "--set", "seed=1"],
        ["plan", "qlora.yaml"],
        ["plan", "demo"],
    ):
        done = subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    where = [
        sys.executable,
        "-c",
        f"{program}; import quantadapt; print(quantadapt.__file__)",
        site,
    ]
    found = subprocess.run(where, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()).is_relative_to(site)
