"""What is trained on top of what was trained before: it goes on as in stock PEFT, and what is saved
of it is the model that was there."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from merging import ADAPTERS, HELD_OUT, llama, logits, moved, relative, stock, stock_adapter, tuned
from peft import AdaLoraConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from transformers import AutoTokenizer

import quantadapt as qa
from quantadapt import demo
from quantadapt.errors import MergeRefused, ModelError
from quantadapt.exporting.beside import add_adapter
from quantadapt.exporting.same_base import UnknownBaseWarning
from quantadapt.quantizing.state import state_of

LENGTHS, PROMPT = (12, 9, 15, 7), 3


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return llama(tmp_path_factory.mktemp("base"), tied=False)


def rows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(5, 2000, (length,), generator=generator).tolist() for length in LENGTHS]


def trained(model: Any) -> Any:
    """Train for four steps, each on all rows."""
    masks = [[0] * PROMPT + [1] * (length - PROMPT) for length in LENGTHS]
    data = Dataset.from_dict({"input_ids": rows(), "completion_mask": masks})
    steps = {"max_steps": 4, "per_device_train_batch_size": len(LENGTHS), "learning_rate": 1e-2}
    qa.train(model, data, lr_scheduler_type="constant", warmup_ratio=0.0, **steps)
    return model


def trained_by_hand(model: Any) -> Any:
    weights = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0)
    for _ in range(4):
        total = torch.zeros(())
        for row in rows():
            ids = torch.tensor([row])
            words = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            total = total - words.gather(1, ids[0, 1:, None])[PROMPT - 1 :].sum()
        (total / sum(length - PROMPT for length in LENGTHS)).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


def by_peft(base: str, folder: Path) -> Any:
    """A saved adapter on its base, by PEFT and transformers alone, to train on."""
    return PeftModel.from_pretrained(stock(base), str(folder), is_trainable=True)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
        {"target_modules": ["q_proj"], "rank_pattern": {"0.self_attn.q_proj": 2}},
        ADAPTERS["whole-both"],
        ADAPTERS["tokens-and-head"],
        ADAPTERS["biases"],
    ],
)
def test_a_saved_adapter_learns_on_as_in_stock_peft(options, base: str, tmp_path: Path) -> None:
    saved = qa.save(tuned(base, r=4, lora_dropout=0.0, **options), tmp_path / "first")
    expected = logits(trained_by_hand(by_peft(base, saved)))
    model = trained(qa.load(saved))
    assert relative(logits(model), expected) < 1e-5
    again = qa.save(model, tmp_path / "second")
    assert relative(logits(stock_adapter(base, again)), expected) < 1e-5
    qa.merge(model, tmp_path / "second", data=HELD_OUT)
    assert relative(logits(stock(tmp_path / "second" / "merged")), expected) < 1e-5


# What PEFT itself put onto a base -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "lora"),
        (LoraConfig(r=4, target_modules=".*q_proj", use_dora=True, lora_alpha=3), "dora"),
        (LoraConfig(r=4, target_modules=["q_proj"], use_rslora=True, bias="all"), "rslora"),
        (LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"), "pissa"),
    ],
)
def test_an_adapter_by_peft_is_one_like_any_other(config, name, base, tmp_path: Path) -> None:
    """Its save wrote a folder that nothing could load, and its merge said that there was none."""
    torch.manual_seed(0)
    first = moved(get_peft_model(stock(base), config), by=0.05)
    first.save_pretrained(tmp_path / "theirs")
    expected = logits(trained_by_hand(by_peft(base, tmp_path / "theirs")))

    onto = qa.quantize(base, "none")
    model = PeftModel.from_pretrained(onto, str(tmp_path / "theirs"), is_trainable=True)
    saved = qa.save(trained(model), tmp_path)
    assert model.quantadapt.adapter.name == name
    assert relative(logits(model), expected) < 1e-5
    assert relative(logits(qa.load(saved)), expected) < 1e-5
    qa.merge(model, tmp_path, data=HELD_OUT)
    assert relative(logits(stock(tmp_path / "merged")), expected) < 1e-5


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["q_proj"]),
        LoraConfig(target_modules=["q_proj", "embed_tokens"], use_rslora=True),
        AdaLoraConfig(target_modules=["q_proj"], total_step=10),
        VeraConfig(target_modules=["q_proj"]),
    ],
)
def test_an_adapter_that_peft_has_just_made_has_learnt_nothing(config, base: str) -> None:
    """Rewards with beta told that it had, and to merge it."""
    new, known = (get_peft_model(qa.quantize(base, "none"), config) for _ in range(2))
    assert not state_of(new).learnt
    assert state_of(moved(known)).learnt


def test_an_adapter_of_a_live_module_says_that_it_wants_its_base(base: str, tmp_path) -> None:
    """It was called an empty path."""
    saved = qa.save(moved(qa.attach(qa.quantize(stock(base), "none"), r=2)), tmp_path)
    with pytest.raises(ModelError, match=r"(?s)base was a module in memory.*base=\.\.\."):
        qa.load(saved)


# What an adapter leaves behind --------------------------------------------------------------------

LEFT = {
    "merged": ({}, "merge_and_unload"),
    "biases": ({"bias": "all"}, "unload"),
    "start": ({"init_lora_weights": "pissa"}, "unload"),
}


@pytest.mark.parametrize("backend", ["none", "hqq"])
@pytest.mark.parametrize("case", LEFT)
def test_a_base_that_an_adapter_changed_is_saved_with_the_next(
    case: str, backend: str, base: str, tmp_path: Path
) -> None:
    """The next adapter named the checkpoint as its base: loaded, what the first had learnt was
    gone without a word."""
    options, method = LEFT[case]
    first = tuned(base, backend, r=4, **options)
    model = moved(qa.attach(getattr(first, method)(), "lora", r=2))
    expected = logits(model)
    saved = qa.save(model, tmp_path)
    assert relative(logits(qa.load(saved)), expected) < 1e-6
    again = qa.save(qa.load(saved), tmp_path / "again")
    assert relative(logits(qa.load(again)), expected) < 1e-6
    with pytest.raises(MergeRefused, match="lacks what that has learnt"):
        qa.merge_onto(saved, base, tmp_path / "onto", check=False)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        qa.load(saved, base=base)
    (told,) = [w.message for w in heard if "base" in str(w.message)]
    assert isinstance(told, UnknownBaseWarning)
    assert "another adapter had changed that one" in str(told)


def test_merged_into_its_base_it_is_a_model_without_adapter(base: str, tmp_path: Path) -> None:
    """It ended in "'method' object is not iterable"."""
    for method in ("unload", "merge_and_unload"):
        model = getattr(tuned(base, "hqq", r=4), method)()
        expected = logits(model)
        saved = qa.save(model, tmp_path / method)
        assert not (saved / "adapter_config.json").exists()
        assert relative(logits(qa.load(saved)), expected) < 1e-6
        with pytest.raises(MergeRefused, match="there is no adapter to merge"):
            qa.merge(model, tmp_path / method)


@pytest.mark.parametrize("loaded", [False, True])
def test_a_base_that_is_alone_again_has_learnt_nothing(loaded: bool, base: str, tmp_path) -> None:
    """It was measured with the pooling and the longest example of the adapter that was gone."""
    rows = [{"anchor": f"word {i}", "positive": f"words {i + 1}"} for i in range(8)]
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    objective = {"name": "embed", "pooling": "lasttoken"}
    own = qa.quantize(base, "none")
    own_figures = qa.evaluate(own, file, evaluation="retrieval", tokenizer=tokenizer)
    model = qa.attach(own, r=2)
    qa.train(model, file, objective=objective, tokenizer=tokenizer, max_steps=1, max_length=20)
    if loaded:
        model = qa.load(qa.save(model, tmp_path / "saved"))
    assert (state_of(model).max_length, state_of(model).pooling) == (20, "lasttoken")
    alone = model.unload()
    assert (state_of(alone).max_length, state_of(alone).pooling) == (None, "")
    assert qa.evaluate(alone, file, evaluation="retrieval", tokenizer=tokenizer) == own_figures


def test_what_has_lost_its_adapter_unseen_is_not_saved(base: str, tmp_path: Path) -> None:
    """It ended in "'method' object is not iterable", or in `KeyError: 'default'`."""
    model = tuned(base, "none", r=4)
    for call in (qa.save, qa.merge):
        with pytest.raises(ModelError, match="get_base_model"):
            call(model.get_base_model(), tmp_path)
    model.delete_adapter("default")
    with pytest.raises(ModelError, match="it was deleted"):
        qa.save(model, tmp_path)
    own = qa.quantize(base, "none")
    assert relative(logits(qa.load(qa.save(model.unload(), tmp_path / "base"))), logits(own)) < 1e-6


def test_an_adapter_of_the_base_as_it_was_is_refused(base: str, tmp_path: Path) -> None:
    saved = qa.save(tuned(base, "hqq", r=4), tmp_path)
    changed = tuned(base, "hqq", r=4).merge_and_unload()
    with pytest.raises(ModelError, match="another adapter has changed it for good"):
        qa.load(saved, base=changed)
    with pytest.raises(ModelError, match="has changed the base of one of both for good"):
        add_adapter(qa.attach(changed, r=2), saved, "other")


def test_taken_off_untouched_it_is_the_checkpoint_again(base: str, tmp_path: Path) -> None:
    model = moved(qa.attach(tuned(base, "hqq", "dora", r=4).unload(), "lora", r=2))
    expected = logits(model)
    saved = qa.save(model, tmp_path)
    assert not (tmp_path / "base").exists()
    assert relative(logits(qa.load(saved)), expected) < 1e-6
