"""GRPO and RLOO against TRL's trainers on stock PEFT, given the same answers; sampled, accumulated,
resumed, in two processes; and reward functions that do what they should not."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import in_processes
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl_settings import PLAIN

import quantadapt as qa
from quantadapt import demo
from quantadapt.data.prompts import Asked, load_prompts
from quantadapt.distributed import world
from quantadapt.errors import DataError, PlanRefused, RewardError
from quantadapt.generation import Answer
from quantadapt.memory import Setting
from quantadapt.model.head import head_losses
from quantadapt.objectives.grpo import GRPO
from quantadapt.objectives.rloo import RLOO
from quantadapt.pipeline import base as run_base
from quantadapt.rewarding import answering
from quantadapt.testing.small_demo import small_model
from quantadapt.training.memory_fit import MemoryFit

TRAIN = {"max_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 8, "optim": "sgd",
         "learning_rate": 0.3, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}  # fmt: skip
ROWS = [
    {"prompt": "Name a colour.\n", "answer": "red"},
    {"prompt": "What comes after the number four?\n", "answer": "five"},
]
SAID = {
    ROWS[0]["prompt"]: ["It is red.", "red", "No, it is not.", "blue as the sky"],
    ROWS[1]["prompt"]: ["five", "It is five, as everybody knows.", "six", "four and so on"],
}
LENGTH = 6
"""Longest answer of the tests: some are cut."""
SOME = '''
def right(prompts, completions, answer, **columns):
    """Longer answers are worse; what the data say is right."""
    assert len(prompts) == len(completions) == len(columns["completion_ids"])
    return [(a in c) - len(c) / 50 for c, a in zip(completions, answer)]


def short(completions, **_):
    return [None if "six" in c else 1 / len(c) for c in completions]
'''


@cache
def tokenizer() -> Any:
    found = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    found.chat_template = None
    return found


@cache
def said(prompt: str, number: int) -> tuple[int, ...]:
    """The tokens of an answer, cut at the longest length."""
    ids = tokenizer()(SAID[prompt][number], add_special_tokens=False)["input_ids"]
    return tuple([*ids, tokenizer().eos_token_id][:LENGTH])


def written(folder: Path, rows: Sequence[Any] = ROWS) -> Path:
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def read(file: Path, known: Any = None) -> Any:
    spec = qa.Spec(data={"path": str(file), "eval_path": str(file)}).data
    return load_prompts(spec, known or tokenizer(), seed=0)


@pytest.fixture
def functions(tmp_path: Path) -> Path:
    file = tmp_path / "some.py"
    file.write_text(SOME)
    return file


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that do not depend on the model."""

    def answers(_: Any, known: Any, prompts: Sequence[list[int]], *__: Any, **___: Any) -> Any:
        seen: dict[tuple[int, ...], int] = {}
        for ids in prompts:
            prompt = known.decode(ids, skip_special_tokens=True)
            number = seen.get(tuple(ids), 0)
            seen[tuple(ids)] = number + 1
            found = said(prompt, number % 4)
            text = known.decode(found, skip_special_tokens=True)
            finish = "stop" if found[-1] == known.eos_token_id else "length"
            yield Answer(text, len(found), len(ids), finish, found)

    monkeypatch.setattr(answering, "answers", answers)


def attached(backend: str = "none", adapter: str = "lora", **options: Any) -> Any:
    return qa.attach(qa.quantize(str(small_model()), backend, **options), adapter, seed=0)


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def trained(model: Any, data: Any, objective: dict[str, Any], **options: Any) -> Any:
    """Return what was logged, and the adapter's weights."""
    logs: list[dict[str, Any]] = []
    objective = {"num_generations": 4, "max_completion_length": LENGTH, **objective}
    given = {"objective": objective, **TRAIN, **options}
    qa.train(model, data, on_log=logs.append, tokenizer=tokenizer(), **given)
    return logs, weights_of(model)


# --- TRL's ---------------------------------------------------------------------------------------


