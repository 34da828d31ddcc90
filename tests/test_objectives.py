"""Objectives of a third party: one file and one record, and everything else knows what to do."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from parameters import slow_but

import quantadapt as qa
from quantadapt import cli, demo
from quantadapt.errors import DataError, PlanRefused, PluginError
from quantadapt.machine import Machine
from quantadapt.memory import GIB, Setting
from quantadapt.registry import registry
from quantadapt.testing.small_demo import small_model
from quantadapt.training import stage
from quantadapt.training.memory_fit import MemoryFit

BUILTIN = [
    "classify",
    "classify-tokens",
    "distill",
    "dpo",
    "embed",
    "grpo",
    "kto",
    "orpo",
    "pretrain",
    "rerank",
    "reward",
    "rloo",
    "sft",
    "simpo",
]
PLUGIN = '''
"""Two objectives: tokens that are not to be repeated, and answers that are better than others."""

from pydantic import Field

from quantadapt import SFT, Objective, Task, hookimpl


class Unlikelihood(SFT):
    """Also makes the token before less likely (https://arxiv.org/abs/1908.04319)."""

    alpha: float = Field(0.5, ge=0, description="how much that weighs")

    def loss(self, model, batch, count):
        ids = batch["input_ids"]
        logits = model(ids, attention_mask=batch["attention_mask"], use_cache=False).logits
        log_p = logits[:, :-1].float().log_softmax(-1)
        labels = batch["labels"][:, 1:]
        likely = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        again = log_p.gather(-1, ids[:, :-1, None])[..., 0]
        losses = -likely - self.alpha * (labels != ids[:, :-1]) * (1 - again.exp()).log()
        return (losses * (labels != -100)).sum() / count


class Better(Task):
    """Makes the mean log-probability of one answer higher than that of another."""

    sequences = 2
    repeats = False

    def read(self, spec, tokenizer, *, seed):
        import json

        from datasets import Dataset

        from quantadapt.data import Data

        rows = [json.loads(line) for line in open(spec.path)]
        names = ("better", "worse")
        ids = {name: tokenizer([row[name] for row in rows])["input_ids"] for name in names}
        masks = [[1] * len(row) for row in ids["better"]]
        data = Dataset.from_dict(
            {"input_ids": ids["better"], "completion_mask": masks, "worse": ids["worse"]}
        )
        return Data(data, data, [], "pairs")

    def collator(self, setup):
        import torch
        from torch.nn.utils.rnn import pad_sequence

        def collate(examples):
            rows = [torch.tensor(e[name]) for e in examples for name in ("input_ids", "worse")]
            ones = [torch.ones_like(row) for row in rows]
            pad = setup.pad_token_id
            return {
                "input_ids": pad_sequence(rows, batch_first=True, padding_value=pad),
                "attention_mask": pad_sequence(ones, batch_first=True),
                "weight": torch.ones(len(examples)),
            }

        return collate

    def loss(self, model, batch, count):
        from torch.nn.functional import logsigmoid

        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits = model(ids, attention_mask=mask, use_cache=False).logits
        log_p = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        means = (log_p * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)
        assert len(batch["weight"]) * 2 == len(ids)
        return (-logsigmoid(means[0::2] - means[1::2]) * batch["weight"]).sum() / count


@hookimpl
def quantadapt_objectives():
    return [
        Objective("unlikelihood", "learn completions without repeating a token", Unlikelihood),
        Objective("better", "prefer one answer to another", Better),
    ]
'''


@pytest.fixture(autouse=True)
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A distribution whose plugin is the file above, installed."""
    install(tmp_path / "installed", "toy", PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path / "installed"))
    monkeypatch.setenv("QUANTADAPT_PLUGINS", "none,hqq,toy,other")
    registry.cache_clear()
    assert not registry().broken
    yield
    registry.cache_clear()
    for name in ("toy", "other"):
        sys.modules.pop(f"{name}_objectives", None)


def install(folder: Path, name: str, code: str) -> None:
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / f"{name}_objectives.py").write_text(code)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[quantadapt]\n{name} = {name}_objectives\n")


def printed(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    shown = capsys.readouterr()
    assert (ended.value.code or 0) == code, shown.err
    return " ".join((shown.out + shown.err).split())


# --- listed and refused --------------------------------------------------------------------------


def test_they_are_listed_and_shown(capsys) -> None:
    listed = printed(capsys, "objectives")
    for name in ("sft", "unlikelihood", "better"):
        assert name in listed
    shown = json.loads(printed(capsys, "objectives", "show", "unlikelihood", "--json"))
    assert shown["plugin"] == "toy (toy 1.0)"
    (option,) = shown["options"]
    assert (option["name"], option["type"], option["default"]) == ("alpha", "number >= 0", 0.5)
    assert "It has no options." in printed(capsys, "objectives", "show", "sft")
    schema = json.loads(printed(capsys, "schema"))["$defs"]["ObjectiveSpec"]
    assert schema["properties"]["name"]["examples"] == sorted([*BUILTIN, "better", "unlikelihood"])


def test_wrong_names_and_options_are_refused_with_a_suggestion(capsys) -> None:
    def refusal(**objective) -> str:
        with pytest.raises(PlanRefused) as error:
            qa.plan(qa.Spec(backend="none", objective=objective), check_output=False)
        return str(error.value)

    assert "did you mean 'unlikelihood'?" in refusal(name="unlikelyhood")
    assert "objective 'unlikelihood' has no option 'alfa'" in refusal(name="unlikelihood", alfa=1)
    assert "did you mean 'alpha'?" in refusal(name="unlikelihood", alfa=1)
    assert "objective.alpha" in refusal(name="unlikelihood", alpha=-1)
    assert "objective 'sft' has no option 'alpha'" in refusal(name="sft", alpha=1)
    model = qa.attach(qa.quantize(None, "none"), "lora")
    with pytest.raises(PlanRefused, match="did you mean 'better'"):
        qa.train(model, objective="beter", max_steps=1)
    told = printed(capsys, "plan", "--set", "objective=sfd", code=2)
    assert "did you mean 'sft'?" in told


def test_what_a_loss_of_its_own_cannot_do_is_refused() -> None:
    spec = {"backend": "none", "objective": "unlikelihood"}
    with pytest.raises(PlanRefused, match=r"task-loss-adalora\]\n.*e\.g\. lora"):
        qa.plan(qa.Spec(**spec, adapter="adalora"), check_output=False)
    with pytest.raises(PlanRefused, match=r"leave train\.packing out"):
        qa.plan(qa.Spec(**spec, train={"packing": True}), check_output=False)
    assert qa.plan(qa.Spec(backend="none", adapter="adalora"), check_output=False)
    model = qa.attach(qa.quantize(None, "none"), "lora")
    with pytest.raises(PlanRefused, match="does not keep the examples of a row apart"):
        qa.train(model, objective="unlikelihood", packing=True)


def test_a_name_that_two_plugins_claim(tmp_path) -> None:
    install(tmp_path / "installed", "other", PLUGIN)
    registry.cache_clear()
    with pytest.raises(PlanRefused, match=r"'better' is claimed by other \(.*and toy"):
        qa.plan(qa.Spec(backend="none", objective="better"), check_output=False)
    assert [o.name for o in registry().records(qa.Objective)] == BUILTIN


def test_its_rules_are_asked(tmp_path) -> None:
    rule = """
from quantadapt import Objective, Rule, SFT, hookimpl

class Picky(SFT):
    size: int = 1

@hookimpl
def quantadapt_objectives():
    when = {"adapter": ("dora",), "objective.size": (2,)}
    return [Objective("picky", "", Picky, rules=(Rule("picky-dora", when, "why", "how"),))]
"""
    install(tmp_path / "installed", "other", rule)
    registry.cache_clear()
    picky = {"name": "picky", "size": 2}
    with pytest.raises(PlanRefused, match=r"none x dora x picky: why \[rule picky-dora"):
        qa.plan(qa.Spec(backend="none", adapter="dora", objective=picky), check_output=False)
    made = qa.plan(qa.Spec(backend="none", adapter="dora", objective="picky"), check_output=False)
    assert made.to_dict()["objective"] == {"name": "picky", "options": {"size": 1}}


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ("losses", r"its loss is a tensor of shape \[2, \d+\], and no scalar"),
        ("None", "its loss is None, and no scalar"),
        ("losses.mean().detach()", "its loss depends on nothing that is trained"),
        ("losses.sum(), losses", "beside its loss it returned a tensor of shape"),
        ("losses.sum(), {'mine': losses.mean()}", "its figure 'mine' is a tensor of shape \\[\\]"),
    ],
)
def test_a_loss_that_cannot_be_learnt_from_is_told_as_its_plugins(
    tmp_path, returned, words
) -> None:
    """It was an error of torch's, which users were asked to report."""
    wrong = f"""
from quantadapt import SFT, Objective, hookimpl

class Wrong(SFT):
    def loss(self, model, batch, count):
        mask = batch["attention_mask"]
        losses = model(batch["input_ids"], attention_mask=mask, use_cache=False).logits.mean(-1)
        return {returned}

@hookimpl
def quantadapt_objectives():
    return [Objective("wrong", "", Wrong)]
"""
    install(tmp_path / "installed", "other", wrong)
    registry.cache_clear()
    model = qa.attach(qa.quantize(str(small_model()), "none", device="cpu"), "lora")
    with pytest.raises(PluginError, match=f"objective Wrong: {words}"):
        qa.train(model, objective="wrong", max_steps=1, per_device_train_batch_size=2)


# --- planned -------------------------------------------------------------------------------------


def test_the_plan_asks_what_memory_depends_on(tmp_path) -> None:
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5,
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    card = Machine(cuda=((9, 0),), memory=(80 * GIB,))

    def work(objective: str):
        spec = qa.Spec(model=str(tmp_path), backend="none", objective=objective)
        planned = qa.plan(spec, machine=card, weights=False, check_output=False, cards=(80,))
        return planned.memory.work

    sft, own, pairs = work("sft"), work("unlikelihood"), work("better")
    assert (sft.sequences, sft.whole_logits, sft.splits, sft.graphs) == (1, False, True, True)
    assert (own.sequences, own.whole_logits, own.splits, own.graphs) == (1, True, True, True)
    assert (pairs.sequences, pairs.whole_logits, pairs.graphs) == (2, True, False)
    whole = Setting(0, False, 8)
    logits = 8 * 512 * 128256
    assert own.peak(whole) - sft.peak(whole) == pytest.approx(12 * logits, rel=0.1)
    assert pairs.parts(whole)["activations"] == 2 * own.parts(whole)["activations"]


def test_the_plan_looks_into_data_only_where_it_knows_how_they_are_read(
    tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # the folder's name is long
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"better": "one two", "worse": "one one"}\n' * 2)
    flags = ["--data", str(file), "--backend", "none", "--json"]
    with_columns = printed(capsys, "plan", *flags, "--set", "objective=unlikelihood", code=2)
    assert "no known columns, found 'better', 'worse'" in with_columns
    assert json.loads(printed(capsys, "plan", *flags, "--set", "objective=better"))["data"] is None
    assert "example 2 3 tokens, 3 of" in printed(capsys, "data", str(file), "--objective", "better")
    told = printed(capsys, "plan", *flags[:-1], "--set", "objective=better")
    assert f"data {file}" in told


def test_columns_of_a_row_are_read_beside_a_renamed_prompt(tmp_path) -> None:
    class Weighted(qa.SFT):
        def columns(self, row):
            return {"weight": row.values["importance"]}

    rows = [{"q": p["prompt"], "a": p["completion"], "importance": w / 2}
            for w, p in enumerate(PAIRS)]  # fmt: skip
    rows.insert(1, {"q": "Say nothing.", "a": "", "importance": 9.0})  # dropped, with its number
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    columns = {"prompt": "q", "completion": "a"}
    spec = qa.Spec(data={"path": str(file), "eval_path": str(file), "columns": columns}).data
    with pytest.warns(qa.DataWarning, match="with an empty answer"):
        data = Weighted().read(spec, qa.quantize(None, "none").quantadapt.tokenizer, seed=0)
    assert data.train["weight"] == [0.0, 0.5, 1.0]
    assert [p.reference for p in data.held_out.prompts] == [p["completion"] for p in PAIRS]


# --- trained -------------------------------------------------------------------------------------

PAIRS = [
    {"prompt": "Count to three.\n", "completion": "one two three"},
    {"prompt": "Say it twice.\n", "completion": "it it"},
    {"prompt": "Which colour has the sky?\n", "completion": "The sky is blue."},
]
TRAIN = {"max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 4,
         "learning_rate": 1e-2, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}  # fmt: skip


def data_in(folder: Path) -> Path:
    """A folder with three examples, and one that is held out."""
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    (folder / "eval.jsonl").write_text(json.dumps(PAIRS[0]))
    return folder


def by_hand(alpha: float) -> list[float]:
    """The losses of three steps of a loop over single examples, tokenized here."""
    model = qa.attach(qa.quantize(None, "none"), "lora").train()
    tokenizer = model.quantadapt.tokenizer
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0), []
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for _ in range(3):
        total, count = torch.zeros(()), 0
        for pair in PAIRS:
            prompt, answer = (
                tokenizer(text, add_special_tokens=False)["input_ids"] for text in pair.values()
            )
            ids = [*bos, *prompt, *answer, tokenizer.eos_token_id]
            p = model(torch.tensor([ids])).logits[0].double().softmax(-1)
            for place in range(len(bos) + len(prompt), len(ids)):
                token, before = ids[place], ids[place - 1]
                total = total - p[place - 1, token].log()
                if token != before:
                    total = total - alpha * (1 - p[place - 1, before]).log()
                count += 1
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total.detach() / count))
    return losses


def test_it_is_trained_by_a_run_from_yaml_and_by_hand(tmp_path, capsys) -> None:
    values = {
        "backend": "none",
        "data": str(data_in(tmp_path / "data")),
        "objective": {"name": "unlikelihood", "alpha": 2.0},
        "train": TRAIN,
        "evaluate": {"samples": 0, "unquantized": False},
        "export": {"merge": "never"},
    }
    expected = by_hand(2.0)
    result = qa.run(qa.Spec(**values, output=str(tmp_path / "run")))
    logged = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line)["loss"] for line in logged]
    assert found == pytest.approx(expected, abs=5e-5)
    assert expected[-1] < expected[0]
    assert result.plan.task.alpha == 2.0
    kept = json.loads((tmp_path / "run" / "plan.json").read_text())["objective"]
    assert kept == {"name": "unlikelihood", "options": {"alpha": 2.0}}
    assert "unlikelihood" in (tmp_path / "run" / "report.html").read_text()

    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values | {"objective": "sft"}))
    again = str(tmp_path / "again")
    flags = ["--set", "objective=unlikelihood", "--set", "objective.alpha=2", "--output", again]
    printed(capsys, "run", str(config), *flags)
    lines = Path(again, "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == pytest.approx(found, abs=1e-6)

    other = qa.Spec(**values | {"objective": "sft", "train": TRAIN | {"resume": True}})
    other.output = again
    with pytest.raises(PlanRefused, match=r"objective\.name: 'sft' makes it another run"):
        qa.plan(other)


def trained(tmp_path: Path, objective: str, data: Path, size: int, monkeypatch=None, **options):
    """Losses of three steps, in micro-batches of `size` where there is a monkeypatch."""
    if monkeypatch is not None:
        monkeypatch.setattr(MemoryFit, "_given", lambda self: Setting(0, False, size))
    model = qa.attach(qa.quantize(str(small_model()), "none"), "lora")
    found = qa.train(model, data, objective=objective, **TRAIN | options)
    return found, [loss for _, loss in found.losses]


@pytest.mark.parametrize("objective", slow_but(["unlikelihood", "better"], "better"))
def test_batches_in_parts_and_accumulated_are_the_same(objective, tmp_path, monkeypatch) -> None:
    if objective == "better":
        data = tmp_path / "pairs.jsonl"
        texts = [
            "one two three",
            "one one",
            "a red roof",
            "a b",
            "up and down",
            "so so",
            "x y",
            "y y",
        ]
        rows = [
            {"better": better, "worse": worse}
            for better, worse in zip(texts[::2], texts[1::2], strict=True)
        ]
        data.write_text("\n".join(map(json.dumps, rows)))
    else:
        data = data_in(tmp_path / "data")
    whole, expected = trained(tmp_path, objective, data, 4)
    _, accumulated = trained(
        *(tmp_path, objective, data, 4),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    split, in_parts = trained(tmp_path, objective, data, 1, monkeypatch)
    assert split.setting.micro_batch == 1
    assert in_parts == pytest.approx(expected, abs=5e-5)
    assert accumulated == pytest.approx(expected, abs=5e-5)
    assert expected[-1] < expected[0]
    assert split.tokens == whole.tokens
    if objective == "better":
        tokenizer = qa.quantize(None, "none").quantadapt.tokenizer
        assert whole.tokens == 3 * sum(map(len, tokenizer(texts)["input_ids"]))
        assert expected[0] == pytest.approx(preferred_by_hand(rows), abs=5e-5)


def preferred_by_hand(rows: list[dict[str, str]]) -> float:
    """The first loss of `better`, with stock transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    model = AutoModelForCausalLM.from_pretrained(small_model(), dtype=torch.float32).eval()

    def mean(text: str) -> float:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            return -float(model(ids, labels=ids).loss)

    margins = torch.tensor([mean(row["better"]) - mean(row["worse"]) for row in rows])
    return float((1 + (-margins).exp()).log().mean())


def test_a_trainer_of_its_own_computes_the_loss_by_itself(tmp_path) -> None:
    from transformers import Trainer, TrainingArguments

    from quantadapt.training import train

    class Loop(stage.TrainingLoop, Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            inputs.pop("counted")
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    class ByItself(qa.SFT):
        def loss(self, model, batch, count):
            raise AssertionError("the trainer does that")

        def trainer(self, setup):
            return setup.trainer(Loop, TrainingArguments, self.collator(setup))

    spec = qa.Spec(data=str(data_in(tmp_path / "data")), train=TRAIN)
    losses = []
    for task in (qa.SFT(), ByItself()):
        model = qa.attach(qa.quantize(None, "none"), "lora")
        tokenizer = model.quantadapt.tokenizer
        data = task.read(spec.data, tokenizer, seed=0).train
        output = tmp_path / type(task).__name__
        found = train(model, tokenizer, data, spec.train, task=task, output=output, seed=0)
        losses.append([loss for _, loss in found.losses])
    assert losses[1] == pytest.approx(losses[0], abs=5e-5)


def test_a_column_that_holds_no_number_is_told_with_its_line(tmp_path) -> None:
    class Weighted(qa.SFT):
        def columns(self, row):
            return {"weight": row.values["weight"]}

    file = tmp_path / "data.jsonl"
    file.write_text(
        "\n".join(json.dumps(p | {"weight": w}) for p, w in zip(PAIRS, [1, 2, "x"], strict=True))
    )
    tokenizer = qa.quantize(None, "none").quantadapt.tokenizer
    with pytest.raises(DataError, match=r"data\.jsonl:3: 'weight' is text, expected a number"):
        Weighted().read(qa.Spec(data={"path": str(file), "eval_path": str(file)}).data,
                        tokenizer, seed=0)  # fmt: skip


# --- how a run goes on ---------------------------------------------------------------------------


def test_what_trainer_calls_is_told_in_its_order(tmp_path, monkeypatch) -> None:
    """The tables at the top of training/stage.py, against a run and its resumption."""
    told = [*stage.BEFORE, *stage.EACH_STEP, *stage.AFTER]
    seen: list[object] = []

    def watched(function):
        def call(*args, **kwargs):
            seen.append(function)
            return function(*args, **kwargs)

        return call

    for function in told:
        module = sys.modules[function.__module__]
        holder, _, name = function.__qualname__.rpartition(".")
        owner = (
            getattr(module, holder)
            if holder
            else sys.modules["quantadapt.training.lent_to_trainers"]
        )
        monkeypatch.setattr(owner, name, watched(function))
    model = qa.attach(qa.quantize(None, "none"), "lora")
    options = {**TRAIN, "save_steps": 1, "output": tmp_path / "run"}
    qa.train(model, data_in(tmp_path / "data"), **options | {"max_steps": 1})
    assert list(dict.fromkeys(seen)) == told[2:]  # nothing is resumed
    seen.clear()
    qa.train(model, tmp_path / "data", **options | {"max_steps": 2, "resume": True})
    assert list(dict.fromkeys(seen)) == told
