"""`train.parallel: auto`: ddp where each GPU holds the base, fsdp where only a share fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from llama_sizes import LLAMA_8B
from processes import in_processes

from quantadapt import demo, stages
from quantadapt.capabilities import Cell
from quantadapt.distributed import world
from quantadapt.errors import MergeRefused, PlanRefused, TrainingError
from quantadapt.machine import Machine
from quantadapt.memory import GIB
from quantadapt.pipeline.base import meet
from quantadapt.planning import Plan, plan
from quantadapt.planning.processes import FASTER, device_problems, shard_problems
from quantadapt.registry import registry
from quantadapt.spec import Spec

LARGE, SMALL, TINY = 24, 7, 4.5
"""GiB of cards that hold the whole base, a half of it, and neither."""


def two_cards(gib: float, other: float | None = None) -> Machine:
    sizes = (int(gib * GIB), int((other or gib) * GIB))
    return Machine(cuda=((9, 0),) * 2, memory=sizes)


@pytest.fixture
def planned(tmp_path: Path) -> Any:
    """Plan training a Llama of 8B parameters, of which only the config is there."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA_8B), encoding="utf-8")

    def call(machine: Machine, processes: int = 2, **values: Any) -> Plan:
        options: dict[str, Any] = {
            "model": str(tmp_path / "model"),
            "backend": "bnb-nf4",
            "data": {"path": str(demo.TRAIN_FILE), "max_length": 2048},
            "evaluate": {"unquantized": False},
            "output": str(tmp_path / "run"),
        }
        given = {name: values.pop(name) for name in ("cards", "check_output") if name in values}
        made = Spec(**options | values)
        return plan(made, machine=machine, processes=processes, weights=False, **given)

    return call


def test_a_base_that_fits_is_whole(planned) -> None:
    made = planned(two_cards(LARGE))
    assert (made.parallel, made.memory.work.shards) == ("ddp", 1)
    assert "ddp: each GPU holds the whole base, which is the fastest" in made.notes


def test_a_base_of_which_a_share_fits_is_shared(planned) -> None:
    made = planned(two_cards(SMALL))
    assert (made.parallel, made.memory.work.shards, made.merge) == ("fsdp", 2, "never")
    assert made.memory.cards[0].fits
    why = "fsdp: a GPU of 7 GiB is too small for the whole base, and large enough for a share"
    assert any(note.startswith(why) for note in made.notes)
    assert made.merge_refusals[0].rule == "fsdp-no-merge"


def test_the_smallest_card_of_the_run_decides(planned) -> None:
    assert planned(two_cards(LARGE, SMALL)).parallel == "fsdp"
    machine = Machine(cuda=((9, 0),) * 3, memory=(24 * GIB, 24 * GIB, 4 * GIB))
    assert planned(machine).parallel == "ddp"


def test_what_the_spec_says_wins(planned) -> None:
    told = "the unquantized base is not measured"
    for measured in (False, True):
        values = {"train": {"parallel": "fsdp"}, "evaluate": {"unquantized": measured}}
        made = planned(two_cards(LARGE), **values)
        assert made.parallel == "fsdp"
        assert any(told in note for note in made.notes) == measured
        assert FASTER in made.notes
    assert FASTER not in planned(two_cards(SMALL), train={"parallel": "fsdp"}).notes
    assert planned(two_cards(LARGE), processes=1).parallel == "none"
    limited = planned(two_cards(LARGE), train={"memory": 5.4})
    assert limited.parallel == "fsdp"


def test_processes_that_write_nothing_decide_alike(planned) -> None:
    made = planned(two_cards(SMALL), check_output=False)
    assert (made.parallel, made.memory) == ("fsdp", None)


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"adapter": "pissa"}, "fsdp-keeps-the-base"),
        ({"export": {"merge": "requantize"}}, "fsdp-no-merge"),
    ],
)
def test_what_forbids_sharing_is_respected_and_told(planned, values, rule) -> None:
    made = planned(two_cards(SMALL), **values)
    assert made.parallel == "ddp"
    (note,) = (note for note in made.notes if note.startswith("ddp, though a GPU of 7 GiB"))
    assert f"[rule {rule}]" in note
    with pytest.raises(PlanRefused, match=r"a GPU of 4\.5 GiB is too small") as caught:
        planned(two_cards(TINY), **values)
    (problem,) = caught.value.problems
    assert f"[rule {rule}]" in problem.what
    assert "fsdp on" not in problem.fix