def of_trl(
    name: str, functions: Path, folder: Path, begun: Path | None = None, **config: Any
) -> Any:
    """The same in TRL's trainer with stock transformers and PEFT; of an adapter that is there
    already, TRL makes a copy."""
    from datasets import Dataset
    from peft import LoraConfig, PeftModel, get_peft_model
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    kind, arguments = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[name]

    class Given(kind):  # type: ignore[misc, valid-type]
        def _generate(self, prompts: list[str]) -> tuple[Any, ...]:
            known, seen = tokenizer(), dict[str, int]()
            ids, texts = [], []
            for prompt in prompts:
                seen[prompt] = seen.get(prompt, -1) + 1
                ids.append(list(said(prompt, seen[prompt] % 4)))
                texts.append(known.decode(ids[-1], skip_special_tokens=True))
            asked = [known(prompt)["input_ids"] for prompt in prompts]
            return (asked, ids, None, texts, None, {}, None, None) if name == "grpo" else (
                asked, ids, texts)  # fmt: skip

    made: dict[str, Any] = {}
    exec(SOME, made)
    start = weights_of(attached())
    base = AutoModelForCausalLM.from_pretrained(small_model(), dtype=torch.float32)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(start[parameter_name])
    if begun is not None:
        base = AutoModelForCausalLM.from_pretrained(small_model(), dtype=torch.float32)
        model = PeftModel.from_pretrained(base, str(begun), is_trainable=True)
    weights = config.pop("reward_weights", None)
    names = config.pop("rewards")
    options = {n: v for n, v in TRAIN.items() if n != "warmup_ratio"}
    args = arguments(
        **{**options, **config, **PLAIN},
        reward_weights=weights,
        num_generations=4,
        max_completion_length=LENGTH,
        shuffle_dataset=False,
        output_dir=str(folder),
    )
    known = AutoTokenizer.from_pretrained(demo.MODEL_DIR, padding_side="left")
    trainer = Given(
        model,
        reward_funcs=[made[n] for n in names],
        args=args,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=known,
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return logs, weights_of(model)


CASES: dict[str, dict[str, Any]] = {
    "grpo: dapo, kl, two functions": {
        "beta": 0.2,
        "temperature": 0.7,
        "rewards": ["right", "short"],
        "reward_weights": [0.5, 2.0],
    },
    "grpo: grpo, batch": {"loss_type": "grpo", "scale_rewards": "batch"},
    "grpo: dr_grpo, none": {
        "loss_type": "dr_grpo",
        "scale_rewards": "none",
        "beta": 0.1,
        "use_bias_correction_kl": False,
    },
    "grpo: bnpo, truncated": {"loss_type": "bnpo", "mask_truncated_completions": True},
    "grpo: dapo, truncated": {"mask_truncated_completions": True},
    "grpo: clipped": {
        "num_iterations": 2,
        "epsilon": 0.02,
        "epsilon_high": 0.01,
        "loss_type": "grpo",
        "learning_rate": 2.0,
    },
    "rloo: kl": {"beta": 0.2, "temperature": 1.3},
    "rloo: clipped": {
        "num_iterations": 2,
        "epsilon": 0.02,
        "beta": 0.0,
        "normalize_advantages": True,
        "reward_clip_range": (-0.1, 0.8),
        "learning_rate": 1.0,
    },
}
QUICK = ("grpo: dapo, kl, two functions",)
THEIRS = ("reward", "reward_std", "frac_reward_zero_std", "clip_ratio/region_mean")
FIGURES = (*THEIRS, "completions/mean_length", "completions/clipped_ratio")


@pytest.mark.usefixtures("given")
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c in QUICK else pytest.mark.slow) for c in CASES]
)
def test_losses_figures_and_gradients_are_trls(case, functions, tmp_path) -> None:
    """SGD takes the gradients as they are, so equal weights are equal gradients."""
    options = {"rewards": ["right"], **CASES[case]}
    name = case.partition(":")[0]
    rate = options.pop("learning_rate", TRAIN["learning_rate"])
    expected, theirs = of_trl(name, functions, tmp_path, learning_rate=rate, **options)
    names = [f"{functions}:{function}" for function in options.pop("rewards")]
    model, data = attached(), read(written(tmp_path)).train
    before = weights_of(model)
    objective = {"name": name, "rewards": names, **options}
    logs, weights = trained(model, data, objective, learning_rate=rate)
    assert len(logs) == len(expected) == TRAIN["max_steps"]
    for log, other in zip(logs, expected, strict=True):
        later = 30 if log["step"] > 2 else 1  # rounding is learnt, too
        assert log["loss"] == pytest.approx(other["loss"], rel=later * 1e-6, abs=1e-6)
        assert log["grad_norm"] == pytest.approx(other["grad_norm"], rel=max(2e-5, later * 2e-6))
        for figure in (*THEIRS, *(["kl"] if options.get("beta") else [])):
            if figure not in other:  # of answers that are used again
                assert options["num_iterations"] > 1
                continue
            assert log[figure] == pytest.approx(other[figure], rel=2e-5, abs=1e-6), figure
        if len(names) > 1:
            for function in ("right", "short"):
                found = other[f"rewards/{function}/mean"]
                assert log[f"rewards/{function}"] == pytest.approx(found, rel=1e-6)
        sizes = [len(said(row["prompt"], number)) for row in ROWS for number in range(4)]
        assert log["completions/mean_length"] == pytest.approx(sum(sizes) / 8)
        assert 0 < log["completions/clipped_ratio"] < 1
    if "clipped" in case:
        assert max(log["clip_ratio/region_mean"] for log in logs) > 0
    if "kl" in case:
        assert logs[-1]["kl"] != 0
    for parameter, weight in weights.items():
        moved = float((theirs[parameter] - before[parameter]).norm())
        assert moved > 0
        assert float((weight - theirs[parameter]).norm()) < 5e-4 * moved


