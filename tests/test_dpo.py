"""DPO against TRL's trainer on stock PEFT, by hand in float64, in parts, resumed, and run."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import in_processes
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl_models import begun_as_ours
from trl_settings import PLAIN

import quantadapt as qa
from quantadapt import cli, demo
from quantadapt.distributed import world
from quantadapt.errors import PlanRefused
from quantadapt.evaluation.preferences import answer_log_probs
from quantadapt.memory import Setting
from quantadapt.objectives.dpo import DPO
from quantadapt.testing.small_demo import small_model
from quantadapt.training.memory_fit import MemoryFit

WORDS = [
    "red",
    "blue",
    "green",
    "yellow",
    "north",
    "south",
    "east",
    "west",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
]
PAIRS = [
    {
        "prompt": f"What comes after {WORDS[i]}?\n",
        "chosen": f"It is {WORDS[i + 1]}, as everybody knows." if i % 2 else WORDS[i + 1],
        "rejected": f"Never {WORDS[i + 2]}.",
    }
    for i in range(8)
]
TRAIN = {"max_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 4, "optim": "sgd",
         "learning_rate": 0.1, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}  # fmt: skip
FIGURES = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
           "logps/chosen", "logps/rejected")  # fmt: skip


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo.MODEL_DIR)


@cache
def pairs() -> Any:
    """The tokens of the pairs, made here."""
    from datasets import Dataset

    known = tokenizer()
    rows = []
    for pair in PAIRS:
        prompt, chosen, rejected = (
            known(text, add_special_tokens=False)["input_ids"] for text in pair.values()
        )
        answers = [[*answer, known.eos_token_id] for answer in (chosen, rejected)]
        row: dict[str, Any] = {}
        for (ids, mask), answer in zip(
            (("input_ids", "completion_mask"), ("rejected_ids", "rejected_mask")),
            answers,
            strict=True,
        ):
            row |= {ids: prompt + answer, mask: [0] * len(prompt) + [1] * len(answer)}
        rows.append(row | {"prompt_ids": prompt, "chosen_ids": answers[0], "_rejected": answers[1]})
    return Dataset.from_list(rows)


def ours() -> Any:
    columns = ["input_ids", "completion_mask", "rejected_ids", "rejected_mask"]
    return pairs().select_columns(columns)


def attached(backend: str = "none", adapter: str = "lora", **options: Any) -> Any:
    return qa.attach(qa.quantize(str(small_model()), backend, **options), adapter, seed=0)


def trained(model: Any, **options: Any) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Return what was logged, and the adapter's weights."""
    logs: list[dict[str, Any]] = []
    given = {"objective": "dpo", **TRAIN, **options}
    qa.train(model, ours(), on_log=logs.append, tokenizer=tokenizer(), **given)
    return logs, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


# --- TRL's ---------------------------------------------------------------------------------------


