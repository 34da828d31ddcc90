"""aLoRA, which is off in each row up to a few tokens: answers are PEFT's, and what no pass or file
can hold is refused beforehand."""

from __future__ import annotations

import pytest
import torch
from few_rows import few_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantadapt as qa
from quantadapt import demo
from quantadapt.errors import MergeRefused, PlanRefused
from quantadapt.generation import Sampling, answers
from quantadapt.planning import plan
from quantadapt.spec import Spec

INVOCATION = "def"
PROMPTS = ("Write a function.\n\ndef", "Write a function that adds")
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo.MODEL_DIR)


def invocation(tokenizer) -> list[int]:
    return tokenizer(f"\n{INVOCATION}", add_special_tokens=False)["input_ids"][-1:]


@pytest.fixture(scope="module")
def tuned(tokenizer):
    torch.manual_seed(0)
    model = qa.quantize(demo.MODEL_DIR, "none", device="cpu", dtype="float32")
    return qa.attach(model, "lora", **LORA, alora_invocation_tokens=invocation(tokenizer)).eval()


def stock_answers(tuned, tokenizer, prompts) -> list[list[int]]:
    """Return the likeliest answers of stock PEFT over stock transformers, prompt by prompt."""
    from peft import (
        LoraConfig,
        get_peft_model,
        get_peft_model_state_dict,
        set_peft_model_state_dict,
    )

    base = AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR, dtype=torch.float32)
    config = LoraConfig(
        **LORA, task_type="CAUSAL_LM", alora_invocation_tokens=invocation(tokenizer)
    )
    model = get_peft_model(base, config).eval()
    set_peft_model_state_dict(model, get_peft_model_state_dict(tuned))
    found = []
    for ids in prompts:
        made = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=12, do_sample=False)
        found.append(made[0, len(ids) :].tolist())
    return found


def test_answers_are_those_of_peft(tuned, tokenizer) -> None:
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    expected = stock_answers(tuned, tokenizer, prompts)
    found = answers(tuned, tokenizer, prompts, Sampling(max_new_tokens=12))
    assert [list(answer.ids) for answer in found] == expected
    with tuned.disable_adapter():
        alone = answers(tuned, tokenizer, prompts, Sampling(max_new_tokens=12))
        alone = [list(answer.ids) for answer in alone]
    assert alone[0] != expected[0]  # invoked
    assert alone[1] == expected[1]


def test_layers_that_are_recomputed_learn_the_same(tokenizer) -> None:
    losses = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = qa.quantize(demo.MODEL_DIR, "hqq", device="cpu")
        model = qa.attach(model, "lora", r=4, alora_invocation_tokens=invocation(tokenizer))
        found = qa.train(
            *(model, few_rows()),
            max_steps=3,
            learning_rate=1e-2,
            gradient_checkpointing=recompute,
            logging_steps=1,
            verbose=False,
        )
        losses.append([loss for _, loss in found.losses])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert losses[0][2] < losses[0][0] - 0.01


ALORA = {"name": "lora", "alora_invocation_tokens": [5, 6]}


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"train": {"packing": True}}, "alora-packing"),
        ({"objective": "classify"}, "alora-causal"),
        ({"objective": "reward"}, "alora-causal"),
        ({"objective": "embed"}, "alora-causal"),
        ({"export": {"merge": "dense"}}, "alora-no-merge"),
    ],
)
def test_what_an_invocation_does_not_go_with(values, rule) -> None:
    with pytest.raises(PlanRefused) as caught:
        plan(Spec(adapter=ALORA, **{"export": {"merge": "never"}, **values}))
    assert rule in [problem.rule for problem in caught.value.problems]


def test_an_adapter_that_waits_is_not_merged(tuned, tmp_path) -> None:
    assert plan(Spec(adapter=ALORA)).merge == "never"
    with pytest.raises(MergeRefused, match="no weight holds it"):
        qa.merge(tuned, tmp_path / "merged")
