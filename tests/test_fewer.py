"""Where memory runs out in one of two processes beside the steps of training: fewer examples go
through its model at a time, nobody waits for ever, and what is learnt is the same."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_grpo
import test_kto
import torch
from datasets import Dataset
from processes import in_processes
from test_memory_fit import Notes, make_up_card
from test_validation import Full

import quantadapt as qa
from quantadapt.distributed import world
from quantadapt.distributed.talking import PeerLost, peers_in_words
from quantadapt.errors import QuantadaptError
from quantadapt.evaluation.desirability import Desirability
from quantadapt.evaluation.perplexity import PerplexityEvaluator
from quantadapt.protocols import Given
from quantadapt.testing.small_demo import small_model

BEFORE = "out of memory in what comes before step 1: from here on {} examples at a time"
OPTIONS = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.05}


def model_of(full: Full | None, parallel: str = "ddp") -> Any:
    from quantadapt.distributed import start
    from quantadapt.sharding import shard

    torch.set_num_threads(1)
    base = qa.quantize(str(small_model()), "none", device="cpu", dtype="float32")
    start("cpu")
    if parallel == "fsdp":
        shard(base)
    model = qa.attach(base, "lora", seed=0)
    if full is not None:
        model.get_base_model().model.layers[-1].mlp.register_forward_pre_hook(full)
    return model


def compared(file: str, full: Full | None, parallel: str = "ddp") -> Any:
    """KTO: the reference, and mismatched answers before each step."""
    notes, data = Notes(), test_kto.read(Path(file)).train
    try:
        with peers_in_words():
            model = model_of(full, parallel)
            logs, weights = test_kto.trained(model, data, on_note=notes, **OPTIONS)
    except QuantadaptError as error:
        return error, {}, [*notes]
    return logs, {n: w.clone() for n, w in weights.items()}, [*notes]


def answered(file: str, function: str, name: str, full: Full | None) -> Any:
    """What the model draws itself, its log-probabilities, and those of the reference."""
    notes, data = Notes(), test_grpo.read(Path(file)).train
    objective = {"name": name, "rewards": [function], "beta": 0.1, "num_iterations": 2}
    given = {"max_steps": 4, "on_note": notes, "per_device_train_batch_size": 4}
    logs, weights = test_grpo.trained(model_of(full), data, objective, **given)
    return logs, weights, [*notes]


def both_ways(kind: str, *args: Any) -> list[Any]:
    work = {"compared": compared, "answered": answered}[kind]
    return [work(*args, full) for full in (None, Full(1, 2, training=False))]


def assert_the_same(expected: Any, found: Any) -> None:
    (logs, weights, _), (others, same, _) = expected, found
    assert len(logs) == len(others) > 1
    for log, other in zip(logs, others, strict=True):
        assert log.keys() == other.keys()
        for name in log.keys() - {"seconds", "seconds_left", "peak_memory_gib"}:
            assert other[name] == pytest.approx(log[name], rel=1e-5, abs=1e-5), name
    for name, weight in weights.items():
        torch.testing.assert_close(same[name], weight, rtol=0, atol=1e-6)


def out_of_memory(notes: list[str]) -> list[str]:
    return [note for note in notes if "out of memory" in note]


def test_the_comparison_with_a_reference_goes_on(tmp_path) -> None:
    file = str(test_kto.written(tmp_path, test_kto.ROWS * 2))
    first, second = in_processes(2, both_ways, tmp_path, "compared", file)
    for expected, found in (first, second):
        assert_the_same(expected, found)
    assert all(torch.equal(w, second[1][1][n]) for n, w in first[1][1].items())
    assert out_of_memory(first[0][2]) == out_of_memory(second[0][2]) == []
    reference = "out of memory in the reference's pass: from here on {} examples at a time"
    told = [reference.format(n) for n in (4, 2, 1)] + [BEFORE.format(n) for n in (2, 1)]
    assert out_of_memory(second[1][2]) == told
    assert out_of_memory(first[1][2]) == [f"{text} (process 1)" for text in told]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_answers_go_on(name, tmp_path) -> None:
    functions = tmp_path / "some.py"
    functions.write_text(test_grpo.SOME)
    file = str(test_grpo.written(tmp_path))
    given = ("answered", file, f"{functions}:short", name)
    first, second = in_processes(2, both_ways, tmp_path, *given)
    for expected, found in (first, second):
        assert_the_same(expected, found)
    assert any(weight.abs().max() > 0 for n, weight in first[0][1].items() if "lora_B" in n)
    told = [BEFORE.format(n) for n in (2, 1)] * 2  # answers; what is noted of them
    assert out_of_memory(second[1][2]) == told
    assert out_of_memory(first[1][2]) == [f"{text} (process 1)" for text in told]


def sharded(file: str) -> Any:
    return compared(file, Full(1, 2, training=False), "fsdp")


@pytest.mark.slow
def test_where_processes_wait_the_error_says_what_to_set(tmp_path) -> None:
    file = str(test_kto.written(tmp_path, test_kto.ROWS))
    (first, *_), (second, *_) = in_processes(2, sharded, tmp_path, file)
    assert "out of memory in the reference's pass" in second.problems[0].what
    assert "train.per_device_train_batch_size" in second.problems[0].fix
    assert isinstance(first, PeerLost)


def figures(file: str, full: Full | None) -> Any:
    """Of desirability and perplexity, by two processes each with its part."""
    from quantadapt.distributed.talking import told_main

    model, data = model_of(full), test_kto.read(Path(file)).train
    rows = [{"input_ids": list(range(3, 3 + n)), "completion_mask": [1] * n} for n in range(9, 20)]
    given = Given(data, (), test_kto.tokenizer(), batch_size=4, split=True)
    lines = replace(given, examples=Dataset.from_list(rows))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = Desirability().measure(model, given), PerplexityEvaluator().measure(model, lines)
        told = [str(one.message) for one in caught if "out of memory" in str(one.message)]
    values = {n: f.value for part in found for n, f in part.items() if n != "seconds"}
    return values, told, told_main() if full else []


def measured(file: str) -> list[Any]:
    return [figures(file, full) for full in (None, Full(1, 2, training=False))]


@pytest.mark.slow
def test_evaluations_go_on(tmp_path) -> None:
    file = str(test_kto.written(tmp_path, test_kto.ROWS))
    first, second = in_processes(2, measured, tmp_path, file)
    (expected, *_), (found, told, heard) = first
    assert len(expected) > 6
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert second[0][0] == expected
    assert second[1][0] == found
    words = "out of memory in evaluation '{}': it goes on with {} examples at a time (process 1)"
    both = [words.format("desirability", n) for n in (2, 1)] * 2  # with the adapter and without
    assert heard == both + [words.format("perplexity", n) for n in (2, 1)]
    assert told == second[1][1] == []


def probed(folder: str) -> Any:
    """Process 1 holds no pass of four rows."""
    full = Full(1, 4, training=True)
    model, notes = model_of(full), Notes()
    rows = [{"input_ids": [*range(3, 3 + n)], "completion_mask": [1] * n} for n in range(9, 25)]
    with pytest.MonkeyPatch.context() as patched:
        make_up_card(patched, 20, lambda: 8)
        result = qa.train(
            *(model, Dataset.from_list(rows)),
            max_steps=2,
            per_device_train_batch_size=4,
            output=Path(folder) / str(world().rank),
            on_note=notes,
        )
    return result.setting, full.raised, [*notes]


@pytest.mark.slow
def test_all_take_the_setting_that_fits_on_each(tmp_path) -> None:
    (first, nothing, notes), (second, raised, _) = in_processes(2, probed, tmp_path, str(tmp_path))
    assert first == second
    assert first.micro_batch == 2
    assert nothing == 0
    assert raised > 0
    assert not out_of_memory(notes)
