"""A checkpoint is loaded as what its config names: classifiers, encoders, and their heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from merging import moved

import quantadapt as qa
from quantadapt.exporting.merging import merged_model
from quantadapt.facade import facades

torch.set_num_threads(1)
IDS = torch.arange(40).reshape(2, 20) + 3
SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
LLAMA = transformers.LlamaConfig(**SIZES, num_hidden_layers=1, num_labels=3, pad_token_id=0)
NO_DROPOUT = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
BERT = transformers.BertConfig(**SIZES, **NO_DROPOUT, num_hidden_layers=1, num_labels=3)
ROBERTA = transformers.RobertaConfig(
    **SIZES, **NO_DROPOUT, num_hidden_layers=1, num_labels=3, pad_token_id=0
)

KINDS: dict[str, tuple[Any, int, str | None, str]] = {
    "LlamaForSequenceClassification": (LLAMA, 7, "SEQ_CLS", "score"),
    "LlamaForTokenClassification": (LLAMA, 7, "TOKEN_CLS", "score"),
    "LlamaForQuestionAnswering": (LLAMA, 7, "QUESTION_ANS", "qa_outputs"),
    "BertForSequenceClassification": (BERT, 7, "SEQ_CLS", "classifier"),
    "BertForTokenClassification": (BERT, 6, "TOKEN_CLS", "classifier"),
    "BertForMaskedLM": (BERT, 6, None, "cls"),
    "BertModel": (BERT, 7, None, ""),
    "RobertaForSequenceClassification": (ROBERTA, 6, "SEQ_CLS", "classifier"),
}
"""Class -> its config, how many layers are quantized, PEFT's task, the module of the head."""


def made(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    model = getattr(transformers, name)(KINDS[name][0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    return folder


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model.eval()(input_ids=IDS)
    return next(v for k, v in found.items() if k in ("logits", "start_logits", "last_hidden_state"))


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("backend", ["none", "hqq", "bnb-nf4"])
def test_it_is_loaded_adapted_saved_and_merged_as_what_it_is(name, backend, tmp_path) -> None:
    _, count, task, head = KINDS[name]
    stock = getattr(transformers, name)
    source = made(name, tmp_path / "source")
    options = {"bits": 8, "group_size": 32} if backend == "hqq" else {}
    model = qa.quantize(str(source), backend, device="cpu", dtype="float32", **options)
    names = [found for found, _ in facades(model)]
    assert type(model) is stock
    assert len(names) == count
    assert not any(head and found.startswith(head) for found in names)
    limit = {"none": 1e-6, "hqq": 0.05, "bnb-nf4": 0.5}[backend]
    assert error(outputs(model), outputs(stock.from_pretrained(source))) < limit

    loaded = qa.load(qa.save(model, tmp_path / "base"), device="cpu")
    assert [found for found, _ in facades(loaded)] == names
    assert torch.equal(outputs(loaded), outputs(model))

    tuned = moved(qa.attach(model, "lora", r=4))
    assert tuned.peft_config["default"].task_type == task
    heads = [n for n, p in tuned.named_parameters() if p.requires_grad and "lora_" not in n]
    assert bool(heads) == (task is not None)  # PEFT trains the head of a classifier, too
    qa.save(tuned, tmp_path / "tuned")
    assert torch.equal(outputs(qa.load(tmp_path / "tuned", device="cpu")), outputs(tuned))

    merged_model(tuned, "dense").save_pretrained(tmp_path / "merged")
    plain, info = stock.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())
    assert error(outputs(plain), outputs(tuned)) < 1e-5


def test_training_a_classifier_is_that_of_peft(tmp_path) -> None:
    from peft import PeftModel

    name = "BertForSequenceClassification"
    source = made(name, tmp_path / "source")
    tuned = moved(qa.attach(qa.quantize(str(source), "none", device="cpu"), "lora", r=4))
    qa.save(tuned, tmp_path / "tuned")
    dense = getattr(transformers, name).from_pretrained(source)
    expected = PeftModel.from_pretrained(dense, tmp_path / "tuned" / "adapter", is_trainable=True)
    labels = torch.tensor([0, 2])
    for model in (tuned, expected):
        model.train()(input_ids=IDS, labels=labels).loss.backward()
    gradients = {n: p.grad for n, p in expected.named_parameters() if p.grad is not None}
    for found, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            assert error(parameter.grad, gradients[found]) < 1e-4, found


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "BertModel", "BertForMaskedLM"])
def test_a_run_that_learns_tokens_is_refused_for_other_models(name, tmp_path) -> None:
    from quantadapt.errors import PlanRefused
    from quantadapt.planning import plan
    from quantadapt.spec import Spec

    source = str(made(name, tmp_path / "source"))
    message = f"learns to predict tokens, and the model is a {name}"
    with pytest.raises(PlanRefused, match=message):
        plan(Spec(model=source, output=str(tmp_path / "run"), device="cpu"))
    assert plan(Spec(model=source), check_output=False).model == source


@pytest.mark.parametrize(
    "name", ["LlamaForSequenceClassification", "BertForTokenClassification", "BertForMaskedLM"]
)
def test_train_is_refused_before_any_work(name, tmp_path) -> None:
    """No data is read, and no weight is changed."""
    from quantadapt.errors import PlanRefused

    model = qa.attach(qa.quantize(made(name, tmp_path / "source"), "none", device="cpu"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(PlanRefused, match=f"learns to predict tokens, and the model is a {name}"):
        qa.train(model, tmp_path / "missing.jsonl", max_steps=1)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_class_of_ones_own_may_have_any_name(tmp_path) -> None:
    from datasets import Dataset

    class BertModel(transformers.LlamaForCausalLM):
        pass

    model = qa.attach(
        qa.quantize(BertModel(LLAMA), "none", device="cpu"), target_modules=["q_proj"]
    )
    rows = {"input_ids": [IDS[0].tolist()] * 2, "completion_mask": [[1] * 20] * 2}
    result = qa.train(model, Dataset.from_dict(rows), max_steps=1, tokenizer=demo_tokenizer())
    assert result.steps == 1


def demo_tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(qa.demo.MODEL_DIR)