def test_advantages_are_those_of_the_papers() -> None:
    """By hand: (r - mean) / (std + 1e-4), and r - mean of the others."""
    rewards = torch.tensor([1.0, 0.0, 0.0, 3.0, 2.0, 2.0, 2.0, 2.0], dtype=torch.float64)
    options = {"rewards": ("a:b",), "num_generations": 4}
    std = math.sqrt((0 + 1 + 1 + 4) / 3)
    found = GRPO(**options).advantages(rewards)
    assert found[:4].tolist() == pytest.approx([(r - 1) / (std + 1e-4) for r in (1, 0, 0, 3)])
    assert found[4:].tolist() == [0.0] * 4
    found = RLOO(**options).advantages(rewards)
    expected = [1 - 3 / 3, 0 - 4 / 3, 0 - 4 / 3, 3 - 1 / 3, 0, 0, 0, 0]
    assert found.tolist() == pytest.approx(expected)
    nothing = torch.tensor([1.0, math.nan, 0.0, 2.0])
    assert GRPO(**options).advantages(nothing).nan_to_num()[1] == 0


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_temperature_divides_logits_after_the_cap(softcap) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 40, dtype=torch.float64).requires_grad_(False)
    hidden = torch.randn(200, 8, dtype=torch.float64, requires_grad=True)
    labels, weights = torch.randint(40, (200,)), torch.randn(200)
    losses = head_losses(hidden, labels, head, softcap=softcap, temperature=0.7)
    (losses * weights).sum().backward()
    found, hidden.grad = hidden.grad, None
    logits = head(hidden)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = torch.nn.functional.cross_entropy(logits / 0.7, labels, reduction="none")
    (expected * weights).sum().backward()
    assert torch.allclose(losses.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.allclose(found, hidden.grad, rtol=1e-4, atol=1e-6)


# --- sampled -------------------------------------------------------------------------------------


def sampled(file: Path, **objective: Any) -> dict[str, Any]:
    return {"name": "grpo", "rewards": [f"{file}:vowels"], "temperature": 1.0, **objective}


@pytest.fixture
def vowels(tmp_path: Path) -> Path:
    file = tmp_path / "vowels.py"
    file.write_text(
        "def vowels(completions, **_):\n"
        "    return [sum(c in 'aeiou' for c in text) / (len(text) + 1) for text in completions]\n"
    )
    return file


def prompts(folder: Path, count: int = 16) -> Any:
    return read(written(folder, [{"prompt": f"Say number {i}.\n"} for i in range(count)])).train


@pytest.mark.slow
def test_a_reward_is_learnt_from_answers_of_its_own(vowels, tmp_path) -> None:
    """Also on a quantized base; the held-out figure is that of other draws."""
    model, data = attached("hqq"), prompts(tmp_path, 8)
    measured = {"evaluation": "rewarded", "rewards": (f"{vowels}:vowels",), "temperature": 1.0,
                "max_completion_length": LENGTH, "seed": 5}  # fmt: skip
    before = qa.evaluate(model, data, **measured)
    options = {"max_steps": 12, "optim": "adamw_torch", "learning_rate": 0.02,
               "per_device_train_batch_size": 16}  # fmt: skip
    logs, _ = trained(model, data, sampled(vowels), **options)
    after = qa.evaluate(model, data, **measured)
    assert after["reward"] > before["reward"] + 0.05
    assert logs[-1]["reward"] > logs[0]["reward"]
    assert all(log["tokens"] > 0 for log in logs)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_answers_that_are_not_recorded_are_told_of(device, vowels, tmp_path, monkeypatch) -> None:
    """Once, where a GPU would record them."""
    notes: list[str] = []
    monkeypatch.setattr(
        "quantadapt.training.rollouts.adapter_device", lambda _: torch.device(device)
    )
    monkeypatch.setattr("quantadapt.generation.slots.unrecorded", lambda _: "it cannot")
    options = {"max_steps": 2, "on_note": notes.append}
    trained(attached(), prompts(tmp_path), sampled(vowels), **options)
    assert sum("without CUDA graphs" in note for note in notes) == (device == "cuda")


def test_answers_are_those_of_generate_with_the_seed_of_the_step(
    vowels, tmp_path, monkeypatch
) -> None:
    """Before the first step they are what the untrained model draws, one prompt at a time."""
    seen: list[Any] = []
    real = answering.answers

    def noted(model: Any, known: Any, ids: Any, sampling: Any, **options: Any) -> Any:
        for one, answer in zip(ids, real(model, known, ids, sampling, **options), strict=True):
            seen.append((one, sampling, options["first"] + len(seen), answer))
            yield answer

    monkeypatch.setattr(answering, "answers", noted)
    model = attached()
    trained(model, prompts(tmp_path), sampled(vowels), max_steps=1)
    monkeypatch.undo()
    assert len(seen) == 8
    fresh = attached()
    for ids, sampling, number, answer in seen:
        (alone,) = real(fresh, tokenizer(), [ids], sampling, first=number)
        assert alone.ids == answer.ids
    assert len({answer.ids for *_, answer in seen[:4]}) > 1  # of one group


@pytest.mark.slow
@pytest.mark.parametrize("iterations", [1, 3])
def test_a_resumed_run_is_the_same_bit_for_bit(vowels, tmp_path, iterations) -> None:
    """Draws are seeded by the step; answers that are used further lie in the checkpoint."""
    objective = sampled(vowels, num_iterations=iterations, beta=0.1)
    options = {"save_steps": 1, "max_steps": 5, "optim": "adamw_torch", "learning_rate": 0.01}
    model, data = attached(), prompts(tmp_path)
    logs, weights = trained(model, data, objective, **options, output=tmp_path / "run")
    for step in (3, 4, 5):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"checkpoint-{step}")
    again, resumed = trained(
        attached(), data, objective, **options, resume=True, output=tmp_path / "run"
    )
    assert [log["step"] for log in again] == [3, 4, 5]
    for log, other in zip(logs[2:], again, strict=True):
        for name in ("loss", "grad_norm", "reward", "kl", "completions/mean_length"):
            assert log[name] == other[name], name
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


