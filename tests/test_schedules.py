"""Schedules of the learning rate with options: the rates are transformers' own, and what does not
work is refused by the plan, all of it at once."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import OBJECTIVES, answered
from transformers import get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, GreedyLR
from transformers.trainer_utils import SchedulerType

import quantadapt as qa
from quantadapt.errors import PlanRefused
from quantadapt.planning.schedules import FOLLOWS_LOSS, schedule_options, schedule_problems
from quantadapt.spec import Spec, TrainSpec, apply_overrides
from quantadapt.testing.small_demo import small_model
from quantadapt.training import problems
from quantadapt.training.stage import train

RATE, STEPS = 0.01, 10
OPTIONS: dict[str, dict[str, Any]] = {
    "linear": {},
    "cosine": {"num_cycles": 0.25},
    "cosine_with_restarts": {"num_cycles": 3},
    "polynomial": {"lr_end": 1e-3, "power": 2.0},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {"timescale": 4},
    "cosine_with_min_lr": {"min_lr": 1e-3},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.2, "warmup_lr_rate": 0.5},
    "warmup_stable_decay": {"num_decay_steps": 4, "decay_type": "linear", "min_lr_ratio": 0.1},
}


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE)


def stock_rates(name: str, options: dict[str, Any], warmup: int, steps: int) -> list[float]:
    """Return the rate of each step by transformers' own scheduler."""
    over = optimizer()
    schedule = get_scheduler(name, over, warmup, steps, options or None)
    rates = []
    for _ in range(steps):
        rates.append(over.param_groups[0]["lr"])
        over.step()
        schedule.step()
    return rates


def test_all_of_transformers_schedules_are_here() -> None:
    assert {*OPTIONS, *FOLLOWS_LOSS} == {member.value for member in SchedulerType}


@pytest.mark.parametrize("name", OPTIONS)
def test_rates_are_those_of_transformers(name: str, random_data, tokenizer, tmp_path) -> None:
    model = qa.attach(qa.quantize(str(small_model(1)), "none"), "lora", seed=0)
    spec = TrainSpec(
        learning_rate=RATE, max_steps=STEPS, logging_steps=1, per_device_train_batch_size=1,
        warmup_ratio=0.2, lr_scheduler_type=name, lr_scheduler_kwargs=OPTIONS[name],
    )  # fmt: skip
    assert schedule_problems(spec) == problems(spec) == []
    rates = list[float]()
    given: Any = {"on_log": lambda log: rates.append(log["learning_rate"]), "output": tmp_path}
    train(model, tokenizer, random_data, spec, seed=0, **given)
    wanted = stock_rates(name, OPTIONS[name], warmup=2, steps=STEPS)
    assert rates == pytest.approx(wanted, rel=1e-9, abs=1e-15)
    if OPTIONS[name]:  # and they are others than without options
        plain = {"min_lr": 0.0} if "min_lr" in schedule_options(name) else {}
        plain |= {"num_decay_steps": 3} if "num_decay_steps" in schedule_options(name) else {}
        assert rates != pytest.approx(stock_rates(name, plain, 2, STEPS), rel=1e-3)