def of_trl(
    tmp_path: Path, begun: Path | None = None, **config: Any
) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """The same in TRL's trainer with stock transformers and PEFT; of an adapter that is there
    already, with a model of its own as reference."""
    from peft import get_peft_model_state_dict
    from trl import DPOConfig, DPOTrainer

    class Tokenized(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset

    start = {n: p.detach().clone() for n, p in attached().named_parameters() if p.requires_grad}
    model, reference = begun_as_ours(start, begun)
    data = pairs().select_columns(["prompt_ids", "chosen_ids"])
    data = data.add_column("rejected_ids", pairs()["_rejected"])
    options = {name: value for name, value in TRAIN.items() if name != "warmup_ratio"}
    args = DPOConfig(
        **options,
        **config,
        **PLAIN,
        output_dir=str(tmp_path),
        seed=0,
        data_seed=0,
        max_length=None,
        remove_unused_columns=False,
    )
    given = {"args": args, "train_dataset": data, "processing_class": tokenizer()}
    trainer = Tokenized(model, ref_model=reference, **given)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    assert get_peft_model_state_dict(model)
    return logs, weights


LOSSES = [
    {"loss_type": "sigmoid"},
    {"loss_type": "sigmoid", "beta": 0.5},
    {"loss_type": "hinge", "beta": 0.3},
    {"loss_type": "ipo"},
    {"loss_type": "robust", "label_smoothing": 0.2},
]


@pytest.mark.parametrize(
    "options",
    [LOSSES[0], *(pytest.param(o, marks=pytest.mark.slow) for o in LOSSES[1:])],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_losses_rewards_and_gradients_are_trls(options, tmp_path) -> None:
    """SGD takes the gradients as they are, so equal weights are equal gradients."""
    model = attached()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    logs, weights = trained(model, objective={"name": "dpo", **options})
    expected, theirs = of_trl(tmp_path, **options)
    assert len(logs) == len(expected) == TRAIN["max_steps"]
    rounding = max(1e-6, 1e-5 * options.get("beta", 0.1))  # of sums of some 50 nats in float32
    for log, other in zip(logs, expected, strict=True):
        assert log["loss"] == pytest.approx(other["loss"], rel=1e-6, abs=rounding)
        assert log["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
        for name in FIGURES:
            if (
                log["step"] > 1 or name != "rewards/accuracies"
            ):  # of rewards that are all 0 at first
                assert log[name] == pytest.approx(other[name], rel=1e-6, abs=1e-5), name
    assert logs[-1]["loss"] < logs[0]["loss"]
    assert logs[-1]["rewards/margins"] > 0.01
    for name, weight in weights.items():
        moved = float((theirs[name] - before[name]).norm())
        assert moved > 0
        assert float((weight - theirs[name]).norm()) < 5e-4 * moved


def test_smoothed_labels_are_a_mixture_of_both() -> None:
    """As in the authors' own code: -(1 - e) log s(x) - e log s(-x)."""
    margins = torch.linspace(-30, 30, 13, dtype=torch.float64)
    x = 0.1 * margins
    expected = -(0.9 * logsigmoid(x) + 0.1 * logsigmoid(-x))
    assert torch.allclose(DPO(label_smoothing=0.1).losses(margins), expected, rtol=0, atol=1e-12)


# --- without a reference -------------------------------------------------------------------------


def of_trl_alone(kind: str) -> tuple[torch.Tensor, Any]:
    """TRL's loss of all pairs on stock logits, and the model with its gradients."""
    from peft import LoraConfig, get_peft_model
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    base = AutoModelForCausalLM.from_pretrained(small_model(), dtype=torch.float32)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    start = {n: p.detach() for n, p in attached().named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(start[name])
    rows = [(r["prompt_ids"], r[c]) for c in ("chosen_ids", "_rejected") for r in pairs()]
    length = max(len(prompt + answer) for prompt, answer in rows)
    ids, labels, seen = (torch.full((len(rows), length), v) for v in (0, -100, 0))
    for i, (prompt, answer) in enumerate(rows):
        ids[i, : len(prompt + answer)] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : len(prompt + answer)] = torch.tensor(answer)
        seen[i, : len(prompt + answer)] = 1
    logits = model(input_ids=ids, attention_mask=seen).logits
    half = len(rows) // 2
    means = ORPOTrainer.get_batch_logps(logits, labels, average_log_prob=True)
    options = {"beta": 0.3, "alpha": 0.0, "loss_type": "simpo", "simpo_gamma": 0.7}
    asked: Any = SimpleNamespace(
        **options, label_smoothing=0.1, accelerator=SimpleNamespace(device="cpu")
    )
    if kind == "simpo":
        return CPOTrainer.cpo_loss(asked, means[:half], means[half:])[0].mean(), model
    whole = ids.masked_fill(seen == 0, -100)[:half, 1:]
    learnt = cross_entropy(logits[:half, :-1].flatten(0, 1), whole.flatten())
    ratio = ORPOTrainer.odds_ratio_loss(asked, means[:half], means[half:])[0]
    return learnt - ratio.mean(), model


@pytest.mark.parametrize("kind", ["orpo", "simpo"])
def test_losses_and_gradients_without_a_reference_are_trls(kind) -> None:
    options = {"gamma": 0.7, "label_smoothing": 0.1} if kind == "simpo" else {}
    objective = {"name": kind, "beta": 0.3, **options}
    model = attached()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    given = {"per_device_train_batch_size": 8, "max_steps": 1, "max_grad_norm": 0.0}
    logs, weights = trained(model, objective=objective, **given)
    loss, theirs = of_trl_alone(kind)
    loss.backward()
    assert logs[0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-6, abs=1e-6)
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            moved = TRAIN["learning_rate"] * parameter.grad
            found = before[name] - weights[name]
            assert float((found - moved).norm()) < 1e-3 * float(moved.norm()) + 1e-8, name


def test_accumulated_steps_without_a_reference_are_the_same() -> None:
    whole, _ = trained(attached(), objective="simpo", max_steps=2)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    parts, _ = trained(attached(), objective="simpo", max_steps=2, **options)
    for log, other in zip(whole, parts, strict=True):
        for name in ("loss", "grad_norm", *FIGURES):
            assert other[name] == pytest.approx(log[name], rel=1e-5, abs=1e-6), name


# --- by hand -------------------------------------------------------------------------------------


def by_hand(model: Any) -> torch.Tensor:
    """The log-likelihoods of the answers, from whole logits of one answer at a time, in float64."""
    found = []
    for row in pairs():
        for answer in (row["chosen_ids"], row["_rejected"]):
            ids, start = torch.tensor([row["prompt_ids"] + answer]), len(row["prompt_ids"])
            with torch.no_grad():
                log_p = model(input_ids=ids).logits[0].double().log_softmax(-1)
            found.append(sum(log_p[i - 1, ids[0, i]] for i in range(start, ids.shape[1])))
    return torch.stack(found).view(-1, 2)


def scaled(folder: Path) -> str:
    """A model whose logits are scaled, so that they are made whole."""
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = CohereConfig(vocab_size=2048, num_attention_heads=2, logit_scale=0.25, **sizes)
    CohereForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["plain", "scaled"])
def test_log_likelihoods_are_those_of_stock_transformers(kind, tmp_path) -> None:
    folder = str(small_model()) if kind == "plain" else scaled(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = by_hand(stock)
    model = qa.attach(qa.quantize(folder, "none"), "lora")
    for size in (1, 3):
        found = answer_log_probs(model, ours(), batch_size=size)
        assert float((found - expected).abs().max()) < 1e-4
    logs, _ = trained(model, max_steps=1, per_device_train_batch_size=8)
    means = expected.mean(0).tolist()
    assert [logs[0]["logps/chosen"], logs[0]["logps/rejected"]] == pytest.approx(means, abs=1e-4)


def test_the_logits_of_an_answer_are_never_whole(monkeypatch) -> None:
    model = attached()
    head = model.get_output_embeddings()

    def whole(*_: Any) -> Any:
        raise AssertionError("the head has computed logits of all tokens")

    handle = head.register_forward_pre_hook(whole)
    trained(model, max_steps=1)
    handle.remove()


def test_the_evaluation_counts_by_hand() -> None:
    model = attached()
    trained(model, learning_rate=1.0)
    found = qa.evaluate(model, ours(), evaluation="preferences")
    policy = by_hand(model.eval())
    with model.disable_adapter():
        reference = by_hand(model)
    margins, gains = policy[:, 0] - policy[:, 1], policy - reference
    rewards = gains[:, 0] - gains[:, 1]
    assert found["accuracy"] == float((margins > 0).double().mean())
    assert found["margin"] == pytest.approx(float(margins.mean()), abs=1e-4)
    assert found["reward-accuracy"] == float((rewards > 0).double().mean()) > 0.5
    assert found["reward-margin"] == pytest.approx(float(rewards.mean()), abs=1e-4)
    assert found["reward-chosen"] == pytest.approx(float(gains[:, 0].mean()), abs=1e-4)
    assert found["pairs"] == len(PAIRS)
    base = qa.evaluate(qa.quantize(str(small_model()), "none"), ours(), evaluation="preferences")
    assert "reward-accuracy" not in base
    assert base["margin"] == pytest.approx(
        float((reference[:, 0] - reference[:, 1]).mean()), abs=1e-4
    )


def test_data_without_pairs_are_told() -> None:
    with pytest.raises(qa.QuantadaptError, match="no pairs of a chosen and a rejected answer"):
        qa.evaluate(qa.quantize(str(small_model()), "none"), evaluation="preferences")


# --- the reference -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "adapter",
    ["pissa", *(pytest.param(a, marks=pytest.mark.slow) for a in ("loftq", "dora", "vera"))],
)
def test_the_reference_is_the_model_before_training(adapter) -> None:
    """Also where attaching moves a part of the base into the adapter: the first loss is log 2."""
    model = attached("hqq", adapter)
    before = qa.evaluate(model, ours(), evaluation="preferences")
    logs, _ = trained(model, max_steps=2, optim="adamw_torch", learning_rate=1e-3)
    assert logs[0]["loss"] == pytest.approx(0.693147, abs=2e-5)
    assert logs[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    found = qa.evaluate(model, ours(), evaluation="preferences")
    gain = found["margin"] - before["margin"]
    assert found["reward-margin"] == pytest.approx(gain, abs=1e-4)
    assert abs(gain) > 1e-3


@pytest.mark.slow
def test_a_model_that_was_trained_before_is_its_own_reference() -> None:
    model = attached()
    trained(model, learning_rate=1.0)
    logs, _ = trained(model, max_steps=1)
    assert logs[0]["loss"] == pytest.approx(0.693147, abs=2e-5)


@pytest.mark.slow
def test_a_resumed_run_keeps_its_reference(tmp_path) -> None:
    """Also of a model that is in memory and trained already; figures go on, too."""
    options = {"logging_steps": 3, "save_steps": 1, "eval_steps": 4, "eval_data": ours()}
    model = attached()
    whole, trained_ = trained(model, **options, output=tmp_path / "run")
    weights = {name: weight.clone() for name, weight in trained_.items()}
    for step in (3, 4):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"checkpoint-{step}")
    logs, resumed = trained(model, **options, resume=True, output=tmp_path / "run")
    ends = [[log for log in found if log["step"] >= 3] for found in (whole, logs)]
    for one, other in zip(*ends, strict=True):
        for name in one.keys() & {
            "step",
            "loss",
            "grad_norm",
            "learning_rate",
            "eval_loss",
            *FIGURES,
        }:
            assert other[name] == pytest.approx(one[name], rel=1e-6, abs=1e-7), name
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


def test_a_long_look_at_data_that_training_does_not_see_is_told() -> None:
    notes: list[str] = []
    trained(attached(), max_steps=1, on_note=notes.append)
    (told,) = [note for note in notes if "reference" in note]
    assert "8 pairs first, and training sees 4 of them; data.max_examples: 4" in told


# --- batches and processes -----------------------------------------------------------------------


def test_batches_in_parts_and_accumulated_are_the_same(monkeypatch) -> None:
    whole, weights = trained(attached())
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    accumulated = trained(attached(), **options)
    monkeypatch.setattr(MemoryFit, "_given", lambda self: Setting(0, False, 1))
    in_parts = trained(attached())
    for logs, others in (accumulated, in_parts):
        for log, other in zip(whole, logs, strict=True):
            for name in ("loss", "grad_norm", "tokens", *FIGURES):
                assert other[name] == pytest.approx(log[name], rel=1e-5, abs=1e-6), name
        assert all(torch.allclose(weights[n], others[n], atol=1e-6) for n in weights)


def in_two(folder: str, parallel: str) -> Any:
    from quantadapt.distributed import start
    from quantadapt.sharding import shard

    torch.set_num_threads(1)
    start("cpu")
    base = qa.quantize(folder, "bnb-nf4", device="cpu", dtype="float32")
    if parallel == "fsdp":
        shard(base)
    model = qa.attach(base, "lora", seed=0)
    size = 4 // world().size
    logs, weights = trained(model, per_device_train_batch_size=size)
    return logs, {name: weight.clone() for name, weight in weights.items()}


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_as_one(tmp_path, parallel) -> None:
    (logs, weights), (_, same) = in_processes(2, in_two, tmp_path, str(small_model()), parallel)
    alone, expected = in_two(str(small_model()), "none")
    for log, other in zip(logs, alone, strict=True):
        for name in ("loss", "grad_norm", "tokens", *FIGURES):
            assert log[name] == pytest.approx(other[name], rel=1e-5, abs=1e-5), name
    for name in expected:
        assert torch.equal(weights[name], same[name])
        assert torch.allclose(weights[name], expected[name], atol=1e-6)


# --- a run ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_measures_preferences_before_and_after(tmp_path, capsys) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "eval"):
        (data / f"{name}.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    spec = qa.Spec(
        model=str(small_model()),
        backend="hqq",
        objective="dpo",
        data=str(data),
        train={**TRAIN, "learning_rate": 1.0, "eval_steps": 2},
        evaluate={"samples": 1, "max_new_tokens": 4},
        output=str(tmp_path / "run"),
    )
    result = qa.run(spec)
    figures = result.metrics["evaluations"]["preferences"]
    assert set(figures["accuracy"]["values"]) == {"unquantized", "quantized", "tuned", "merged"}
    margin = figures["margin"]["values"]
    gain = margin["tuned"] - margin["quantized"]
    assert figures["reward-margin"]["values"]["tuned"] == pytest.approx(gain, abs=1e-4)
    assert gain > 0
    assert margin["merged"] == pytest.approx(margin["tuned"], abs=1e-3)
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert any("rewards/margins" in line for line in lines)
    report = (tmp_path / "run" / "report.html").read_text()
    assert "reward-accuracy" in report
    assert "nats per token" not in report.partition("Training loss")[2].partition("</section>")[0]
    again = qa.load(tmp_path / "run")
    found = qa.evaluate(again, data, evaluation="preferences")
    assert found["margin"] == pytest.approx(margin["tuned"], abs=1e-4)
    with pytest.raises(SystemExit) as ended:
        cli.main(["eval", str(tmp_path / "run"), "--json"])  # what it measures by itself
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out)["margin"] == pytest.approx(margin["tuned"], abs=1e-4)


def test_options_of_adalora_are_refused_in_python(tmp_path) -> None:
    with pytest.raises(PlanRefused, match="task-loss-adalora"):
        qa.train(attached(adapter="adalora"), ours(), objective="dpo", max_steps=1)