@pytest.mark.slow
@pytest.mark.usefixtures("given")
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_accumulated_and_in_parts_is_the_same(functions, tmp_path, monkeypatch, loss_type) -> None:
    data = read(written(tmp_path)).train
    objective = {"name": "grpo", "rewards": [f"{functions}:right"], "beta": 0.1}
    objective["loss_type"] = loss_type
    whole, weights = trained(attached(), data, objective)
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    accumulated = trained(attached(), data, objective, **options)
    monkeypatch.setattr(MemoryFit, "_given", lambda self: Setting(0, False, 3))
    in_parts = trained(attached(), data, objective)
    for logs, others in (accumulated, in_parts):
        for log, other in zip(whole, logs, strict=True):
            for name in ("loss", "grad_norm", "tokens", "kl", *FIGURES):
                assert other[name] == pytest.approx(log[name], rel=1e-5, abs=1e-6), name
        assert all(torch.allclose(weights[n], others[n], atol=1e-6) for n in weights)


def in_two(folder: str, file: str, function: str) -> Any:
    from quantadapt.distributed import start

    torch.set_num_threads(1)
    start("cpu")
    answering.answers = fixed  # type: ignore[assignment]
    model = qa.attach(qa.quantize(folder, "none", device="cpu", dtype="float32"), "lora", seed=0)
    size = 8 // world().size
    objective = {"name": "grpo", "rewards": [function], "scale_rewards": "batch"}
    data = read(Path(file)).train
    return trained(model, data, objective, per_device_train_batch_size=size)


