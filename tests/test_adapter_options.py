"""Values of an adapter's options are looked at when a run is planned, without PEFT."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from quantadapt.planning.adapter_options import checked_options, plain
from quantadapt.planning.peft_options import Option
from quantadapt.registry import registry


def told(adapter: str, **options: object) -> dict[str, str]:
    _, problems = checked_options(registry().adapter(adapter), options)
    return {problem.where: str(problem) for problem in problems}


@pytest.mark.parametrize(
    ("adapter", "name", "value", "words"),
    [
        ("lora", "r", 10**9, "use 65536 or less"),
        ("lora", "r", "8", "is not of type int"),
        ("lora", "r", True, "is not of type int"),
        ("lora", "lora_alpha", 0, "without effect"),
        ("lora", "lora_dropout", 1.0, "less than 1"),
        ("lora", "lora_dropout", float("nan"), "is no number"),
        ("vera", "vera_dropout", -0.1, "use 0 or more"),
        ("vera", "d_initial", float("inf"), "is no number"),
        ("lora", "bias", "lora", "did you mean 'lora_only'"),
        ("lora", "init_lora_weights", "pisa", "did you mean 'pissa'"),
        ("lora", "init_lora_weights", "pissa_niter_x", "is not possible"),
        ("lora", "target_modules", [1], "is not of type"),
        ("lora", "exclude_modules", "(", "no regular expression"),
        ("lora", "layers_to_transform", "0", "is not of type"),
        ("lora", "layers_to_transform", True, "is not of type"),
        ("lora", "layers_pattern", "layers", "set layers_to_transform too"),
        ("lora", "rank_pattern", {"q_proj": 0}, "no value for a layer"),
        ("lora", "rank_pattern", {"q_proj": 2.5}, "no value for a layer"),
        ("lora", "rank_pattern", ["q_proj"], "is not of type"),
        ("lora", "rank_pattern", {"(": 2}, "no regular expression"),
        ("lora", "alpha_pattern", {"q_proj": "a"}, "no value for a layer"),
        ("lora", "trainable_token_indices", ["a"], "is not of type"),
        ("lora", "layer_replication", [[0, 2], [1, 2]], "cannot be saved or merged"),
        ("lora", "use_qalora", True, "GPTQ only"),
        ("lora", "arrow_config", {"top_k": 2}, "trained already"),
        ("lora", "velora_config", 5, "is not of type"),
        ("lora", "kasa_config", {"beta": object()}, "is not of type"),
        ("adalora", "beta1", 2.0, "between 0 and 1"),
        ("adalora", "deltaT", 0, "use 1 or more"),
        ("adalora", "tinit", -1, "use 0 or more"),
        ("adalora", "target_r", 20, "above init_r"),
        ("adalora", "r", 8, "init_r and target_r"),
        ("adalora", "use_dora", True, "does not take use_dora over"),
        ("adalora", "init_lora_weights", "pissa", "does not take init_lora_weights over"),
        ("ia3", "feedforward_modules", "(", "no regular expression"),
    ],
)
def test_a_value_that_cannot_be_used_is_told(adapter, name, value, words) -> None:
    found = told(adapter, **{name: value})
    assert list(found) == [f"adapter.{name}"]
    assert words in found[f"adapter.{name}"]


@pytest.mark.parametrize(
    ("adapter", "name", "value", "kept"),
    [
        ("lora", "target_modules", ("a", "b"), ["a", "b"]),
        ("lora", "target_modules", {"b", "a"}, ["a", "b"]),
        ("lora", "modules_to_save", "lm_head", ["lm_head"]),
        ("lora", "r", np.int64(4), 4),
        ("lora", "lora_dropout", np.float32(0.5), 0.5),
        ("lora", "lora_dropout", 0, 0),
        ("lora", "init_lora_weights", False, False),
        ("lora", "init_lora_weights", "pissa_niter_16", "pissa_niter_16"),
        ("lora", "init_lora_weights", "lora_ga", "lora_ga"),
        ("lora", "layers_to_transform", {1}, [1]),
        ("adalora", "init_lora_weights", True, True),
        ("road", "variant", "road_2", "road_2"),
    ],
)
def test_one_that_can_is_kept_in_plain_types(adapter, name, value, kept) -> None:
    options, problems = checked_options(registry().adapter(adapter), {name: value})
    assert not problems
    assert options[name] == kept
    assert type(options[name]) is type(kept)


def test_none_is_the_default_where_peft_takes_none_and_fails() -> None:
    options, problems = checked_options(registry().adapter("lora"), {"rank_pattern": None})
    assert not problems
    assert "rank_pattern" not in options


def test_an_expression_says_itself_which_layers() -> None:
    found = told("lora", target_modules=".*q_proj", layers_to_transform=[0])
    assert "does not go with" in found["adapter.layers_to_transform"]


def test_defaults_of_every_adapter_are_accepted() -> None:
    for adapter in registry().adapters():
        assert not checked_options(adapter, dict(adapter.defaults))[1], adapter.name


@pytest.mark.parametrize(
    ("annotation", "right", "wrong"),
    [
        ("Optional[Union[list[str], str]]", [None, "a", ["a"]], [1, [1], {"a": 1}]),
        ("list[int] | None", [[1], None], [[True], ["1"], 1]),
        ("Optional[list[tuple[int, int]]]", [[[1, 2]]], [[1, 2], [[1]], [[1, 2, 3]]]),
        ("typing.Optional[typing.Dict[str, float]]", [{"a": 1}], [{"a": "b"}, {1: 1.0}]),
        ("Literal['none', 'all']", ["none"], ["some", None, 1]),
        ("SomeConfig", [{"a": 1}], [1, [1]]),
        ("RoadVariant", ["road_1", 3], []),
    ],
)
def test_annotations_are_read_as_they_are_written(annotation, right, wrong) -> None:
    option = Option("name", annotation, "", "")
    assert all(option.accepts(value) for value in right)
    assert not any(option.accepts(value) for value in wrong)


def test_what_is_nested_becomes_plain() -> None:
    @dataclass
    class Config:
        names: set[str]

    value = {"config": Config({"b", "a"}), "sizes": (np.int32(1), 2)}
    assert plain(value) == {"config": {"names": ["a", "b"]}, "sizes": [1, 2]}
