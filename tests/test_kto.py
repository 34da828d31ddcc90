"""KTO against TRL's trainer on stock PEFT, by hand in float64, accumulated, in parts and run."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import in_processes
from transformers import AutoTokenizer
from trl_models import begun_as_ours
from trl_settings import PLAIN

import quantadapt as qa
from quantadapt import demo
from quantadapt.data.desirable import load_desirable
from quantadapt.distributed import world
from quantadapt.errors import DataError
from quantadapt.evaluation.desirability import area
from quantadapt.memory import Setting
from quantadapt.objectives.kto import KTO
from quantadapt.testing.small_demo import small_model
from quantadapt.training.memory_fit import MemoryFit

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
ROWS: list[dict[str, Any]] = [
    {
        "prompt": f"What comes after {word}?\n",
        "completion": f"It is {word}, as everybody knows." if i % 3 else "Nothing.",
        "label": i < 5,
    }
    for i, word in enumerate(NUMBERS)
]
TRAIN = {"max_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 8, "optim": "sgd",
         "learning_rate": 0.1, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}  # fmt: skip
FIGURES = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")


@cache
def tokenizer() -> Any:
    found = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    found.chat_template = None
    return found


def written(folder: Path, rows: list[Any], name: str = "answers.jsonl") -> Path:
    file = folder / name
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def read(file: Path, known: Any = None, **data: Any) -> Any:
    spec = qa.Spec(data={"path": str(file), "eval_path": str(file), **data}).data
    return load_desirable(spec, known or tokenizer(), seed=0)


@pytest.fixture
def ours(tmp_path: Path) -> Any:
    return read(written(tmp_path, ROWS)).train


def attached(backend: str = "none", adapter: str = "lora", **options: Any) -> Any:
    return qa.attach(qa.quantize(str(small_model()), backend, **options), adapter, seed=0)


def trained(model: Any, data: Any, **options: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    logs: list[dict[str, Any]] = []
    given = {"objective": "kto", **TRAIN, **options}
    qa.train(model, data, on_log=logs.append, tokenizer=tokenizer(), **given)
    return logs, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


# --- TRL's ---------------------------------------------------------------------------------------


def of_trl(
    data: Any, folder: Path, begun: Path | None = None, **config: Any
) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """The same in TRL's trainer with stock transformers and PEFT; of an adapter that is there
    already, with a model of its own as reference."""
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    class Tokenized(KTOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset

    start = {n: p.detach().clone() for n, p in attached().named_parameters() if p.requires_grad}
    model, reference = begun_as_ours(start, begun)
    rows = []
    for row in data:
        at = row["completion_mask"].index(1)
        ids = row["input_ids"]
        rows.append({"prompt_ids": ids[:at], "completion_ids": ids[at:]})
    for at, (row, found) in enumerate(zip(rows, data, strict=True)):
        row["KL_completion_ids"] = rows[at - 1]["completion_ids"]  # TRL's shift by one
        row["label"] = bool(found["desirable"])
    options = {name: value for name, value in TRAIN.items() if name != "warmup_ratio"}
    args = KTOConfig(
        **options,
        **config,
        **PLAIN,
        output_dir=str(folder),
        seed=0,
        data_seed=0,
        max_length=None,
        remove_unused_columns=False,
    )
    known = AutoTokenizer.from_pretrained(demo.MODEL_DIR, padding_side="left")
    given = {"args": args, "train_dataset": Dataset.from_list(rows), "processing_class": known}
    trainer = Tokenized(model, ref_model=reference, **given)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return logs, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


LOSSES: list[dict[str, Any]] = [
    {"desirable_weight": 1.5, "undesirable_weight": 0.5, "beta": 0.3},
    {},
    {"loss_type": "apo_zero_unpaired", "undesirable_weight": 2.0},
]


@pytest.mark.parametrize(
    "options",
    [LOSSES[0], *(pytest.param(o, marks=pytest.mark.slow) for o in LOSSES[1:])],
    ids=["weighted", "plain", "apo"],
)
def test_losses_rewards_and_gradients_are_trls(options, ours, tmp_path) -> None:
    """SGD takes the gradients as they are, so equal weights are equal gradients."""
    model = attached()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    logs, weights = trained(model, ours, objective={"name": "kto", **options})
    expected, theirs = of_trl(ours, tmp_path, **options)
    assert len(logs) == len(expected) == TRAIN["max_steps"]
    for log, other in zip(logs, expected, strict=True):
        assert log["loss"] == pytest.approx(other["loss"], rel=1e-6, abs=1e-6)
        assert log["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
        for name in FIGURES:
            assert log[name] == pytest.approx(other[name], rel=1e-6, abs=2e-5), name
        if "loss_type" not in options:
            assert log["kl"] == pytest.approx(other["kl"], rel=1e-5, abs=2e-5)
    if "loss_type" not in options:
        assert logs[-1]["kl"] > 0.01  # else mismatched answers would have done nothing
    assert logs[-1]["loss"] < logs[0]["loss"]
    for name, weight in weights.items():
        moved = float((theirs[name] - before[name]).norm())
        assert moved > 0
        assert float((weight - theirs[name]).norm()) < 5e-4 * moved


def test_losses_are_those_of_the_paper() -> None:
    """lambda (1 - s(beta (r - z))) and lambda (1 - s(beta (z - r))), in float64."""
    ratios = torch.linspace(-20, 20, 9, dtype=torch.float64)
    task = KTO(beta=0.2, desirable_weight=1.5, undesirable_weight=0.7)
    kl = torch.full_like(ratios, 0.3)
    good = torch.arange(9) % 2 == 0
    found = task.losses(ratios, good, kl)
    for r, d, loss in zip(ratios.tolist(), good.tolist(), found.tolist(), strict=True):
        x = 0.2 * (r - 0.3 if d else 0.3 - r)
        expected = (1.5 if d else 0.7) * (1 - 1 / (1 + 2.718281828459045**-x))
        assert loss == pytest.approx(expected, abs=1e-12)


# --- data ----------------------------------------------------------------------------------------


def test_a_mismatched_answer_belongs_to_another_prompt(tmp_path) -> None:
    rows = [
        {"prompt": f"{p}\n", "completion": f"{p}{i}", "label": bool(i)}
        for p in ("red", "green", "blue")
        for i in (0, 1)
    ]
    for row in read(written(tmp_path, rows)).train:
        prompt, other = (
            tokenizer().decode([i for i, m in zip(row["mismatched_ids"], row["mismatched_mask"],
                                                  strict=True) if m == kept])
            for kept in (0, 1)
        )  # fmt: skip
        word = prompt.removeprefix("<s>").strip()
        assert word in ("red", "green", "blue")
        assert word not in other


def test_pairs_are_taken_apart_as_trl_does_it(tmp_path) -> None:
    from datasets import Dataset
    from trl import unpair_preference_dataset

    pairs = [
        {"prompt": f"{w}?\n", "chosen": f"{w}.", "rejected": "No."} for w in ("red", "blue", "tan")
    ]
    theirs = unpair_preference_dataset(Dataset.from_list(pairs))
    file = written(tmp_path, pairs, "pairs.jsonl")
    apart = written(tmp_path, [*theirs], "apart.jsonl")
    found, expected = (
        sorted(
            (r["input_ids"], r["completion_mask"], r["desirable"], r["mismatched_ids"])
            for r in read(one).train
        )
        for one in (file, apart)
    )
    assert found == expected
    assert len(found) == 6


def test_chats_and_other_columns_are_read(tmp_path) -> None:
    turns = [{"role": "user", "content": "Name a colour."}]
    chat = {"prompt": turns, "completion": [{"role": "assistant", "content": "Red."}]}
    with_template = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    rows = [{**chat, "label": 1}, {**chat, "label": "false", "completion": [
        {"role": "assistant", "content": "Four."}]}]  # fmt: skip
    found = read(written(tmp_path, rows), with_template).train
    assert found["desirable"] == [1, 0]
    text = with_template.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert with_template.decode(found[0]["input_ids"]).startswith(text)
    named = [{"q": "a?", "a": "b.", "good": True}, {"q": "c?", "a": "d.", "good": False}]
    columns = {"prompt": "q", "completion": "a", "label": "good"}
    assert read(written(tmp_path, named), columns=columns).train["desirable"] == [1, 0]
    whole = {"messages": [*turns, {"role": "assistant", "content": "Red."}]}
    rows = [{**whole, "label": True}, {**whole, "label": False}]
    assert len(read(written(tmp_path, rows), with_template).train) == 2


@pytest.mark.parametrize("yes", [True, 1, 1.0, "1.0", "True "])
def test_labels_may_be_written_as_tables_write_them(yes, tmp_path) -> None:
    answer = {"prompt": "a", "completion": "b"}
    rows = [{**answer, "label": yes}, {**answer, "label": type(yes)(0) if yes == 1 else "0.0"}]
    assert read(written(tmp_path, rows)).train["desirable"] == [1, 0]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"prompt": "a", "completion": "b"}] * 2, "no column 'label', found 'prompt'"),
        ([{"prompt": "a", "completion": "b", "label": "good"}], "'label' is 'good', neither true"),
        ([{"prompt": "a", "completion": "b", "label": 2}], "'label' is 2, neither true nor false"),
        ([{"prompt": "a", "completion": "b", "label": None}], "'label' is null"),
        ([{"prompt": "a", "completion": "b", "label": 0.5}], "'label' is 0.5, neither true"),
        ([{**r, "label": True} for r in ROWS], "all answers to learn from are desirable"),
        ([{"prompt": "a", "label": True}], "no known columns"),
        ([{**r, "completion": ""} for r in ROWS], "no answer is left"),
    ],
    ids=["no label", "a word", "a number", "null", "a half", "one kind", "no answer", "empty"],
)
def test_what_cannot_be_used_is_refused_with_its_place(rows, expected, tmp_path) -> None:
    with pytest.raises(DataError, match=expected):
        read(written(tmp_path, rows))


def test_a_lopsided_set_is_told_with_the_weight_to_take(ours) -> None:
    notes: list[str] = []
    trained(attached(), ours, max_steps=1, on_note=notes.append)
    (told,) = [note for note in notes if "desirable_weight" in note]
    assert told.startswith("5 answers are desirable and 3 are not")
    assert "of 0.6 to 0.8" in told  # (3 / 5) to 4 / 3 of that, equation 8
    notes.clear()
    objective = {"name": "kto", "desirable_weight": 0.7}
    trained(attached(), ours, max_steps=1, on_note=notes.append, objective=objective)
    assert not [note for note in notes if "desirable_weight" in note]


# --- batches and processes -----------------------------------------------------------------------


def test_steps_in_parts_and_accumulated_are_the_same(ours, monkeypatch) -> None:
    """The mismatched answers of all of a step are one mean, which TRL takes batch by batch."""
    whole, weights = trained(attached(), ours)
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    accumulated = trained(attached(), ours, **options)
    monkeypatch.setattr(MemoryFit, "_given", lambda self: Setting(0, False, 2))
    in_parts = trained(attached(), ours)
    assert whole[-1]["kl"] > 0.01
    for logs, others in (accumulated, in_parts):
        for log, other in zip(whole, logs, strict=True):
            for name in ("loss", "grad_norm", "tokens", "kl", *FIGURES):
                assert other[name] == pytest.approx(log[name], rel=1e-5, abs=1e-6), name
        assert all(torch.allclose(weights[n], others[n], atol=1e-6) for n in weights)


def in_two(folder: str, file: str, parallel: str) -> Any:
    from quantadapt.distributed import start
    from quantadapt.sharding import shard

    torch.set_num_threads(1)
    start("cpu")
    base = qa.quantize(folder, "bnb-nf4", device="cpu", dtype="float32")
    if parallel == "fsdp":
        shard(base)
    model = qa.attach(base, "lora", seed=0)
    size = 8 // world().size
    logs, weights = trained(model, read(Path(file)).train, per_device_train_batch_size=size)
    return logs, {name: weight.clone() for name, weight in weights.items()}


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_as_one(tmp_path, parallel) -> None:
    file = str(written(tmp_path, ROWS))
    both = in_processes(2, in_two, tmp_path, str(small_model()), file, parallel)
    (logs, weights), (_, same) = both
    alone, expected = in_two(str(small_model()), file, "none")
    for log, other in zip(logs, alone, strict=True):
        for name in ("loss", "grad_norm", "tokens", "kl", *FIGURES):
            assert log[name] == pytest.approx(other[name], rel=1e-5, abs=1e-5), name
    for name in expected:
        assert torch.equal(weights[name], same[name])
        assert torch.allclose(weights[name], expected[name], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["pissa", "dora", "ia3", "vera"])
def test_other_adapters_and_backends_learn(ours, adapter) -> None:
    """The first loss is that of no difference from the reference: a half of the mean weight."""
    logs, _ = trained(attached("hqq", adapter), ours, optim="adamw_torch", learning_rate=5e-3)
    assert logs[0]["loss"] == pytest.approx(0.5, abs=2e-4)
    assert logs[-1]["loss"] < logs[0]["loss"]


# --- what is measured ----------------------------------------------------------------------------


def test_the_area_is_that_of_counting_pairs() -> None:
    draws = random.Random(0)
    scores = [draws.choice([0.0, 1.0, 2.0, 3.0]) for _ in range(40)]
    good = [draws.random() < 0.5 for _ in scores]
    pairs = [(a, b) for a, g in zip(scores, good, strict=True) if g
             for b, h in zip(scores, good, strict=True) if not h]  # fmt: skip
    expected = sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)
    assert area(torch.tensor(scores), torch.tensor(good)) == pytest.approx(expected, abs=1e-12)


def test_the_evaluation_counts_by_hand(ours) -> None:
    model = attached()
    trained(model, ours, learning_rate=1.0)
    found = qa.evaluate(model, ours, evaluation="desirability")
    model.eval()

    def by_hand() -> torch.Tensor:
        sums = []
        for row in ours:
            ids, start = torch.tensor([row["input_ids"]]), row["completion_mask"].index(1)
            with torch.no_grad():
                log_p = model(input_ids=ids).logits[0].double().log_softmax(-1)
            sums.append(sum(log_p[i - 1, ids[0, i]] for i in range(start, ids.shape[1])))
        return torch.stack(sums)

    policy = by_hand()
    with model.disable_adapter():
        gained = policy - by_hand()
    good = torch.tensor(ours["desirable"]).bool()
    assert found["reward-desirable"] == pytest.approx(float(gained[good].mean()), abs=1e-4)
    margin = float(gained[good].mean() - gained[~good].mean())
    assert found["reward-margin"] == pytest.approx(margin, abs=1e-4)
    assert margin > 0
    assert found["answers"] == len(ROWS)
    base = qa.evaluate(qa.quantize(str(small_model()), "none"), ours, evaluation="desirability")
    assert set(base) == {"auc", "answers"}


def test_data_without_labels_are_told() -> None:
    with pytest.raises(qa.QuantadaptError, match="do not say which answers are desirable"):
        qa.evaluate(qa.quantize(str(small_model()), "none"), evaluation="desirability")


@pytest.mark.slow
def test_a_run_measures_desirability_before_and_after(tmp_path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "eval"):
        written(data, ROWS, f"{name}.jsonl")
    spec = qa.Spec(
        model=str(small_model()),
        backend="hqq",
        objective="kto",
        data=str(data),
        train={**TRAIN, "learning_rate": 1.0, "eval_steps": 2, "save_steps": 2},
        evaluate={"samples": 1, "max_new_tokens": 4},
        output=str(tmp_path / "run"),
    )
    result = qa.run(spec)
    figures = result.metrics["evaluations"]["desirability"]
    assert set(figures["auc"]["values"]) == {"unquantized", "quantized", "tuned", "merged"}
    assert figures["reward-margin"]["values"]["tuned"] > 0
    lines = [*map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())]
    assert any("kl" in line for line in lines)
    assert any("eval_loss" in line for line in lines)
    again = qa.evaluate(qa.load(tmp_path / "run"), data, evaluation="desirability")
    assert again["reward-margin"] == pytest.approx(
        figures["reward-margin"]["values"]["tuned"], abs=1e-4
    )