def fixed(_: Any, known: Any, ids: Sequence[list[int]], *__: Any, **___: Any) -> Any:
    for at, one in enumerate(ids):
        found = said(known.decode(one, skip_special_tokens=True), at % 4)
        text = known.decode(found, skip_special_tokens=True)
        finish = "stop" if found[-1] == known.eos_token_id else "length"
        yield Answer(text, len(found), len(one), finish, found)


@pytest.mark.slow
def test_two_processes_train_as_one(functions, tmp_path, monkeypatch) -> None:
    """Each answers its own prompts; deviations of a batch are those of all."""
    monkeypatch.setattr(answering, "answers", fixed)
    file, function = str(written(tmp_path)), f"{functions}:right"
    both = in_processes(2, in_two, tmp_path, str(small_model()), file, function)
    (logs, weights), (_, same) = both
    alone, expected = in_two(str(small_model()), file, function)
    for log, other in zip(logs, alone, strict=True):
        for name in ("loss", "grad_norm", "tokens", *FIGURES):
            assert log[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6), name
    for name in expected:
        assert torch.equal(weights[name], same[name])
        assert torch.allclose(weights[name], expected[name], atol=1e-6)


def uneven_in_two(folder: str, file: str, function: str) -> Any:
    """Train an epoch of which the last prompts are fewer; return figures and notes."""
    from quantadapt.distributed import start

    torch.set_num_threads(1)
    start("cpu")
    answering.answers = fixed  # type: ignore[assignment]
    notes: list[str] = []
    model = qa.attach(qa.quantize(folder, "none", device="cpu", dtype="float32"), "lora", seed=0)
    objective = {"name": "grpo", "rewards": [function], "scale_rewards": "batch"}
    options: dict[str, Any] = {"max_steps": -1, "num_train_epochs": 1, "on_note": notes.append}
    options["per_device_train_batch_size"] = 16 // world().size
    data = read(Path(file)).train
    return trained(model, data, objective, **options)[0], [n for n in notes if "evenly" in n]


@pytest.mark.slow
def test_the_last_prompts_of_an_epoch_are_shared_out_evenly(functions, tmp_path, monkeypatch):
    """Of seven, two and one; of five, a single one, which both get."""
    monkeypatch.setattr(answering, "answers", fixed)
    function, told = f"{functions}:right", []
    for count in (7, 5):
        file = str(written(tmp_path, (ROWS * 4)[:count]))
        alone, _ = uneven_in_two(str(small_model()), file, function)
        (logs, notes), _ = in_processes(
            2, uneven_in_two, tmp_path, str(small_model()), file, function
        )
        told.append(len(notes))
        for log, other in list(zip(logs, alone, strict=True))[: 2 if count == 7 else 1]:
            for name in ("loss", "grad_norm", *FIGURES):
                assert log[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6), name
    assert told == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["dora", "ia3", "vera", "pissa"])