@pytest.mark.parametrize("name", FOLLOWS_LOSS)
@pytest.mark.parametrize("cut", [False, True])
def test_what_follows_the_loss_gets_that_of_validations(
    name: str, cut: bool, random_data, tokenizer, tmp_path
) -> None:
    """The rates are those of torch's or transformers' scheduler that is told the same losses; also
    of a run that was cut in two."""
    options: dict[str, Any] = {"factor": 0.5, "patience": 0, "threshold": 10.0, "min_lr": 1e-3}
    options |= {"threshold_mode": "rel"} if name == "greedy" else {}
    rates, given = list[float](), {"eval_steps": 2, "save_steps": 4, "lr_scheduler_type": name}
    result: Any = None
    for steps, resume in [(4, False), (STEPS, True)] if cut else [(STEPS, False)]:
        model = qa.attach(qa.quantize(str(small_model(1)), "none"), "lora", seed=0)
        spec = TrainSpec(
            learning_rate=RATE, max_steps=steps, logging_steps=1, lr_scheduler_kwargs=options,
            per_device_train_batch_size=1, resume=resume, **given,
        )  # fmt: skip
        result = train(
            *(model, tokenizer, random_data, spec),
            seed=0, output=tmp_path, held_out=random_data.select(range(4)),
            on_log=lambda log: rates.append(log["learning_rate"]) if "loss" in log else None,
        )  # fmt: skip
    over, losses = optimizer(), dict(result.validation)
    kind: Any = torch.optim.lr_scheduler.ReduceLROnPlateau
    schedule, wanted = (GreedyLR if name == "greedy" else kind)(over, **options), []
    for step in range(1, STEPS + 1):
        wanted.append(over.param_groups[0]["lr"])
        if step in losses:
            schedule.step(losses[step])
    assert sorted(losses) == [2, 4, 6, 8, 10]
    assert rates == pytest.approx(wanted, rel=1e-9)
    assert len({*wanted}) > 3


def test_options_are_those_that_functions_have() -> None:
    """They are read from the source; importing it says the same."""
    given = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    classes = {"reduce_lr_on_plateau": torch.optim.lr_scheduler.ReduceLROnPlateau,
               "greedy": GreedyLR}  # fmt: skip
    for member, function in TYPE_TO_SCHEDULER_FUNCTION.items():
        made: Any = classes.get(member.value, function)
        parameters = {**inspect.signature(made).parameters}
        found = schedule_options(member.value)
        assert [*found] == [name for name in parameters if name not in given]
        assert {name for name, option in found.items() if not option.default} == {
            name for name in found if parameters[name].default is inspect.Parameter.empty
        }


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("cosine_with_min_lr", {}, {"": "One of min_lr or min_lr_rate should be set"}),
        ("cosine_warmup_with_min_lr", {"min_lr": 1e-5, "min_lr_rate": 0.1}, {"": "Only one of"}),
        ("linear", {"min_lr": 1e-5}, {".min_lr": "'linear' has no option 'min_lr'"}),
        ("constant_with_warmup", {"power": 1}, {".power": "leave it out: it takes none"}),
        ("polynomial", {"lr_end": 1.0}, {"": "lr_end (1.0) must be smaller than initial lr"}),
        ("cosine_with_restarts", {"num_cycles": "two"}, {".num_cycles": "'two' does not fit"}),
        ("cosine_with_min_lr", {"min_lr": 1.0}, {".min_lr": "above the learning rate of 0.01"}),
        ("greedy", {"min_lr": 0.5}, {".min_lr": "above the learning rate", " ": "measures it"}),
        ("warmup_stable_decay",
         {"num_decay_step": 3, "decay_type": "cosin", "min_lr_ratio": "low"},
         {".num_decay_step": "did you mean 'num_decay_steps'?", ".num_decay_steps": "needs it",
          ".min_lr_ratio": "give float", "": "Unknown decay type: cosin"}),
        ("reduce_lr_on_plateau", {"mode": "mid"}, {".mode": "give min or max",
                                                   " ": "set train.eval_steps"}),
        ("cosin", {}, {" ": "did you mean 'cosine'?"}),
    ],
)  # fmt: skip
def test_all_that_is_wrong_is_told_by_the_plan(name, options, told, random_data, tmp_path) -> None:
    values: dict[str, Any] = {"lr_scheduler_type": name, "lr_scheduler_kwargs": options}
    with pytest.raises(PlanRefused) as caught:
        qa.plan(Spec(train={"learning_rate": RATE, **values}, output=str(tmp_path / "run")))
    found = {problem.where: str(problem) for problem in caught.value.problems}
    place = {" ": "train.lr_scheduler_type"}
    wanted = {place.get(key, f"train.lr_scheduler_kwargs{key}"): say for key, say in told.items()}
    assert found.keys() == wanted.keys()
    assert all(say in found[where] for where, say in wanted.items())
    model = qa.attach(qa.quantize(str(small_model(1)), "none"), "lora")
    with pytest.raises(PlanRefused) as again:
        qa.train(model, random_data, learning_rate=RATE, output=tmp_path / "run", **values)
    assert {p.where for p in again.value.problems} == found.keys()
    assert not (tmp_path / "run").exists()


