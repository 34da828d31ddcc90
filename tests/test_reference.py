"""What answers are compared with in a second stage: the model as that began. Beside TRL's trainers,
which are given a copy or make one, and by hand with stock PEFT."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import test_dpo
import test_grpo
import test_kto
import torch
from merging import moved
from peft import PeftModel
from processes import in_processes
from transformers import AutoModelForCausalLM

import quantadapt as qa
from quantadapt.adapting.fused import FusedLayers, without_casts
from quantadapt.distributed import world
from quantadapt.errors import QuantadaptError
from quantadapt.evaluation.reference import has_reference, refer_to_now, reference
from quantadapt.objectives.rewarded import RewardTask
from quantadapt.quantizing.state import state_of
from quantadapt.testing.small_demo import small_model

functions, given, vowels = test_grpo.functions, test_grpo.given, test_grpo.vowels


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """An adapter that has learnt."""
    return qa.save(moved(test_dpo.attached(), by=0.05), tmp_path / "first")


def stock(adapter: Path) -> Any:
    base = AutoModelForCausalLM.from_pretrained(small_model(), dtype=torch.float32)
    return PeftModel.from_pretrained(base, str(adapter)).eval()


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def compare(
    logs: Any, weights: Any, expected: Any, theirs: Any, before: Any, figures: tuple[str, ...]
) -> None:
    assert len(logs) == len(expected) > 1
    for log, other in zip(logs, expected, strict=True):
        assert log["loss"] == pytest.approx(other["loss"], rel=1e-5, abs=1e-6)
        assert log["grad_norm"] == pytest.approx(other["grad_norm"], rel=5e-5)
        for name in figures:
            assert log[name] == pytest.approx(other[name], rel=1e-5, abs=2e-5), name
    for name, weight in weights.items():
        far = float((theirs[name] - before[name]).norm())
        assert float((weight - theirs[name]).norm()) < 1e-3 * far, name


# Beside TRL ---------------------------------------------------------------------------------------


def test_dpo_goes_on_as_trls_with_a_copy_as_reference(begun, tmp_path) -> None:
    model = qa.load(begun)
    before = weights_of(model)
    found = test_dpo.trained(model)
    rewards = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen")
    compare(*found, *test_dpo.of_trl(tmp_path, begun), before, rewards)
    assert found[0][0]["rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_kto_goes_on_as_trls_with_a_copy_as_reference(begun, tmp_path) -> None:
    data = test_kto.read(test_kto.written(tmp_path, test_kto.ROWS)).train
    model = qa.load(begun)
    before = weights_of(model)
    found = test_kto.trained(model, data)
    expected = test_kto.of_trl(data, tmp_path, begun)
    compare(*found, *expected, before, ("rewards/chosen", "rewards/rejected", "kl"))


@pytest.mark.usefixtures("given")
@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_rewards_go_on_as_trls_which_copies_the_adapter(
    name,
    begun,
    functions,
    tmp_path,
) -> None:
    """Their reference was the model without its adapter: KL was not 0 at the first step."""
    model, data = qa.load(begun), test_grpo.read(test_grpo.written(tmp_path)).train
    before, told = weights_of(model), list[str]()
    objective = {"name": name, "rewards": [f"{functions}:right"], "beta": 0.2}
    found = test_grpo.trained(model, data, objective, on_note=told.append, learning_rate=0.02)
    options = {"rewards": ["right"], "beta": 0.2, "learning_rate": 0.02}
    expected = test_grpo.of_trl(name, functions, tmp_path, begun, **options)
    compare(*found, *expected, before, ("reward", "kl"))
    assert found[0][0]["kl"] == 0 != found[0][-1]["kl"]
    kept = sum(weight.nbytes for weight in before.values())
    (words,) = [note for note in told if "keeps a copy" in note]
    assert words.endswith(f"{kept / 2**10:.0f} KiB")


# By hand ------------------------------------------------------------------------------------------


def test_the_evaluation_compares_with_the_start_of_the_stage(begun, tmp_path) -> None:
    """It compared with the model without its adapter, which is not what dpo had compared with."""
    model = qa.load(begun)
    first = qa.evaluate(model, test_dpo.ours(), evaluation="preferences")
    test_dpo.trained(model, learning_rate=1.0)
    weights = weights_of(model)
    found = qa.evaluate(model, test_dpo.ours(), evaluation="preferences")
    assert all(torch.equal(weights[name], weight) for name, weight in weights_of(model).items())
    saved = qa.save(model, tmp_path / "second")
    with stock(begun).disable_adapter():
        base = test_dpo.by_hand(stock(begun).get_base_model())
    one, two = (test_dpo.by_hand(stock(folder)) for folder in (begun, saved))
    base = test_dpo.by_hand(AutoModelForCausalLM.from_pretrained(small_model()).eval())
    for figures, gains in ((first, one - base), (found, two - one)):
        assert figures["reward-chosen"] == pytest.approx(float(gains[:, 0].mean()), abs=2e-4)
        margins = gains[:, 0] - gains[:, 1]
        assert figures["reward-margin"] == pytest.approx(float(margins.mean()), abs=2e-4)
        assert figures["reward-accuracy"] == float((margins > 0).double().mean())
    # What it had begun with does not lie beside it.
    again = qa.load(saved)
    assert not has_reference(again)
    with pytest.warns(UserWarning, match=r"preferences has no reward-\* figures"):
        left = qa.evaluate(again, test_dpo.ours(), evaluation="preferences")
    assert left["margin"] == pytest.approx(found["margin"], abs=1e-4)
    assert not any(name.startswith("reward") for name in left)


def test_desirability_compares_with_the_start_of_the_stage(begun, tmp_path) -> None:
    data = test_kto.read(test_kto.written(tmp_path, test_kto.ROWS)).train
    model = qa.load(begun)
    test_kto.trained(model, data, learning_rate=1.0)
    found = qa.evaluate(model, data, evaluation="desirability")
    saved = qa.save(model, tmp_path / "second")
    gains = {True: list[float](), False: list[float]()}
    now, then = stock(saved), stock(begun)
    for row in data:
        ids, at = torch.tensor([row["input_ids"]]), row["completion_mask"].index(1)
        both = []
        for one in (now, then):
            with torch.no_grad():
                log_p = one(input_ids=ids).logits[0].double().log_softmax(-1)
            both.append(sum(float(log_p[i - 1, ids[0, i]]) for i in range(at, ids.shape[1])))
        gains[bool(row["desirable"])].append(both[0] - both[1])
    good = sum(gains[True]) / len(gains[True])
    assert found["reward-desirable"] == pytest.approx(good, abs=2e-4)
    margin = good - sum(gains[False]) / len(gains[False])
    assert found["reward-margin"] == pytest.approx(margin, abs=2e-4)


def test_nothing_is_kept_where_the_start_is_the_base(begun) -> None:
    fresh = test_dpo.attached()
    test_dpo.trained(fresh, max_steps=1)
    assert state_of(fresh).begun is None
    assert has_reference(fresh)
    model = qa.load(begun)
    qa.train(model, max_steps=1)  # sft compares with nothing
    assert state_of(model).begun is None
    test_dpo.trained(model, max_steps=1)
    assert state_of(model).begun
    assert state_of(model.unload()).begun is None


@pytest.mark.parametrize(
    ("adapter", "option"),
    [("lora", "init_lora_weights"), ("loha", "init_weights"), ("ia3", "init_ia3_weights")],
)
def test_a_start_from_random_numbers_is_kept(adapter, option) -> None:
    """Of methods other than LoRA it was taken for the model without its adapter."""
    base = qa.quantize(str(small_model()), "none")
    model = qa.attach(base, adapter, seed=0, **{option: False})
    ids = torch.tensor([[5, 6, 7, 8]])
    logits = lambda: model.eval()(input_ids=ids).logits  # noqa: E731
    with torch.no_grad():
        start = logits()
        with model.disable_adapter():
            assert float((logits() - start).norm()) > 1e-3 * float(start.norm())
        assert not has_reference(model)
        assert refer_to_now(model) == sum(w.nbytes for w in weights_of(model).values())
        moved(model, by=0.05)
        assert not torch.equal(logits(), start)
        with reference(model):
            assert torch.equal(logits(), start)


@pytest.mark.usefixtures("given")
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_stage_that_was_interrupted_has_learnt(error, functions, tmp_path) -> None:
    """What came after it was compared with the base, as if nothing had been trained."""
    model, words = test_dpo.attached(), test_dpo.WORDS
    rows = [{"anchor": f"before {words[i]}", "positive": words[i - 1]} for i in range(len(words))]
    file = test_grpo.written(tmp_path, rows).rename(tmp_path / "texts.jsonl")

    def fails(after: int) -> Any:
        def on_log(log: Any) -> None:
            if log["step"] == after:
                raise error

        return on_log

    def embed(after: int, **options: Any) -> None:
        options = {"objective": "embed", "max_steps": 3, "logging_steps": 1, **options}
        qa.train(model, file, on_log=fails(after), tokenizer=test_dpo.tokenizer(), **options)

    with pytest.raises(QuantadaptError):
        embed(1, optim="nonsense")
    assert (state_of(model).learnt, state_of(model).pooling) == (False, "")
    before = weights_of(model)
    with pytest.raises(error):
        embed(2)
    assert any(not torch.equal(before[name], weight) for name, weight in weights_of(model).items())
    assert (state_of(model).learnt, state_of(model).pooling) == (True, "mean")
    again = qa.load(qa.save(model, tmp_path / "saved"))
    assert state_of(again).pooling == "mean"
    kept = weights_of(model)
    assert all(torch.equal(kept[name], weight) for name, weight in weights_of(again).items())
    data = test_grpo.read(test_grpo.written(tmp_path)).train
    objective = {"name": "grpo", "rewards": [f"{functions}:right"], "beta": 0.2}
    logs, _ = test_grpo.trained(model, data, objective)
    assert logs[0]["kl"] == 0 < logs[1]["kl"]


# What computes it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_the_reference_is_computed_with_its_own_weights_in_16_bits(adapter) -> None:
    """Layers that train are lent casts of their weights, which are those of the step before."""
    model = moved(test_dpo.attached("hqq", adapter, dtype="bfloat16"), by=0.05)
    state_of(model).learnt = True
    ids = torch.tensor([[5, 6, 7, 8]])
    logits = lambda: model(input_ids=ids).logits.float()  # noqa: E731
    with torch.no_grad(), FusedLayers(model.eval()).lent() as lent:
        before = logits()
        assert refer_to_now(model) > 0
        moved(model, by=0.05)
        lent.refresh()
        now = logits()
        with reference(model), without_casts(model):
            assert torch.equal(logits(), before)
        assert torch.equal(logits(), now)
    assert float((now - before).norm()) > 0.1 * float(before.norm())


@pytest.mark.usefixtures("given")
@pytest.mark.parametrize("adapter", ["pissa", "loftq"])
def test_a_start_that_changes_the_base_is_a_reference(
    adapter,
    functions,
    tmp_path,
    monkeypatch,
) -> None:
    """It was refused: the model without its adapter is not what training begins with."""
    data = test_grpo.read(test_grpo.written(tmp_path)).train
    model = test_grpo.attached("hqq", adapter)
    objective = {"name": "grpo", "rewards": [f"{functions}:right"], "beta": 0.1}
    asked: list[Any] = []
    remember = RewardTask._remember

    def seen(self: Any, policy: Any, batches: list[Any], most: int) -> None:
        remember(self, policy, batches, most)
        asked.append([dict(batch) for batch in batches])

    monkeypatch.setattr(RewardTask, "_remember", seen)
    logs, _ = test_grpo.trained(model, data, objective)
    assert logs[0]["kl"] == 0 < logs[-1]["kl"]
    (first,), (last,) = asked[0], asked[-1]
    assert torch.equal(first["reference"], last["reference"])


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dpo", "grpo"])
def test_a_resumed_stage_keeps_its_reference(objective, begun, vowels, tmp_path) -> None:
    options = {"save_steps": 1, "max_steps": 4, "output": tmp_path / "run"}
    if objective == "dpo":
        train = lambda model, **more: test_dpo.trained(model, **options, **more)  # noqa: E731
    else:
        data, asked = test_grpo.prompts(tmp_path), test_grpo.sampled(vowels, beta=0.1)
        train = lambda model, **more: test_grpo.trained(  # noqa: E731
            model, data, asked, **options, **more
        )
    model = qa.load(begun)
    logs, weights = train(model)
    figures = qa.evaluate(model, test_dpo.ours(), evaluation="preferences")
    weights = {name: weight.clone() for name, weight in weights.items()}
    for step in (3, 4):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"checkpoint-{step}")
    again = moved(qa.load(begun), by=0.3)  # in memory, and something else by now
    rest, resumed = train(again, resume=True)
    name = "kl" if objective == "grpo" else "rewards/margins"
    assert [log[name] for log in rest] == [log[name] for log in logs[2:]]
    assert all(torch.equal(weights[n], resumed[n]) for n in weights)
    assert qa.evaluate(again, test_dpo.ours(), evaluation="preferences") == figures


def in_two(folder: str, begun: str, parallel: str) -> Any:
    from quantadapt.distributed import start
    from quantadapt.sharding import shard

    torch.set_num_threads(1)
    start("cpu")
    base = qa.quantize(folder, "bnb-nf4", device="cpu", dtype="float32")
    if parallel == "fsdp":
        shard(base)
    model = qa.load(begun, base=base)
    logs, _ = test_dpo.trained(model, per_device_train_batch_size=4 // world().size)
    return logs, qa.evaluate(model, test_dpo.ours(), evaluation="preferences")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_compare_as_one(tmp_path, parallel) -> None:
    folder = str(small_model())
    base = qa.quantize(folder, "bnb-nf4", device="cpu", dtype="float32")
    begun = str(qa.save(moved(qa.attach(base, "lora", seed=0), by=0.05), tmp_path / "first"))
    (logs, figures), (_, same) = in_processes(2, in_two, tmp_path, folder, begun, parallel)
    alone, expected = in_two(folder, begun, "none")
    assert figures == same
    for name in ("rewards/margins", "loss"):
        assert [log[name] for log in logs] == pytest.approx([log[name] for log in alone], rel=1e-4)
    assert figures == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert figures["reward-margin"] != pytest.approx(0, abs=1e-3)