def test_other_adapters_learn_on_a_quantized_base(vowels, tmp_path, adapter) -> None:
    objective = sampled(vowels, name="rloo", beta=0.0)
    options = {"optim": "adamw_torch", "learning_rate": 0.01}
    logs, _ = trained(attached("hqq", adapter), prompts(tmp_path), objective, **options)
    assert all(math.isfinite(log["loss"]) and log["grad_norm"] > 0 for log in logs)


# --- what is refused -----------------------------------------------------------------------------

BAD = {
    "raises": ("    raise KeyError('answer')", "failed with KeyError: 'answer'"),
    "hangs": ("    import time; time.sleep(30)", "has not returned after 0.5 s"),
    "exits": ("    raise SystemExit(3)", "failed with SystemExit: 3"),
    "nan": ("    return [float('nan')] * len(completions)", "returned 'nan', which is no finite"),
    "none": ("    return None", "returned None, no list"),
    "short": ("    return [1.0]", "returned 1 rewards for 8 completions"),
    "text": (
        "    return ['good'] * len(completions)",
        "returned the text 'good', which is",
    ),
    "a number": ("    return 1.0", "returned float, no list"),
    "too large": ("    return [1e39] * len(completions)", "no finite number of 32 bits"),
    "a number in text": ("    return ['1'] * len(completions)", "returned the text '1', which is"),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k in ("hangs", "nan") else pytest.mark.slow) for k in BAD]
)
def test_a_bad_reward_function_is_told(kind, tmp_path) -> None:
    body, expected = BAD[kind]
    file = tmp_path / "bad.py"
    file.write_text(f"def reward(completions, **_):\n{body}\n")
    objective = {"name": "grpo", "rewards": [f"{file}:reward"], "reward_timeout": 0.5}
    started = time.monotonic()
    with pytest.raises(RewardError, match=expected) as found:
        trained(attached(), prompts(tmp_path), objective)
    assert found.value.problems[0].where == "reward"
    assert time.monotonic() - started < 20


def test_a_bad_function_ends_a_run_before_the_base_is_quantized(tmp_path, monkeypatch) -> None:
    file = tmp_path / "bad.py"
    file.write_text("def reward(completions, **_):\n    return [float('nan')] * len(completions)\n")
    rows = [{"prompt": f"Say number {i}.\n"} for i in range(8)]
    spec = qa.Spec(
        model=str(small_model()),
        backend="none",
        objective={"name": "grpo", "rewards": [f"{file}:reward"], "max_completion_length": 4},
        data=str(written(tmp_path, rows)),
        train={"max_steps": 1, "per_device_train_batch_size": 8},
        output=str(tmp_path / "run"),
    )
    quantized: list[Any] = []
    monkeypatch.setattr(run_base, "quantize_plan", lambda *_, **__: quantized.append(1))
    with pytest.raises(RewardError, match="which is no finite number"):
        qa.run(spec)
    assert not quantized


def test_what_was_learnt_before_a_failure_is_kept(tmp_path) -> None:
    file = tmp_path / "later.py"
    file.write_text(
        "calls = []\n\n\ndef later(completions, **_):\n    calls.append(1)\n"
        "    assert len(calls) < 3, 'the third'\n    return [len(c) for c in completions]\n"
    )
    objective, data = {"name": "grpo", "rewards": [f"{file}:later"]}, prompts(tmp_path)
    with pytest.raises(RewardError, match="the third") as found:
        trained(attached(), data, objective, output=tmp_path / "run")
    assert "go on with --resume: a checkpoint of step 2 is there" in str(found.value)
    file.write_text("def later(completions, **_):\n    return [len(c) for c in completions]\n")
    logs, _ = trained(attached(), data, objective, output=tmp_path / "run", resume=True)
    assert [log["step"] for log in logs] == [3, 4]


def test_equal_rewards_are_told_once(tmp_path) -> None:
    file, notes = tmp_path / "same.py", list[str]()
    file.write_text("def same(completions, **_):\n    return [0.5] * len(completions)\n")
    objective = {"name": "grpo", "rewards": [f"{file}:same"]}
    logs, _ = trained(attached(), prompts(tmp_path), objective, on_note=notes.append)
    (told,) = [note for note in notes if "same reward" in note]
    assert told.startswith("step 1: all answers to each prompt got the same reward (0.5 on the")
    assert [log["frac_reward_zero_std"] for log in logs] == [1.0] * 4
    assert [log["grad_norm"] for log in logs] == [0.0] * 4


