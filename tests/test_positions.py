"""Examples that are longer than a model has positions for are refused; as long ones are learnt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import AutoTokenizer

import quantadapt as qa
from quantadapt import demo
from quantadapt.data.positions import made_for, positions_of
from quantadapt.errors import DataError

VOCABULARY = 2048
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 32, "vocab_size": VOCABULARY}
POSITIONS = {"max_position_embeddings": 24}
MADE: dict[str, tuple[str, Mapping[str, Any]]] = {
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 24}),
    "gpt_neo": (
        "GPTNeo",
        {**POSITIONS, "hidden_size": 32, "num_layers": 1, "num_heads": 2}
        | {"attention_types": [[["global"], 1]]},
    ),
    "gpt_bigcode": ("GPTBigCode", {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 24}),
    "gptj": ("GPTJ", {"n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 8, "n_positions": 24}),
    "opt": ("OPT", {**SMALL, **POSITIONS, "ffn_dim": 32, "word_embed_proj_dim": 32}),
    "biogpt": ("BioGpt", {**SMALL, **POSITIONS}),
    "bert": ("Bert", {**SMALL, **POSITIONS, "is_decoder": True}),
    "electra": ("Electra", {**SMALL, **POSITIONS, "embedding_size": 32, "is_decoder": True}),
    "roberta": ("Roberta", {**SMALL, **POSITIONS, "pad_token_id": 1, "is_decoder": True}),
    "llama": ("Llama", {**SMALL, **POSITIONS}),
}


def of(kind: str) -> Any:
    name, values = MADE[kind]
    config = getattr(transformers, f"{name}Config")(**{"vocab_size": VOCABULARY, **values})
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", MADE)
def test_there_are_as_many_positions_as_the_model_really_takes(kind: str) -> None:
    model = of(kind).eval()
    count = positions_of(model.config.to_dict())
    assert made_for(model.config.to_dict()) == (count or 24)  # what a plan says
    assert count == {"llama": None, "roberta": 22}.get(kind, 24)
    ids = torch.arange(2, 2 + (count or 24))[None]
    assert model(input_ids=ids).logits.shape[:2] == ids.shape
    longer = torch.cat([ids, ids[:, :1]], dim=1)
    if count is None:
        assert model(input_ids=longer).logits.shape[:2] == longer.shape
    else:
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=longer)


def data(*lengths: int) -> Dataset:
    rows = [[2 + i % 50 for i in range(n)] for n in lengths]
    return Dataset.from_dict({"input_ids": rows, "completion_mask": [[1] * n for n in lengths]})


def trained(dataset: Dataset, **options: Any) -> Any:
    model = qa.attach(qa.quantize(of("gpt2"), "none", device="cpu"), "lora", r=2)
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    given = {"per_device_train_batch_size": 1, "num_train_epochs": 1, **options}
    return qa.train(model, dataset, tokenizer=tokenizer, **given)


@pytest.mark.parametrize("packing", [None, 64])
def test_what_is_too_long_is_told_before_a_step(packing: int | None) -> None:
    with pytest.raises(DataError, match=r"2 of 3 .* up to 30 tokens, and there are 24 positions"):
        trained(data(20, 30, 25), packing=packing)
    with pytest.raises(DataError, match=r"set data\.max_length: 24"):
        trained(data(20, 24), eval_data=data(25), eval_steps=1)
    # The positions of a packed row begin anew with each example.
    assert trained(data(20, 24, 24), packing=packing).tokens == 68


def test_what_rotary_positions_go_on_for_is_told(tmp_path) -> None:
    """A run learns it, and says that the model has not been made for it."""
    of("llama").save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(demo.MODEL_DIR).save_pretrained(tmp_path / "model")
    (tmp_path / "a.txt").write_text("x = 1\n" * 20 + "\n" + "y = 2\n" * 3 + "\nz = 3\n")
    notes: list[str] = []
    for length, told in ((64, True), (24, False)):
        spec = qa.Spec(
            model=str(tmp_path / "model"), backend="none", output=str(tmp_path / "run"),
            data={"path": str(tmp_path / "a.txt"), "max_length": length}, overwrite=True,
            train={"max_steps": 1}, evaluate={"evaluations": []}, export={"merge": "never"},
            adapter={"name": "lora", "r": 2}, seed=1,
        )  # fmt: skip
        notes.clear()
        qa.run(spec, listener=lambda event, data: notes.append(str(data.get("text", ""))))
        found = [text for text in notes if "than the model has been made for" in text]
        assert bool(found) is told, notes
        assert not told or "there are 24 positions" in found[0]
