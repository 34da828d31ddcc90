"""The plan: everything decided and every mistake found before any work starts."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from pluggy import PluginManager
from pydantic import BaseModel, ConfigDict, Field

from quantadapt import demo
from quantadapt.capabilities import Cell, Merge, Rule, refusals
from quantadapt.errors import MergeRefused, PlanRefused
from quantadapt.folders.run_folder import RunFolder
from quantadapt.machine import Machine
from quantadapt.memory import GIB
from quantadapt.paths import is_local_path
from quantadapt.planning import plan
from quantadapt.planning.exports import export_of, makes_dense
from quantadapt.planning.parts import Draft, options_of, record_of
from quantadapt.planning.refusals import refusals_beside
from quantadapt.protocols import Quantizer
from quantadapt.records import Backend
from quantadapt.registry.discovery import Provenance, Registry, _Entry, registry
from quantadapt.spec import BackendSpec, Spec

CPU = Machine()
CARD = Machine(cuda=((9, 0),))


def problems(**values) -> dict[str, str]:
    with pytest.raises(PlanRefused) as caught:
        plan(Spec(**values), machine=values.pop("machine", CPU))
    return {problem.where: str(problem) for problem in caught.value.problems}


def test_the_default_plan_is_the_demo() -> None:
    made = plan(Spec(), machine=CPU)
    assert made.model == str(demo.MODEL_DIR)
    assert (made.backend.name, made.adapter.name) == ("hqq", "lora")
    assert (made.device, made.dtype, made.merge) == ("cpu", "float32", "dense")
    assert made.quantizer.model_dump() == {"bits": 4, "group_size": 64, "axis": 1}
    assert made.spec.train.max_steps == demo.TRAIN_DEFAULTS["max_steps"]
    json.dumps(made.to_dict())


def test_what_the_user_says_wins_over_the_demo() -> None:
    assert plan(Spec(train={"max_steps": 7}), machine=CPU).spec.train.max_steps == 7


def test_other_objectives_take_smaller_steps_on_the_demo() -> None:
    rates = [plan(Spec(objective={"name": n}), machine=CPU).spec.train.learning_rate
             for n in ("sft", "dpo", "reward")]  # fmt: skip
    assert rates == [4e-3, 1e-3, 1e-3]


def test_device_and_dtype_follow_the_machine() -> None:
    made = plan(Spec(), machine=CARD)
    assert (made.device, made.dtype) == ("cuda", "bfloat16")
    assert plan(Spec(), machine=Machine(cuda=((7, 5),))).dtype == "float16"


def test_all_mistakes_come_at_once() -> None:
    found = problems(
        model="./nowhere",
        backend={"name": "hqq", "bits": 5, "groupsize": 8},
        adapter={"name": "lora", "lora_alfa": 4, "r": "big", "lora_dropout": 0.1},
        device="cuda",
        data={"path": "missing.jsonl"},
    )
    assert set(found) == {
        "model",
        "backend.bits",
        "backend.groupsize",
        "adapter.lora_alfa",
        "adapter.r",
        "device",
        "data.path",
    }
    assert "did you mean 'group_size'?" in found["backend.groupsize"]
    assert "use one of 1, 2, 3, 4 or 8" in found["backend.bits"]
    assert "did you mean 'lora_alpha'?" in found["adapter.lora_alfa"]


def test_unknown_backend_and_adapter_are_both_told() -> None:
    found = problems(backend="hqqq", adapter="lorra")
    assert "did you mean 'hqq'?" in found["backend"]
    assert "did you mean 'lora'?" in found["adapter"]


def test_a_rule_refuses_with_reason_and_fix() -> None:
    found = problems(backend={"name": "torchao-int4", "layout": "tile_packed"}, dtype="bfloat16")
    text = found["torchao-int4 x lora"]
    assert "torchao-tiles-need-cuda" in text
    assert "fix: use layout: unpacked" in text


@pytest.mark.parametrize("choice", ["dense", "requantize"])
def test_a_forbidden_merge_is_refused_before_any_work(choice) -> None:
    with pytest.raises(MergeRefused) as caught:
        plan(Spec(adapter="lily", export={"merge": choice}), machine=CPU)
    (problem,) = caught.value.problems
    assert problem.rule == "lily-no-merge"
    assert "keep the adapter beside the base" in problem.fix


def test_auto_merge_turns_into_never_and_says_why() -> None:
    made = plan(Spec(adapter="lily"), machine=CPU)
    assert made.merge == "never"
    assert made.merge_refusals[0].rule == "lily-no-merge"


@pytest.mark.parametrize("memory", [(), (24 * GIB,)])
@pytest.mark.parametrize("device", ["cuda:3", "cuda:x"])
def test_a_device_index_that_does_not_exist(device, memory) -> None:
    with pytest.raises(PlanRefused, match="use cuda:0 to cuda:0"):
        plan(Spec(device=device), machine=Machine(cuda=((9, 0),), memory=memory))


class TestANamedRecord:
    """Name, requirements and options of every kind of record are looked at in one way."""

    class Options(BaseModel):
        """Two options, of which one has to be given."""

        model_config = ConfigDict(extra="forbid")
        size: int
        rate: float = Field(0.5, gt=0)

    def made(self, *requires, **named):
        record = Backend("toy", "", quantizer=Quantizer, requires=requires)
        known = Registry(PluginManager("toy"))
        known._tables["backend"]["toy"] = [_Entry(record, Provenance("toy"))]
        draft, spec = Draft(Spec(), CPU, known), BackendSpec(**named)
        found = record_of(draft, Backend, spec)
        options = options_of(draft, found, spec, lambda _: self.Options)
        return options, {problem.where: str(problem) for problem in draft.problems}

    def test_its_options_are_made(self) -> None:
        options, found = self.made(name="toy", size=3)
        assert (options, found) == (self.Options(size=3), {})

    def test_all_that_is_wrong_is_told(self) -> None:
        options, found = self.made("not-there>=1", name="toy", sise=3, rate=0)
        assert options is None
        assert set(found) == {"backend", "backend.size", "backend.sise", "backend.rate"}
        assert "pip install 'not-there>=1'" in found["backend"]
        assert "did you mean 'size'?" in found["backend.sise"]
        assert "use a value greater than 0" in found["backend.rate"]

    def test_so_is_a_name_that_nothing_has(self) -> None:
        options, found = self.made(name="toyy")
        assert options is None
        assert "did you mean 'toy'?" in found["backend"]


class TestCardsThatAreAskedAbout:
    """They need not be here: the plan is for them, whatever this machine has."""

    @pytest.mark.parametrize("device", ["auto", "cuda", "cuda:1"])
    @pytest.mark.parametrize("machine", [CPU, CARD, Machine(cuda=((7, 5),))])
    def test_the_plan_is_for_a_gpu(self, device, machine) -> None:
        made = plan(Spec(device=device, train={"memory": 8}), machine=machine, cards=(24,))
        assert (made.device, made.dtype) == ("cuda", "bfloat16")
        assert not any("this run has none" in note for note in made.notes)

    def test_a_backend_for_gpus_alone_can_be_asked_about(self) -> None:
        backend = {"name": "torchao-int4", "layout": "tile_packed"}
        made = plan(Spec(backend=backend), machine=CPU, cards=(24,))
        assert made.device == "cuda"

    def test_what_the_spec_says_stays(self) -> None:
        made = plan(Spec(device="cpu", dtype="float16"), machine=CPU, cards=(24,))
        assert (made.device, made.dtype) == ("cpu", "float16")


@pytest.mark.parametrize(
    ("adapter", "option", "value", "words"),
    [
        ("lora", "r", "big", "is not of type"),
        ("lora", "target_modules", "*_proj", "is no regular expression: nothing to repeat"),
        ("loftq", "loftq_config", 3, "has another form"),
        ("loftq", "loftq_config", {"loftq_iter": "two"}, "has another form"),
    ],
)
def test_an_option_that_cannot_be_used_is_told(adapter, option, value, words) -> None:
    found = problems(adapter={"name": adapter, option: value})
    assert list(found) == [f"adapter.{option}"]
    assert words in found[f"adapter.{option}"]


def test_data_may_lie_in_the_home_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    assert plan(Spec(data="~/a.jsonl"), machine=CPU).spec.data.path == "~/a.jsonl"
    assert list(problems(data="~/b.jsonl")) == ["data.path"]


def test_so_may_the_model(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").symlink_to(demo.MODEL_DIR)
    assert plan(Spec(model="~/model"), machine=CPU).model == str(tmp_path / "model")
    assert list(problems(model="~/other")) == ["model"]


class TestMergingNeedsMemory:
    """A dense merged model is made beside the quantized one: 23 GiB for one of 8B parameters."""

    def planned(self, tmp_path, gib, merge="auto", **values):
        sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
        sizes |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
        config = {"model_type": "llama", "rms_norm_eps": 1e-5, **sizes}
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
        spec = Spec(
            model=str(tmp_path / "model"),
            backend="bnb-nf4",
            data=str(demo.TRAIN_FILE),
            evaluate={"unquantized": False},
            export={"merge": merge},
            output=str(tmp_path / "run"),
        )
        machine = Machine(cuda=((9, 0),), memory=(gib * GIB,))
        return plan(spec, machine=machine, weights=False, **values)

    def test_a_large_card_merges(self, tmp_path) -> None:
        assert self.planned(tmp_path, 40).merge == "dense"

    def test_a_small_one_trains_and_says_how_to_merge(self, tmp_path) -> None:
        made = self.planned(tmp_path, 16)
        assert made.merge == "never"
        (problem,) = made.merge_refusals
        assert problem.rule == "merge-needs-memory"
        assert "--onto BASE" in problem.fix
        assert self.planned(tmp_path, 40, cards=(16,)).merge == "never"

    def test_asked_for_it_is_refused_before_any_work(self, tmp_path) -> None:
        with pytest.raises(MergeRefused, match="merge-needs-memory"):
            self.planned(tmp_path, 16, "dense")
        assert self.planned(tmp_path, 16, "requantize").merge == "requantize"

    @pytest.mark.parametrize(
        ("backend", "rounding", "dense"),
        [
            ("bnb-nf4", "nearest", False),
            ("bnb-nf4", "compensated", True),
            ("bnb-nf4", "auto", False),
            ("gptq", "nearest", True),
            ("gptq", "auto", False),
            ("gptq", "dithered", False),
            ("gptq", "grid", False),
            ("gptq", "compensated", True),
        ],
    )
    def test_only_some_ways_of_rounding_make_all_of_it_dense(
        self, backend, rounding, dense
    ) -> None:
        record = registry().backend(backend)
        for name, options in (("merged-requantized", {}), ("vllm", {"content": "requantized"})):
            planned = export_of(name, {"rounding": rounding, **options})
            assert makes_dense(planned, record, merge_aware=False) is dense
        assert not makes_dense(export_of("merged-requantized", {}), record, merge_aware=True)


def test_planning_imports_nothing_heavy() -> None:
    code = (
        "import sys; from quantadapt.planning import plan; from quantadapt.spec import Spec;"
        "plan(Spec()); bad = {'torch', 'peft', 'transformers', 'hqq'} & set(sys.modules);"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class TestModelFolder:
    """Every way a checkpoint can be wrong is found without loading it."""

    def refused(self, folder) -> str:
        return problems(model=str(folder))["model"]

    def test_empty(self, tmp_path) -> None:
        assert "is empty" in self.refused(tmp_path)

    def test_not_a_model(self, tmp_path) -> None:
        (tmp_path / "notes.txt").write_text("hello")
        assert "no readable config.json" in self.refused(tmp_path)

    def test_a_run_that_has_not_ended(self, tmp_path) -> None:
        (tmp_path / "quantadapt-run.json").write_text('{"state": "interrupted"}')
        assert "is a run that has written no model yet" in self.refused(tmp_path)

    def test_a_file(self, tmp_path) -> None:
        file = tmp_path / "model.safetensors"
        file.write_text("x")
        assert "is a file" in self.refused(file)

    def copy(self, tmp_path):
        for name in ("config.json", "model.safetensors"):
            (tmp_path / name).write_bytes((demo.MODEL_DIR / name).read_bytes())
        return tmp_path / "model.safetensors"

    def test_cut_short(self, tmp_path) -> None:
        weights = self.copy(tmp_path)
        weights.write_bytes(weights.read_bytes()[:-1000])
        assert "cut short" in self.refused(tmp_path)

    def test_damaged_header(self, tmp_path) -> None:
        self.copy(tmp_path).write_bytes(b"\xff" * 200)
        assert "damaged" in self.refused(tmp_path)

    def test_pickle(self, tmp_path) -> None:
        self.copy(tmp_path).rename(tmp_path / "pytorch_model.bin")
        assert "pickles (pytorch_model.bin)" in self.refused(tmp_path)

    def test_missing_shard(self, tmp_path) -> None:
        self.copy(tmp_path)
        index = {"weight_map": {"a": "model-00002-of-00002.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        assert "shard model-00002-of-00002.safetensors is missing" in self.refused(tmp_path)

    def quantized(self, tmp_path, config):
        self.copy(tmp_path)
        file = tmp_path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": config}))

    def test_quantized_with_another_backend(self, tmp_path) -> None:
        self.quantized(tmp_path, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
        assert "use --backend bnb-nf4" in self.refused(tmp_path)

    def test_quantized_with_other_options(self, tmp_path) -> None:
        self.quantized(tmp_path, {"load_in_8bit": True, "llm_int8_threshold": 4.0})
        found = problems(model=str(tmp_path), backend={"name": "bnb-int8", "threshold": 6.0})
        assert "quantized already, with threshold=4.0" in found["backend.threshold"]
        made = plan(Spec(model=str(tmp_path), backend="bnb-int8"), machine=CPU)
        assert made.adopt
        assert made.quantizer.threshold == 4.0


class TestRules:
    """`refusals` is a pure function of rules and facts."""

    cell = Cell("b", "a", device="cpu", backend_options={"bits": 3}, adapter_options={"t": ["x"]})

    def test_all_conditions_have_to_match(self) -> None:
        rule = Rule("r", {"backend.bits": (3,), "device": ("cpu",)}, "why", "how")
        other = Rule("o", {"backend.bits": (3,), "device": ("cuda",)}, "why", "how")
        (problem,) = refusals(self.cell, [rule, other])
        assert (problem.rule, problem.what, problem.fix) == ("r", "why", "how")

    def test_a_rule_about_merging_does_not_forbid_attaching(self) -> None:
        rule = Rule("m", {"action": ("merge",)}, "why", "how")
        assert refusals(self.cell, [rule]) == []
        assert len(refusals(self.cell, [rule], "merge")) == 1

    def test_rules_of_another_kind_of_record_see_its_own_options(self) -> None:
        rules = (
            Rule("own", {"backend": ("b",), "backend.n": (1,)}, "why", "how"),
            Rule("both", {"backend.n": (1,), "adapter.t": (("x",),)}, "why", "how"),
            Rule("merge", {"action": ("merge",), "backend": ("b2",)}, "why", "how"),
        )
        record = Backend("b2", "any record will do", quantizer=Quantizer, rules=rules)
        (problem,) = refusals_beside(self.cell, record, {"n": 1})
        assert (problem.rule, problem.where) == ("both", "b x a x b2")
        (problem,) = refusals_beside(self.cell, record, {}, "merge")
        assert problem.rule == "merge"
        assert "backend.n" not in self.cell.facts("attach")

    def test_merge_kinds_are_ordered(self) -> None:
        assert Merge.NEVER < Merge.DENSE < Merge.REQUANTIZE


def test_there_has_to_be_a_run_to_resume(tmp_path) -> None:
    found = problems(output=str(tmp_path / "typo"), train={"resume": True}, backend="hqqq")
    assert set(found) == {"backend", f"output {tmp_path / 'typo'}"}
    assert "no earlier run to resume" in found[f"output {tmp_path / 'typo'}"]
    assert set(problems(train={"resume": True}, overwrite=True)) == {"output"}


def test_a_resumed_run_has_to_be_the_one_that_was_begun(tmp_path) -> None:
    adapter = {"name": "lora", "target_modules": {"q_proj", "k_proj", "v_proj"}}
    begun = {"output": str(tmp_path), "backend": "hqq", "adapter": adapter}
    made = plan(Spec(**begun), machine=CPU, check_output=False)
    with RunFolder.create(tmp_path) as folder:
        folder.write_text("spec.yaml", made.spec.to_yaml())
        folder.write_json("plan.json", made.to_dict())

    train = {"save_steps": 7, "resume": True}
    same = {"name": "hqq", "bits": 4}
    plan(Spec(**begun | {"train": train, "backend": same}), machine=CPU)
    found = problems(
        output=str(tmp_path),
        backend={"name": "hqq", "bits": 3},
        adapter=adapter | {"r": 4},
        train=train | {"per_device_train_batch_size": 2},
        seed=3,
    )
    assert set(found) == {
        "backend.bits",
        "adapter.r",
        "train.per_device_train_batch_size",
        "seed",
    }
    assert f"3 makes it another run; the one in {tmp_path} has 0" in found["seed"]


def test_the_options_of_lora_under_their_usual_names() -> None:
    found = problems(adapter={"name": "lora", "rank": 8, "alpha": 8})
    assert "did you mean 'r'?" in found["adapter.rank"]
    assert "did you mean 'lora_alpha'?" in found["adapter.alpha"]


def test_an_output_below_a_file_is_refused(tmp_path) -> None:
    (tmp_path / "file").touch()
    output = str(tmp_path / "file" / "run")
    found = problems(output=output)
    assert f"{tmp_path / 'file'} is a file" in found[f"output {output}"]


def test_a_taken_output_folder_is_refused_with_the_rest(tmp_path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    found = problems(output=str(tmp_path), backend="hqqq")
    assert set(found) == {"backend", f"output {tmp_path}"}
    assert "was not made by quantadapt" in found[f"output {tmp_path}"]


@pytest.mark.parametrize("path", ["a.jsonl", "a.ndjson", "./a", "/a", "~/a", "a/b/c", "a.TXT"])
def test_what_can_only_be_a_file(path) -> None:
    assert is_local_path(path)
    assert not is_local_path("owner/name")