PROBLEMS = {
    "groups": ({"num_generations": 3}, {}, r"8 answers are no whole groups of 3[^$]*e.g. 6"),
    "weights": ({"reward_weights": [1, 2]}, {}, "there are 2 reward_weights for 1 reward"),
    "none": ({"rewards": []}, {}, r"objective.rewards.*learns from reward functions"),
    "no file": ({"rewards": ["gone.py:f"]}, {}, "there is no file gone.py"),
    "no function": ({"rewards": ["FILE:other"]}, {}, "there is no function 'other' in"),
    "no name": ({"rewards": ["rewardz"]}, {}, "there is no reward function 'rewardz'"),
    "validation": ({}, {"eval_steps": 2}, "has no loss on held-out data"),
    "packing": ({}, {"packing": True}, "does not keep the examples of a row apart"),
    "length": ({"max_completion_length": 512}, {}, "leave no room for a prompt"),
}


def test_a_plan_tells_that_the_demo_is_no_start() -> None:
    objective = {
        "name": "grpo",
        "rewards": [f"{Path(__file__).parents[1]}/configs/passes_tests.py:passes"],
    }
    train = {"per_device_train_batch_size": 8}
    notes = qa.plan(qa.Spec(objective=objective, train=train)).notes
    assert any("gets none of its own prompts right" in note for note in notes)
    notes = qa.plan(qa.Spec(model=str(demo.MODEL_DIR), objective=objective, train=train)).notes
    assert not any("gets none of its own prompts right" in note for note in notes)


@pytest.mark.parametrize("case", PROBLEMS)
def test_what_a_plan_can_foresee_it_refuses(case, functions, tmp_path) -> None:
    objective, train, expected = PROBLEMS[case]
    names = objective.get("rewards", ["FILE:right"])
    objective = {"name": "grpo", "num_generations": 4, **objective}
    objective["rewards"] = [name.replace("FILE", str(functions)) for name in names]
    spec = qa.Spec(
        objective=objective,
        train={"per_device_train_batch_size": 8, **train},
        data=str(written(tmp_path)),
        output=str(tmp_path / "run"),
    )
    with pytest.raises(PlanRefused, match=expected):
        qa.plan(spec)


def test_a_sharded_base_is_refused(functions, tmp_path) -> None:
    spec = qa.Spec(
        objective={"name": "grpo", "rewards": [f"{functions}:right"]},
        train={"per_device_train_batch_size": 8, "parallel": "fsdp"},
        data=str(written(tmp_path)),
        output=str(tmp_path / "run"),
    )
    with pytest.raises(PlanRefused, match="fsdp-generates"):
        qa.plan(spec, processes=2)


def test_a_prompt_that_leaves_no_room_is_told_before_the_first_step(functions, tmp_path) -> None:
    spec = qa.Spec(data={"path": str(written(tmp_path, [{"prompt": "word " * 900}] * 2)),
                         "eval_fraction": 0.5, "max_length": 4000}).data  # fmt: skip
    data = load_prompts(spec, tokenizer(), seed=0).train
    with pytest.raises(qa.QuantadaptError, match="tokens, the model is made for 512"):
        trained(attached(), data, {"name": "grpo", "rewards": [f"{functions}:right"]})


# --- data ----------------------------------------------------------------------------------------


def test_prompts_without_answers_are_measured_by_rewards_alone(tmp_path) -> None:
    """From a file that is named: functions get its columns, and no token of a prompt counts as one
    that is to be predicted."""
    (tmp_path / "given.py").write_text("def level(completions, level, **_):\n    return level\n")
    file = written(tmp_path, [{"prompt": f"Say {i}.\n", "level": i} for i in range(4)])
    measured = {"rewards": (f"{tmp_path}/given.py:level",), "max_completion_length": 2}
    found = qa.evaluate(attached(), file, evaluation="rewarded", **measured)
    assert (found["reward"], found["answers"]) == (1.5, 4)
    with pytest.raises(DataError, match="no token to predict"):
        qa.evaluate(attached(), file)


