"""Distillation: against TRL's loss, by hand in float64, against a whole computation, and run."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

import quantadapt as qa
from quantadapt import demo
from quantadapt.data.batches import CausalCollator, PackedCollator
from quantadapt.errors import ModelError, PlanRefused, TrainingError
from quantadapt.loading.reading import read_config
from quantadapt.memory import passes
from quantadapt.model import divergence
from quantadapt.model.divergence import Mix, Predicted, divergences
from quantadapt.model.head import Head
from quantadapt.model.packed_attention import is_lent
from quantadapt.objectives.distill import Distill
from quantadapt.planning.stage import plan
from quantadapt.spec import DataSpec, Spec, TrainSpec
from quantadapt.testing.small_demo import small_model
from quantadapt.training.packing import kept_apart

TOKENS, VOCABULARY = 7, 50
KINDS = pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
TRAIN = {"max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 4, "optim": "sgd",
         "learning_rate": 0.5, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}  # fmt: skip


def heads(
    softcap: float | None = None, bias: bool = True, wider: int = 0
) -> tuple[Head, Head, Any, Any, Any]:
    """Return heads of a student and a teacher, what they get, and the tokens that follow."""
    torch.manual_seed(3)
    ours = torch.nn.Linear(12, VOCABULARY, bias=bias).requires_grad_(False)
    theirs = torch.nn.Linear(20, VOCABULARY + wider, bias=not bias).requires_grad_(False)
    ours.weight *= 6
    theirs.weight *= 6
    rows = torch.randn(TOKENS, 12), torch.randn(TOKENS, 20)
    return Head(ours, softcap), Head(theirs, None), *rows, torch.randint(VOCABULARY, (TOKENS,))


def logits_of(head: Head, rows: torch.Tensor) -> torch.Tensor:
    """Logits in float64."""
    bias = None if head.linear.bias is None else head.linear.bias.double()
    made = torch.nn.functional.linear(rows.double(), head.linear.weight.double(), bias)
    return made if head.softcap is None else head.softcap * torch.tanh(made / head.softcap)


def expected(student: Any, teacher: Any, labels: Any, mix: Mix) -> torch.Tensor:
    """The loss of each token as papers write it, of logits in float64."""
    s, t = ((z / mix.temperature).softmax(-1) for z in (student, teacher))
    if mix.beta in (0, 1):
        p, q = (t, s) if mix.beta == 0 else (s, t)
        apart = (p * (p / q).log()).sum(-1)
    else:
        m = mix.beta * t + (1 - mix.beta) * s
        apart = mix.beta * (t * (t / m).log()).sum(-1)
        apart = apart + (1 - mix.beta) * (s * (s / m).log()).sum(-1)
    nats = cross_entropy(student, labels, reduction="none")
    return (1 - mix.alpha) * apart + mix.alpha * nats


@KINDS
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.0), (2.5, 0.4), (1.0, 1.0)])
def test_loss_and_gradient_are_those_of_whole_logits(
    beta: float, softcap: float | None, temperature: float, alpha: float, monkeypatch: Any
) -> None:
    monkeypatch.setattr(divergence, "DIVERGENCE_CHUNK", 3 * 4 * VOCABULARY)  # in three chunks
    ours, theirs, rows, taught, labels = heads(softcap, wider=3 * (alpha == 0))
    mix = Mix(beta, temperature, alpha)
    weights = torch.linspace(0.5, 2.0, TOKENS)
    rows.requires_grad_()
    found = divergences(Predicted(rows, ours), Predicted(taught, theirs), labels, mix)
    (found * weights).sum().backward()
    exact = rows.detach().double().requires_grad_()
    teacher = logits_of(theirs, taught)[:, :VOCABULARY]
    wanted = expected(logits_of(ours, exact), teacher, labels, mix)
    (wanted * weights.double()).sum().backward()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rows.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)


@KINDS
def test_logits_without_a_head_are_taken_as_they_are(beta: float) -> None:
    ours, theirs, rows, taught, labels = heads(bias=False)
    student = logits_of(ours, rows).float().requires_grad_()
    teacher = logits_of(theirs, taught).float()
    found = divergences(Predicted(student, None), Predicted(teacher, None), labels, Mix(beta))
    found.sum().backward()
    exact = student.detach().double().requires_grad_()
    wanted = expected(exact, teacher.double(), labels, Mix(beta))
    wanted.sum().backward()
    torch.testing.assert_close(found.double(), wanted.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


# --- the objective -------------------------------------------------------------------------------


@cache
def dense() -> Any:
    return AutoModelForCausalLM.from_pretrained(small_model(), dtype=torch.float32).eval()


def batch_of(data: Any, *rows: int) -> dict[str, Any]:
    return CausalCollator(0)([data[row] for row in rows])


def attached(backend: str = "hqq", adapter: str = "lora", **options: Any) -> Any:
    options |= {"bits": 2} if backend == "hqq" else {}
    return qa.attach(qa.quantize(str(small_model()), backend, **options), adapter, seed=0)


class Around:
    """What a task is given, of which distillation looks at the model, and how rows are filled."""

    def __init__(self, model: Any, *, packing: bool = False) -> None:
        self.model, self.tokenizer, self.spec = model, None, TrainSpec(packing=packing)


@pytest.mark.slow  # to import it takes seconds
@KINDS
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_it_is_the_loss_of_trl(beta: float, temperature: float, random_data: Any) -> None:
    """Logits of stock transformers' dense model and of the whole student, in TRL's function."""
    from trl.experimental.gkd import GKDTrainer

    model, task = attached(), Distill(beta=beta, temperature=temperature)
    batch = batch_of(random_data, 0, 1, 2)
    ids, labels = batch["input_ids"], batch["labels"][:, 1:]
    with torch.no_grad():
        logits = [m(input_ids=ids).logits[:, :-1] for m in (model, dense())]
        of_trl = GKDTrainer.generalized_jsd_loss(
            *logits, labels=labels, beta=beta, temperature=temperature
        )
    with task.holding(Around(model), lambda _: None):  # type: ignore[arg-type]
        found = task.loss(model, dict(batch), float(task.count(batch))).detach()
    assert float(found) == pytest.approx(float(of_trl), abs=1e-6, rel=1e-6)
    assert float(found) > 0.01


def test_gradients_are_those_of_whole_logits(random_data: Any) -> None:
    model, task = attached(adapter="dora"), Distill(alpha=0.25)
    trained = [p for p in model.parameters() if p.requires_grad]
    batch = batch_of(random_data, 3, 4)
    with task.holding(Around(model), lambda _: None):  # type: ignore[arg-type]
        task.loss(model, dict(batch), float(task.count(batch))).backward()
    found = [p.grad.clone() for p in trained]
    model.zero_grad()
    ids, labels = batch["input_ids"], batch["labels"][:, 1:]
    kept = labels != -100
    logits = model(input_ids=ids).logits[:, :-1][kept]
    with torch.no_grad():
        taught = dense()(input_ids=ids).logits[:, :-1][kept]
    apart = kl_div(
        logits.log_softmax(-1), taught.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    (0.75 * apart + 0.25 * cross_entropy(logits, labels[kept])).backward()
    for one, parameter in zip(found, trained, strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-4, atol=1e-7)


def test_no_logits_are_whole(random_data: Any, monkeypatch: Any) -> None:
    """Neither model makes logits of a batch, and the teacher is gone afterwards."""
    model, task = attached(), Distill()
    monkeypatch.setattr(divergence, "DIVERGENCE_CHUNK", 4 * 5 * dense().config.vocab_size)
    seen: list[int] = []
    real = divergence._of_logits

    def counted(student: Any, teacher: Any, *rest: Any) -> Any:
        seen.append(len(student))
        return real(student, teacher, *rest)

    monkeypatch.setattr(divergence, "_of_logits", counted)
    batch = batch_of(random_data, 0, 1, 2, 3)
    tokens = task.count(batch)
    with task.holding(Around(model), lambda _: None):  # type: ignore[arg-type]
        task.loss(model, batch, float(tokens))
        assert task._held is not None
    assert task._held is None
    assert sum(seen) == tokens
    assert max(seen) == 5


@pytest.mark.slow
def test_training_brings_a_quantized_base_back(random_data: Any) -> None:
    """Judged by stock PEFT's logits against the dense model's: 2 bits cost much, distilling gets
    a part of it back, and a packed run does the same."""
    batch = batch_of(random_data, *range(8))
    ids, kept = batch["input_ids"], batch["labels"][:, 1:] != -100

    def apart(model: Any) -> float:
        with torch.no_grad():
            both = [m(input_ids=ids).logits[:, :-1][kept].log_softmax(-1)
                    for m in (model.eval(), dense())]  # fmt: skip
        return float(kl_div(*both, log_target=True, reduction="batchmean"))

    given = {**TRAIN, "max_steps": 16, "optim": "adamw_torch", "learning_rate": 1e-3}
    for packing in (False, True):
        model = attached()
        before = apart(model)
        result = qa.train(model, random_data, objective="distill", packing=packing, **given)
        assert apart(model) < 0.8 * before
        assert result.losses[-1][1] < result.losses[0][1]


def test_in_parts_it_is_the_same(random_data: Any) -> None:
    model, task = attached(), Distill(beta=0.5)
    batch = batch_of(random_data, 0, 1, 2, 3)
    count = float(task.count(batch))
    with task.holding(Around(model), lambda _: None):  # type: ignore[arg-type]
        whole = float(task.loss(model, dict(batch), count).detach())
        parts = sum(float(task.loss(model, part, count).detach()) for part in task.parts(batch, 1))
    assert parts == pytest.approx(whole, rel=1e-6)


def test_in_a_row_it_is_the_same(random_data: Any) -> None:
    """Neither model sees a pair of tokens of two examples, and neither makes a mask of them."""
    model, task = attached(), Distill(beta=0.5)
    batch = batch_of(random_data, 0, 1, 2, 3)
    count = float(task.count(batch))
    rows = [{**random_data[i], "seq_lengths": [len(random_data[i]["input_ids"])]} for i in range(4)]
    with task.holding(Around(model), lambda _: None):  # type: ignore[arg-type]
        apart = float(task.loss(model, dict(batch), count).detach())
    with task.holding(Around(model, packing=True), lambda _: None):  # type: ignore[arg-type]
        assert is_lent(task._held.config)
        with kept_apart(model, lambda _: None):
            row = float(task.loss(model, PackedCollator(0, 16)(rows), count).detach())
    assert row == pytest.approx(apart, rel=1e-6)


# --- other teachers ------------------------------------------------------------------------------


def test_a_larger_teacher_teaches(random_data: Any) -> None:
    """Three layers of the demo teach two of it; their logits are those of stock transformers."""
    folder = small_model(3)
    model, task = attached("none"), Distill(teacher=str(folder))
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    batch = batch_of(random_data, 0, 1)
    kept = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        both = [m(input_ids=batch["input_ids"]).logits[:, :-1][kept].log_softmax(-1)
                for m in (model, teacher)]  # fmt: skip
    wanted = float(kl_div(*both, log_target=True, reduction="batchmean"))
    with task.holding(Around(model), lambda _: None):  # type: ignore[arg-type]
        found = float(task.loss(model, dict(batch), float(task.count(batch))).detach())
    assert found == pytest.approx(wanted, rel=1e-5)


def test_a_teacher_with_other_tokens_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    folder = tmp_path / "other"
    shutil.copytree(small_model(), folder)
    file = folder / "tokenizer.json"
    words = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = words["model"]["vocab"]
    one, other, *_ = (token for token in vocabulary if token.isalpha())
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    file.write_text(json.dumps(words), encoding="utf-8")
    spec = Spec().data
    with pytest.raises(ModelError, match="tokenizer differs from the model's in 4 entries"):
        Distill(teacher=str(folder)).read(spec, tokenizer, seed=0)


@pytest.mark.parametrize("mixes", [True, False])
def test_a_teacher_has_to_keep_examples_of_a_row_apart(mixes, random_data, tmp_path) -> None:
    rows = AutoConfig.from_pretrained(small_model()).vocab_size
    made: Any = GPT2LMHeadModel(GPT2Config(vocab_size=rows, n_embd=16, n_layer=1, n_head=2))
    if mixes:
        sizes = {"hidden_size": 16, "n_layer": 1, "n_head": 2}
        made = BloomForCausalLM(BloomConfig(vocab_size=rows, **sizes))
    made.save_pretrained(tmp_path / "teacher")
    for file in small_model().glob("*token*.json"):
        shutil.copy(file, tmp_path / "teacher")
    given = {**TRAIN, "objective": {"name": "distill", "teacher": str(tmp_path / "teacher")}}
    model = attached()
    qa.train(model, random_data, **{**given, "max_steps": 1})
    if mixes:
        told = "BloomForCausalLM does not keep the examples of a row apart"
        with pytest.raises(TrainingError, match=told):
            qa.train(model, random_data, packing=True, **given)
    else:
        qa.train(model, random_data, packing=True, **given)


def test_a_teacher_that_is_not_to_be_had_is_told(tokenizer: Any) -> None:
    with pytest.raises(ModelError) as raised:
        Distill(teacher="nobody/nothing").read(DataSpec(), tokenizer, seed=0)
    (problem,) = raised.value.problems
    assert problem.where == "objective.teacher"
    assert problem.what.startswith("the teacher, nobody/nothing: no such folder is here")
    assert "HF_HUB_OFFLINE" in problem.fix  # which the tests set
    assert "name a local folder" in problem.fix
    with pytest.raises(ModelError, match=r"no such folder is here.*\n.*leave HF_HUB_OFFLINE out"):
        read_config("nobody/nothing")


def refusals(**objective: Any) -> str:
    model = objective.pop("model", str(small_model()))
    with pytest.raises(PlanRefused) as raised:
        plan(Spec(model=model, objective={"name": "distill", **objective}, output="nowhere"))
    return str(raised.value)


def with_config(folder: Path, **values: Any) -> str:
    shutil.copytree(small_model(), folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return str(folder)


def test_what_cannot_teach_is_refused_by_the_plan(tmp_path: Path) -> None:
    assert "does not exist" in refusals(teacher="./nowhere")
    assert "objective.teacher" in refusals(teacher="./nowhere")
    assert "less than or equal to 1" in refusals(beta=1.5)
    assert "greater than 0" in refusals(temperature=0)
    assert "a folder or a hub id" in refusals(teacher=" ")
    made = with_config(tmp_path / "a", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "has to be dense" in refusals(teacher=made)
    made = with_config(tmp_path / "b", architectures=["LlamaForSequenceClassification"])
    assert "predict the next token" in refusals(teacher=made)
    made = with_config(tmp_path / "c", is_encoder_decoder=True)
    assert "causal models" in refusals(model=made)


def test_a_base_that_was_never_dense_has_no_teacher(random_data: Any, tokenizer: Any) -> None:
    live = qa.quantize(AutoModelForCausalLM.from_pretrained(small_model()), "hqq")
    model = qa.attach(live, "lora")
    with pytest.raises(TrainingError, match="not quantized"):
        qa.train(model, random_data, objective="distill", tokenizer=tokenizer, **TRAIN)
    named = {"name": "distill", "teacher": str(small_model())}
    result = qa.train(model, random_data, objective=named, tokenizer=tokenizer, **TRAIN)
    assert result.steps == 3


def test_adalora_is_refused() -> None:
    with pytest.raises(PlanRefused, match="AdaLoRA"):
        plan(Spec(objective="distill", adapter="adalora", output="nowhere"))


# --- memory --------------------------------------------------------------------------------------


def test_the_plan_counts_the_teacher(tmp_path: Path) -> None:
    def memory(**objective: Any) -> Any:
        spec = Spec(model=str(small_model()), objective=objective, output=str(tmp_path / "run"))
        made = plan(spec, cards=[1.0]).memory
        assert made is not None
        return made.work

    alone, taught = memory(name="sft"), memory(name="distill")
    setting = alone.settings()[0]
    weights = sum(p.numel() for p in dense().parameters())
    assert taught.teacher_bytes == pytest.approx(2 * weights, rel=1e-3)  # bfloat16 on a card
    more = taught.parts(setting)["dense"] - alone.parts(setting)["dense"]
    assert more == taught.teacher_bytes
    larger = memory(name="distill", teacher=str(small_model(3)))
    assert larger.teacher_bytes > taught.teacher_bytes
    assert passes.DIVERGENCE_CHUNK * 8 >= taught.loss_bytes(64) > 0


# --- the evaluation, and a run -------------------------------------------------------------------


def test_agreement_is_the_divergence_from_the_dense_model(random_data: Any) -> None:
    from quantadapt.evaluation.dense_agreement import AgreementEvaluator
    from quantadapt.protocols import Given

    model, measures = attached(), AgreementEvaluator(max_tokens=200)
    given = Given(random_data)
    found = measures.measure(model, given)
    total, tokens, same = 0.0, 0, 0
    for row in random_data:
        if tokens >= 200:
            break
        ids = torch.tensor([row["input_ids"]])
        kept = torch.tensor(row["completion_mask"])[1:] == 1
        with torch.no_grad():
            log_p, log_q = (m(input_ids=ids).logits[0, :-1][kept].double().log_softmax(-1)
                            for m in (dense(), model.eval()))  # fmt: skip
        total += float((log_p.exp() * (log_p - log_q)).sum())
        same += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        tokens += len(log_p)
    assert abs(found["tokens compared"].value - 200) <= 0
    assert found["kl"].value == pytest.approx(total / tokens, rel=0.1)  # of a few tokens more
    assert found["same first token"].value == pytest.approx(same / tokens, abs=0.1)
    assert not measures.wants("unquantized")
    assert AgreementEvaluator(reference=str(small_model(3))).wants("unquantized")


def test_agreement_says_what_it_does_not_know(random_data: Any) -> None:
    from quantadapt.evaluation.dense_agreement import AgreementEvaluator
    from quantadapt.protocols import Given

    with pytest.raises(ModelError, match="reference: PATH"):
        AgreementEvaluator().measure(dense(), Given(random_data))
    named = AgreementEvaluator(reference=str(small_model()))
    assert named.measure(dense(), Given(random_data))["kl"].value < 1e-9
    wanted = Spec(evaluate={"evaluations": [{"name": "agreement", "reference": "./nowhere"}]})
    with pytest.raises(PlanRefused, match="is no folder"):
        plan(wanted)


@pytest.mark.slow
def test_a_resumed_run_is_the_run_that_was_not_interrupted(tmp_path: Path) -> None:
    data = str(demo.TRAIN_FILE)
    weights = []
    for name, steps in (("whole", [6]), ("twice", [3, 6])):
        for count in steps:
            model = attached()
            qa.train(model, data, objective="distill", output=tmp_path / name, save_steps=3,
                     resume=count != steps[0], **{**TRAIN, "max_steps": count})  # fmt: skip
        weights.append([p.detach() for p in model.parameters() if p.requires_grad])
    for one, other in zip(*weights, strict=True):
        assert one.equal(other)