def test_a_schedule_of_more_steps_than_the_run_has_is_refused() -> None:
    def told(**options: Any) -> list[str]:
        given: Any = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": options}
        return [p.what for p in schedule_problems(TrainSpec(warmup_ratio=0.2, **steps, **given))]

    steps = {"max_steps": 10}
    assert told(num_decay_steps=8) == told(num_decay_steps=3, num_stable_steps=5) == []
    assert told(num_decay_steps=9) == [
        "num_decay_steps and 2 of warmup are more than the run's steps"
    ]
    assert len(told(num_decay_steps=3, num_stable_steps=6)) == 1
    assert max(stock_rates("warmup_stable_decay", {"num_decay_steps": 20}, 2, 10)[2:]) < RATE
    steps = {"num_train_epochs": 1}
    assert told(num_decay_steps=900) == []


def test_what_only_the_class_knows_is_told_before_any_work(tmp_path: Path) -> None:
    train = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_steps": 1,
             "lr_scheduler_kwargs": {"factor": 1.5}}  # fmt: skip
    spec = Spec(model=str(small_model(1)), train=train, output=str(tmp_path / "run"))
    with pytest.raises(PlanRefused, match=r"Factor should be < 1\.0"):
        qa.run(spec)
    assert not (tmp_path / "run").exists()


def test_yaml_and_assignments_say_the_same_and_the_plan_tells_it(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "train:\n  learning_rate: 1e-3\n  lr_scheduler_type: cosine_with_min_lr\n"
        "  lr_scheduler_kwargs: {min_lr: 1e-5, num_cycles: 0.5}\n"
    )
    given = ["train.learning_rate=1e-3", "train.lr_scheduler_type=cosine_with_min_lr",
             "train.lr_scheduler_kwargs.min_lr=1e-5",
             "train.lr_scheduler_kwargs.num_cycles=0.5"]  # fmt: skip
    spec = Spec.load(file)
    assert spec.train == Spec(**apply_overrides({}, given)).train
    assert spec.train.lr_scheduler_kwargs == {"min_lr": 1e-5, "num_cycles": 0.5}
    (tmp_path / "again.yaml").write_text(spec.to_yaml())
    assert Spec.load(tmp_path / "again.yaml").train == spec.train


FEW = ("sft", "kto", "grpo")


@pytest.mark.parametrize(
    "objective", [pytest.param(o, marks=() if o in FEW else pytest.mark.slow) for o in OBJECTIVES]
)
def test_every_objective_takes_them(objective: str, tmp_path: Path) -> None:
    own, options = OBJECTIVES[objective], {"min_lr": 1e-3}
    made = qa.run(
        Spec(
            model=str(small_model(1)),
            backend="hqq",
            objective={"name": objective, **answered(tmp_path, own)},
            data={"max_examples": 12, "max_length": 64, **own.get("data", {})},
            train={
                **{"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1},
                **{"learning_rate": RATE, "warmup_ratio": 0.0},
                **{"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": options},
            },
            evaluate={"unquantized": False, "max_examples": 4, "samples": 0, "evaluations": []},
            export={"merge": "never"},
            device="cpu",
            output=str(tmp_path / "run"),
        )
    )
    lines = (made.folder / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line)["learning_rate"] for line in lines]
    wanted = stock_rates("cosine_with_min_lr", options, warmup=0, steps=3)
    assert rates == pytest.approx(wanted, rel=1e-6)