def test_prompts_of_all_formats_and_their_columns(tmp_path) -> None:
    with_template = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    turns = [{"role": "user", "content": "Name a colour."}]
    rows = [{"prompt": turns, "answer": {"is": ["red", 1]}, "level": 3}]
    rows += [{"prompt": turns, "answer": "blue", "level": None}]
    one, other = map(Asked.of, read(written(tmp_path, rows), with_template).train)
    assert one.prompt == turns
    assert one.columns == {"answer": {"is": ["red", 1]}, "level": 3}
    assert other.columns == {"answer": "blue", "level": None}
    text = with_template.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert with_template.decode(one.ids) == text
    answer = {"role": "assistant", "content": "Red."}
    whole = [{"messages": [*turns, answer], "level": 1}] * 2
    (asked, _) = map(Asked.of, read(written(tmp_path, whole), with_template).train)
    assert (asked.prompt, asked.columns) == (turns, {"reference": "Red.", "level": 1})
    assert asked.ids == one.ids
    pair = [{"prompt": "a?", "completion": " b.", "label": 1}] * 2
    (asked, _) = map(Asked.of, data := read(written(tmp_path, pair)).train)
    assert (asked.prompt, asked.columns) == ("a?", {"reference": " b.", "label": 1})
    assert tokenizer().decode(data[0]["input_ids"]) == "<s>a? b.</s>"
    assert sum(data[0]["completion_mask"]) == len(data[0]["input_ids"]) - len(asked.ids)
    alpaca = [{"instruction": "Name a colour.", "output": "Red."}] * 2
    (asked, _) = map(Asked.of, read(written(tmp_path, alpaca)).train)
    assert asked.prompt.startswith("### Instruction:")
    assert asked.columns["reference"] == asked.columns["output"] == "Red."
    plain = [{"text": "Name a colour."}] * 2
    with pytest.raises(DataError, match="plain text asks nothing"):
        read(written(tmp_path, plain))
    long = [{"prompt": "word " * 600}, {"prompt": "a"}]
    assert len(read(written(tmp_path, long)).train) == 1


def test_the_shipped_reward_runs_code_of_a_model_apart() -> None:
    from quantadapt.rewarding.functions import functions_of

    (passes,) = functions_of(["passes_tests.py:passes"], 60).values()
    right = 'def f(a, b):\n    """Return."""\n    return a - b'
    answers = {
        right: 1.0,
        "def f(x, y): return -y + x": 1.0,
        "def f(a, b):\n    return b - a": 0.0,
        "def g(a, b):\n    return a - b": 0.0,
        "def f(a, b):\n    while True: pass": 0.0,
        "import os\ndef f(a, b): return a - b": 0.0,
        "def f(a, b): return open('/etc/passwd')": 0.0,
        "no code": 0.0,
    }
    found = passes(completions=list(answers), reference=[right] * len(answers))
    assert found == list(answers.values())


@pytest.mark.slow
def test_a_run_measures_rewards_before_and_after(vowels, tmp_path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = [json.dumps({"prompt": f"Say number {i}.\n"}) for i in range(8)]
    for name in ("train", "eval"):
        (data / f"{name}.jsonl").write_text("\n".join(rows))
    spec = qa.Spec(
        model=str(small_model()),
        backend="hqq",
        objective=sampled(vowels, num_generations=4, max_completion_length=LENGTH),
        data=str(data),
        train={**TRAIN, "max_steps": 8, "optim": "adamw_torch", "learning_rate": 0.02},
        evaluate={"samples": 1, "max_new_tokens": 4},
        output=str(tmp_path / "run"),
    )
    result = qa.run(spec)
    values = result.metrics["evaluations"]["rewarded"]["reward"]["values"]
    assert set(values) == {"unquantized", "quantized", "tuned", "merged"}
    assert values["merged"] == pytest.approx(values["tuned"], abs=0.05)
    lines = [*map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())]
    assert all("reward" in line for line in lines)
    assert not [text for text in result.metrics["warnings"] if "loss" in text]
    report = (tmp_path / "run" / "report.html").read_text()
    assert "Training reward by step" in report
