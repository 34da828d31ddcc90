"""The spec: strict, with every mistake reported at once and a suggestion for each."""

from __future__ import annotations

import sys

import pytest
from pydantic import ValidationError

from quantadapt.errors import Problem, SpecError
from quantadapt.inputs.plain_yaml import MAX_VALUES, parse, read_yaml, to_yaml
from quantadapt.protocols.options import Options
from quantadapt.spec import Spec, apply_overrides, wrong_value


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
        *(
            (
                {section: {key: 10**22}},
                f"{10**22} is not possible",
                "use a value less than or equal to 9223372036854775807",
            )
            for section, key in (
                ("train", "per_device_train_batch_size"),
                ("train", "max_steps"),
                ("data", "max_examples"),
                ("data", "max_length"),
            )
        ),
        (
            {"train": {"num_train_epochs": 1e308}},
            "1e+308 is not possible",
            "use a value less than or equal to 1000000000",
        ),
    ],
)
def test_a_wrong_value_says_what_may_stand_there(values, what, fix) -> None:
    with pytest.raises(SpecError) as caught:
        Spec(**values)
    (problem,) = caught.value.problems
    assert (problem.what, problem.fix) == (what, fix)


def test_a_number_below_64_bits_is_told_the_least() -> None:
    class Shifted(Options):
        by: int = 0

    assert Shifted(by=-sys.maxsize).by == -sys.maxsize
    with pytest.raises(ValidationError, match="greater than or equal to -9223372036854775807"):
        Shifted(by=-(10**22))


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
        ("? [hqq]\n: 4\n", ":1", "a key is a list or a mapping"),
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


# Values as people mean them -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [("5e-2", 0.05), ("1e5", 1e5), ("-2E-3", -0.002), (".5", 0.5), ("1_000", 1000), ("010", 10),
     ("0x10", 16), ("12:30", "12:30"), ("2024-01-01", "2024-01-01"), ("yes", True),
     ("1.2.3", "1.2.3"), ("1e", "1e"), ("~", None), ("on: 1", {"on": 1}),
     ("1: 2", {"1": 2}), ("[5e-1, a]", [0.5, "a"]),
     ("{a: &x 1, b: *x}", {"a": 1, "b": 1})],
)  # fmt: skip
def test_yaml_is_read_as_people_mean_it(text, value) -> None:
    found = parse(text)
    assert (found, type(found)) == (value, type(value))


def test_so_are_values_on_the_command_line(tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("train: {learning_rate: 5e-2}")
    assert Spec.load(file).train.learning_rate == 0.05
    assert Spec.load(file, ["seed=010"]).seed == 10
    found = apply_overrides({}, ["adapter.lora_dropout=5e-2", "output=12:30"])
    assert found == {"adapter": {"lora_dropout": 0.05}, "output": "12:30"}


@pytest.mark.parametrize(
    ("override", "where"),
    [("seed=true", "seed"), ("train.max_steps=true", "train.max_steps"),
     ("train.weight_decay=false", "train.weight_decay"), ("train.memory=true", "train.memory"),
     ("data.max_examples=true", "data.max_examples")],
)  # fmt: skip
def test_true_is_no_number(override, where) -> None:
    with pytest.raises(SpecError) as caught:
        Spec(**apply_overrides({}, [override]))
    (problem,) = caught.value.problems
    assert problem.where == where
    assert "number" in problem.fix or "number" in problem.what


@pytest.mark.parametrize("given", [True, float("nan"), [2, False], {"a": True}])
def test_options_of_plugins_take_numbers_alone(given) -> None:
    class Made(Options):
        some: int | float | list[int] | dict[str, float]

    with pytest.raises(ValidationError, match="number"):
        Made(some=given)
    assert Made(some=1).some == 1


@pytest.mark.parametrize("text", ["5e-2", "1e5", "12:30", "010", "on", "null", "2024-01-01", "*a"])
def test_text_that_looks_like_a_number_goes_round(text) -> None:
    assert parse(to_yaml({"output": text})) == {"output": text}


ALIASES = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (ALIASES, f"more than {MAX_VALUES} values"),
        ("a: &a [*a]", "an alias stands inside"),
        ("? [a]\n: 1", "it has to be text"),
        ("[" * 5000, "nested too deeply"),
        ("seed: " + "9" * 5000, "too long"),
        ("model: !!binary aGVsbG8=", "tag:yaml.org,2002:binary"),
        ("skip_modules: !!set {a, b}", "tag:yaml.org,2002:set"),
        ("model: !!timestamp 2024-01-01", "tag:yaml.org,2002:timestamp"),
        ("on: 1", "unknown key 'on'"),
        ("1: 2", "unknown key '1'"),
        ("null: 2", "unknown key 'null'"),
        ("train: {true: 2}", "unknown key 'true'"),
    ],
)
def test_odd_yaml_is_a_sentence(tmp_path, text, what) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(SpecError, match=what):
        Spec.load(file)


@pytest.mark.parametrize(
    ("key", "value", "where"),
    [("learning_rate", "abc", "train"), ("learning_rate", float("inf"), "train"),
     ("weight_decay", float("nan"), "train"), ("max_steps", "many", "train")],
)  # fmt: skip
def test_what_is_no_number_is_told(key, value, where) -> None:
    with pytest.raises(SpecError, match=rf"{where}\.{key}: .* is not possible"):
        Spec(**{where: {key: value}})


def test_a_seed_that_numpy_does_not_take() -> None:
    with pytest.raises(SpecError, match="less than 4294967296"):
        Spec(seed=2**32)


@pytest.mark.parametrize(
    ("values", "meant"),
    [
        ({"train": {"lr": 1}}, "learning_rate"),
        ({"train": {"bs": 1}}, "per_device_train_batch_size"),
        ({"train": {"batch": 1}}, "per_device_train_batch_size"),
        ({"train": {"epochs": 1}}, "num_train_epochs"),
        ({"train": {"seq_len": 1}}, "data.max_length"),
        ({"train": {"learning_rte": 1}}, "learning_rate"),
        ({"data": {"max_seq_length": 1}}, "max_length"),
        ({"lr": 1}, "train.learning_rate"),
        ({"max_lenght": 1}, "data.max_length"),
        ({"r": 1}, "adapter.r"),
        ({"quantization": "hqq"}, "backend"),
    ],
)
def test_a_key_of_another_tool_or_section_is_known(values, meant) -> None:
    with pytest.raises(SpecError, match=f"did you mean '{meant}'"):
        Spec(**values)


@pytest.mark.parametrize("value", [63, -1, "maybe", 100.5])
def test_a_wrong_packing_is_told_once_and_under_its_name(value) -> None:
    with pytest.raises(SpecError) as caught:
        Spec(train={"packing": value})
    (problem,) = caught.value.problems
    assert problem.where == "train.packing"
    assert "use true, false, or the tokens of a row, 64 or more" in str(problem)
    for good in (64, True, False):
        assert Spec(train={"packing": good}).train.packing is good
