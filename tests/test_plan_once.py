"""A plan is made once and handed on; what a hub id's config tells is added to it, once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from few_rows import few_rows
from llama_sizes import LLAMA_8B
from parameters import slow_but

import quantadapt as qa
from quantadapt import cli, demo, planning
from quantadapt.errors import PlanRefused
from quantadapt.machine import Machine
from quantadapt.memory import GIB
from quantadapt.planning import completed, on_disk
from quantadapt.planning import stage as planning_stage
from quantadapt.quantizing import stage as quantizing_stage
from quantadapt.registry import registry
from quantadapt.testing.small_demo import small_model

HUB_ID = "org/small"
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.fixture
def made(monkeypatch) -> dict[str, int]:
    """How often a plan was made, and how often one was completed."""
    counts = {"plan": 0, "completed": 0}

    def counted(name: str) -> Any:
        function = getattr(planning_stage, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    for name in counts:
        wrapped = counted(name)
        for module in (planning, planning_stage):
            monkeypatch.setattr(module, name, wrapped)
    monkeypatch.setattr(qa, "plan", planning.plan)  # it keeps what it was first asked for
    return counts


class Told:
    """A plugin that remembers the plans that it was told of."""

    def __init__(self) -> None:
        self.plans: list[Any] = []

    @qa.hookimpl
    def quantadapt_stage_done(self, stage, value):
        if stage == "plan":
            self.plans.append(value)


@pytest.fixture
def told():
    plugin = Told()
    registry().manager.register(plugin, "told")
    yield plugin.plans
    registry().manager.unregister(plugin)


@pytest.fixture
def on_the_hub(tmp_path, monkeypatch) -> Any:
    """Put a checkpoint into the hub's cache, as it lies there after a download; with `late`, its
    config is found only once somebody has read the model."""

    def put(checkpoint: str | Path, late: bool) -> None:
        repository = tmp_path / "hub" / "models--org--small"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        (repository / "snapshots").mkdir()
        (repository / "snapshots" / ("0" * 40)).symlink_to(checkpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        if late:
            from quantadapt.loading import reading

            cached, read = on_disk.local_file, reading.read_config
            monkeypatch.setattr(on_disk, "local_file", lambda source, name: None)

            def arriving(source: str) -> Any:
                monkeypatch.setattr(on_disk, "local_file", cached)
                return read(source)

            monkeypatch.setattr(reading, "read_config", arriving)

    return put


def short(tmp_path, model, **values: Any) -> qa.Spec:
    """A run of one step."""
    return qa.Spec(
        model=str(model),
        backend=values.pop("backend", "hqq"),
        data=few_rows(),
        train={"max_steps": 1, "per_device_train_batch_size": 2},
        evaluate={"max_examples": 2, "samples": 0, "unquantized": False},
        export={"merge": "never"},
        output=str(tmp_path / "run"),
        device="cpu",
        **values,
    )


def test_a_run_plans_once(made, told, tmp_path) -> None:
    done = qa.run(short(tmp_path, small_model()))
    assert made == {"plan": 1, "completed": 0}
    assert told == [done.plan]
    assert told[0] is done.plan


def test_a_plan_that_was_made_is_carried_out(made, told, tmp_path) -> None:
    plan = qa.plan(short(tmp_path, small_model()))
    done = qa.run(plan)
    assert done.plan is plan
    assert told[0] is plan
    assert made["plan"] == 1


def test_so_does_the_command(made, told, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(short(tmp_path, small_model()).to_yaml())
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", "run.yaml"])
    assert not ended.value.code
    assert made == {"plan": 1, "completed": 0}
    assert len(told) == 1


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("command", slow_but([False, True], False))
def test_so_does_a_run_of_a_hub_id(
    late, command, made, told, on_the_hub, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    qa.save(qa.quantize(str(small_model()), "hqq", bits=3), tmp_path / "packed")
    made.update(plan=0, completed=0)
    on_the_hub(tmp_path / "packed", late)
    spec = short(tmp_path, HUB_ID)
    if command:
        (tmp_path / "run.yaml").write_text(spec.to_yaml())
        with pytest.raises(SystemExit) as ended:
            cli.main(["run", "run.yaml"])
        assert not ended.value.code
    else:
        qa.run(spec)
    assert made == {"plan": 1, "completed": int(late)}
    (plan,) = told
    assert plan.adopt
    assert plan.quantizer.bits == 3
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["adopt"]


def test_quantizing_a_hub_id_plans_once(made, on_the_hub, tmp_path) -> None:
    qa.save(qa.quantize(str(small_model()), "hqq", bits=3), tmp_path / "packed")
    made.update(plan=0, completed=0)
    on_the_hub(tmp_path / "packed", late=True)
    model = qa.quantize(HUB_ID, "hqq")
    assert made == {"plan": 1, "completed": 1}
    assert model.quantadapt.quantizer.bits == 3


class TestCompleted:
    """A plan that gets its config later is the one that would have been made with it."""

    def plans(self, monkeypatch, config, *, gib=24.0, count=1, **values):
        """Return the plan without the config, and the one that was made with it."""
        machine = Machine(cuda=((9, 0),) * count, memory=(int(gib * GIB),) * count)
        spec = qa.Spec(
            model=HUB_ID,
            data={"path": str(demo.TRAIN_FILE), "max_length": 2048},
            **{"backend": "bnb-nf4", "evaluate": {"unquantized": False}} | values,
        )
        monkeypatch.setattr(planning_stage, "config_of", lambda _: None)
        early = planning_stage.plan(spec, machine=machine, processes=count)
        monkeypatch.setattr(planning_stage, "config_of", lambda _: config)
        return early, lambda: planning_stage.plan(spec, machine=machine, processes=count)

    @pytest.mark.parametrize(
        ("config", "values"),
        [
            (LLAMA_8B, {}),
            (LLAMA_8B, {"gib": 16}),  # too small to merge on
            (LLAMA_8B, {"gib": 7, "count": 2}),  # too small for the whole base
            (LLAMA_8B | {"quantization_config": NF4}, {}),
            ({"model_type": "t5", "is_encoder_decoder": True}, {}),
            ({}, {}),
        ],
    )
    def test_is_the_same_plan(self, monkeypatch, config, values) -> None:
        early, whole = self.plans(monkeypatch, config, **values)
        assert (early.config, early.memory, early.adopt) == (None, None, False)
        found, expected = completed(early, config), whole()
        assert found.to_dict() | {"notes": set(found.notes)} == expected.to_dict() | {
            "notes": set(expected.notes)
        }
        assert found.config == config
        assert completed(found, {"model_type": "other"}) is found

    @pytest.mark.parametrize(
        ("config", "values", "told"),
        [
            (LLAMA_8B, {"gib": 3}, "a GPU of 3 GiB is too small"),
            (LLAMA_8B | {"quantization_config": {"quant_method": "hqq"}}, {}, "quantized with hqq"),
            (LLAMA_8B | {"quantization_config": NF4}, {"adapter": "loftq"}, "LoftQ compares"),
            (
                {"model_type": "t5", "is_encoder_decoder": True},
                {"count": 2, "train": {"parallel": "fsdp"}},
                "encoder-decoder models are not sharded",
            ),
        ],
    )
    def test_is_refused_alike(self, monkeypatch, config, values, told) -> None:
        early, whole = self.plans(monkeypatch, config, **values)
        with pytest.raises(PlanRefused, match=told) as found:
            completed(early, config)
        with pytest.raises(PlanRefused) as expected:
            whole()
        assert found.value.problems == expected.value.problems

    def test_notes_of_options_that_turn_out_otherwise_go(self, monkeypatch) -> None:
        notes = lambda self, device: (f"{type(self).__name__}: {self.double_quant}",)  # noqa: E731
        monkeypatch.setattr(registry().backend("bnb-nf4").quantizer, "notes", notes)
        config = LLAMA_8B | {"quantization_config": NF4 | {"bnb_4bit_use_double_quant": False}}
        early, _ = self.plans(monkeypatch, config)
        assert "NF4: True" in early.notes
        found = completed(early, config).notes
        assert "NF4: False" in found
        assert "NF4: True" not in found


def test_a_config_that_no_cache_keeps_is_transformers_own(monkeypatch) -> None:
    """Of ids without an owner, say, whose files are not looked for."""
    from transformers import LlamaConfig

    early = planning_stage.plan(qa.Spec(model="org/gone"), machine=Machine())
    monkeypatch.setattr(quantizing_stage, "config_of", lambda _: None)
    monkeypatch.setattr(
        "quantadapt.loading.reading.read_config",
        lambda source: LlamaConfig(vocab_size=77),
    )
    assert quantizing_stage.with_config(early).config["vocab_size"] == 77


# The spec of a plan plans the same again ----------------------------------------------------------


@pytest.mark.parametrize("backend", ["none", "hqq", "bnb-nf4", "quanto", "torchao-int8"])
@pytest.mark.parametrize("adapter", ["lora", "dora", "pissa", "adalora", "ia3", "vera"])
def test_what_was_resolved_plans_the_same(backend, adapter, tmp_path) -> None:
    wanted = {"name": adapter, "target_modules": {"q_proj", "v_proj"}}
    made = qa.plan(qa.Spec(backend=backend, adapter=wanted), check_output=False)
    file = tmp_path / "spec.yaml"
    file.write_text(made.resolved.to_yaml())
    again = qa.plan(qa.Spec.load(file), check_output=False)
    assert again.to_dict() == made.to_dict()


def test_the_spec_of_a_run_holds_what_its_options_were(tmp_path, monkeypatch) -> None:
    """Also where a later version has other defaults."""
    made = qa.plan(qa.Spec(backend="hqq", adapter="lora", output=str(tmp_path / "run")))
    spec = made.resolved
    assert spec.backend.options == made.quantizer.model_dump()
    assert spec.adapter.options == {"r": 16, "lora_alpha": 32}
    lora = registry().adapter("lora")
    monkeypatch.setitem(lora.defaults, "r", 64)
    assert qa.plan(spec, check_output=False).adapter_options["r"] == 16


def test_a_module_and_a_checkpoint_are_one_too_many() -> None:
    from torch import nn

    with pytest.raises(PlanRefused, match="some/model is not read"):
        qa.plan(qa.Spec(model="some/model"), module=nn.Linear(2, 2), check_output=False)


def test_nothing_is_left_to_fit_where_all_is_quantized(tmp_path) -> None:
    config = {**LLAMA_8B, "quantization_config": NF4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = qa.Spec(model=str(tmp_path), backend="bnb-nf4", skip_misfits=True)
    with pytest.raises(PlanRefused, match="quantized already: no layer is left"):
        qa.plan(spec, check_output=False, weights=False)