def test_neither_fits(planned) -> None:
    with pytest.raises(PlanRefused) as caught:
        planned(two_cards(TINY))
    assert "fsdp on 4 GPUs" in str(caught.value)


@pytest.mark.parametrize(
    ("device", "local_rank", "told"),
    [
        ("cuda", 1, ""),  # the second of two on the second of two machines
        ("cuda", 2, "3 GPUs are wanted, there are 2"),
        ("cuda:1", 1, ""),
        ("cuda:0", 1, "want one each"),
    ],
)
def test_launched_processes_look_at_their_own_machine(
    device, local_rank, told, monkeypatch
) -> None:
    for name, value in {"RANK": 2 + local_rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    found = device_problems(Spec(device=device), two_cards(LARGE), 4)
    assert [told in problem.what for problem in found] == [True] * bool(told)
    assert device_problems(Spec(device="auto"), Machine(), 4) == []  # gloo, to try it out


@pytest.mark.parametrize(
    ("start", "iterations", "refused"),
    [
        ("pissa_niter_4", 1, True),
        ("olora", 1, True),
        ("corda", 1, True),
        ("lora_ga", 1, True),
        ("loftq", 1, False),
        ("loftq", 2, True),  # quantizes the base again
        ("gaussian", 1, False),
        (True, 1, False),
    ],
)
def test_starts_that_rewrite_the_base_cannot_share_it(start, iterations, refused) -> None:
    options = {"init_lora_weights": start, "loftq_config": {"loftq_iter": iterations}}
    cell = Cell(backend="hqq", adapter="lora", adapter_options=options)
    backend, adapter = registry().backend("hqq"), registry().adapter("lora")
    found = shard_problems(cell, backend, adapter, {"model_type": "llama"})
    assert [problem.rule for problem in found] == ["fsdp-keeps-the-base"] * refused


def test_where_no_card_is_known_the_base_is_whole(planned) -> None:
    made = planned(Machine(), device="cpu")
    assert made.parallel == "ddp"
    assert not any("ddp" in note for note in made.notes)
    assert planned(Machine(cuda=((9, 0),) * 2)).parallel == "ddp"


def test_cards_that_are_asked_about_need_not_be_here(planned) -> None:
    made = planned(Machine(), cards=(SMALL,))
    assert (made.parallel, made.memory.cards[0].fits) == ("fsdp", True)
    assert planned(Machine(), cards=(LARGE,)).parallel == "ddp"
    for device in ("auto", "cuda"):
        with pytest.raises(PlanRefused, match="there are none that torch can use"):
            planned(Machine(), device=device)


def test_asked_for_sharing_is_refused_to_a_merge(planned) -> None:
    with pytest.raises(MergeRefused, match="fsdp-no-merge"):
        planned(two_cards(LARGE), train={"parallel": "fsdp"}, export={"merge": "dense"})


def test_stages_leave_sharding_to_their_caller(monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(stages.planning, "plan", lambda spec, **_: seen.append(spec) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stages.quantize(None, "hqq")
    assert seen[0].train.parallel == "ddp"


def meeting(kinds: tuple[str, str]) -> str:
    spec = Spec(train={"parallel": kinds[world().rank]}, device="cpu")
    try:
        meet(plan(spec, check_output=False))
    except TrainingError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_processes_that_planned_otherwise_do_not_wait_for_each_other(tmp_path) -> None:
    for found in in_processes(2, meeting, tmp_path, ("ddp", "fsdp")):
        assert "set train.parallel to fsdp or ddp" in found
    assert in_processes(2, meeting, tmp_path, ("fsdp", "fsdp")) == ["", ""]
