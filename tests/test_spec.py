"""The spec: strict, with every mistake reported at once and a suggestion for each."""

from __future__ import annotations

import pytest

from quantadapt.errors import Problem, SpecError
from quantadapt.spec import Spec, apply_overrides, read_yaml, wrong_value


def test_a_bare_string_is_a_name() -> None:
    spec = Spec(backend="bnb-nf4", adapter={"name": "vera", "r": 64})
    assert (spec.backend.name, spec.backend.options) == ("bnb-nf4", {})
    assert (spec.adapter.name, spec.adapter.options) == ("vera", {"r": 64})


def test_every_mistake_is_reported_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        Spec(bakend="hqq", train={"learning_rat": 1, "max_steps": "many"}, export={"merge": "yes"})
    found = {problem.where: problem for problem in caught.value.problems}
    assert set(found) == {"bakend", "train.learning_rat", "train.max_steps", "export.merge"}
    assert found["bakend"].fix == "did you mean 'backend'?"
    assert found["train.learning_rat"].fix == "did you mean 'learning_rate'?"
    assert "'auto', 'dense', 'requantize'" in found["export.merge"].fix
    assert caught.value.exit_code == 2


def test_what_a_validator_says_is_kept() -> None:
    detail = {"type": "value_error", "msg": "Value error, no, and why", "input": 3}
    assert wrong_value(detail, "backend.bits") == Problem(
        "no, and why, got 3", where="backend.bits"
    )


@pytest.mark.parametrize(
    ("values", "what", "fix"),
    [
        ({"backend": ["hqq"]}, "['hqq'] is no mapping", "write a name, or {name: ...}"),
        ({"data": None}, "it is empty", "leave it out, or write a path, or {path: ...}"),
        ({"train": 5}, "5 is no mapping", "write keys and values"),
        ({"seed": "x"}, "'x' is not possible", "use a valid integer"),
        ({"seed": -1}, "-1 is not possible", "use a value greater than or equal to 0"),
    ],
)
def test_a_wrong_value_says_what_may_stand_there(values, what, fix) -> None:
    with pytest.raises(SpecError) as caught:
        Spec(**values)
    (problem,) = caught.value.problems
    assert (problem.what, problem.fix) == (what, fix)


def test_overrides_reach_into_named_things_and_keep_the_rest() -> None:
    values = {"backend": "hqq", "train": {"max_steps": 3}}
    found = apply_overrides(values, ["backend.bits=3", "train.learning_rate=2e-4", "seed=7"])
    assert found == {
        "backend": {"name": "hqq", "bits": 3},
        "train": {"max_steps": 3, "learning_rate": 2e-4},
        "seed": 7,
    }
    assert values == {"backend": "hqq", "train": {"max_steps": 3}}


def test_yaml_goes_round(tmp_path) -> None:
    spec = Spec(backend={"name": "hqq", "bits": 3}, train={"max_steps": 5, "learning_rate": 2e-4})
    file = tmp_path / "spec.yaml"
    file.write_text(spec.to_yaml())
    assert Spec.load(file) == spec


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("backend: [hqq\n", ":2", "not valid YAML"),
        ("- hqq\n", "", "holds no mapping"),
        ("? [hqq]\n: 4\n", ":1", "found unhashable key"),
        ("\x00\x01", "", "not valid YAML"),
        (
            "seed: 1\ntrain: {max_steps: 3, max_steps: 4}\n",
            ":2",
            "the key 'max_steps' is there twice",
        ),
    ],
)
def test_bad_yaml_is_a_sentence_with_a_line(tmp_path, text, where, what) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(SpecError) as caught:
        read_yaml(file)
    (problem,) = caught.value.problems
    assert problem.where == f"{file}{where}"
    assert what in problem.what


def test_a_missing_file_and_a_bad_assignment() -> None:
    with pytest.raises(SpecError, match="No such file"):
        read_yaml("nowhere.yaml")
    with pytest.raises(SpecError, match="no assignment"):
        apply_overrides({}, ["max_steps"])


def test_the_schema_describes_every_key() -> None:
    schema = Spec.model_json_schema()
    assert set(schema["properties"]) == set(Spec.model_fields)
    assert schema["additionalProperties"] is False


def test_a_bare_string_is_the_path_of_the_data() -> None:
    assert Spec(data="train.jsonl").data.path == "train.jsonl"
    assert apply_overrides({"data": "a.jsonl"}, ["data.max_length=64"]) == {
        "data": {"path": "a.jsonl", "max_length": 64}
    }


def test_an_override_does_not_hide_a_mistake() -> None:
    with pytest.raises(SpecError, match="'train' is 5, which has no 'max_steps'"):
        apply_overrides({"train": 5}, ["train.max_steps=3"])
