"""Data may hold tokens that the model has no embedding for."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

import quantadapt as qa
from quantadapt.errors import DataError, ModelError
from quantadapt.quantizing.tokenizer import load_tokenizer
from quantadapt.testing.small_demo import small_model


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A model whose tokenizer got two tokens more."""
    folder = tmp_path / "model"
    shutil.copytree(small_model(), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<obs>", "</obs>"])
    tokenizer.save_pretrained(folder)
    rows = [{"prompt": "say it", "completion": text} for text in ["<obs> 1 </obs>", "two"] * 8]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    return folder


def test_a_run_says_so_before_a_weight_is_loaded(checkpoint, tmp_path) -> None:
    data = {"path": str(tmp_path / "data.jsonl")}
    spec = qa.Spec(model=str(checkpoint), backend="none", data=data, output=str(tmp_path / "o"))
    size = len(AutoTokenizer.from_pretrained(checkpoint))
    with pytest.raises(DataError, match=f"the tokenizer has {size} tokens") as caught:
        qa.run(spec)
    assert "'<obs>'" in str(caught.value)
    assert f"resize_token_embeddings({size})" in str(caught.value)
    assert not (tmp_path / "o").exists()


def test_so_does_training_in_python(checkpoint, tmp_path) -> None:
    tuned = qa.attach(qa.quantize(str(checkpoint), "none"), "lora", r=2)
    with pytest.raises(DataError, match="of 15 examples hold tokens"):
        qa.train(tuned, str(tmp_path / "data.jsonl"), max_steps=1)


def test_ids_of_another_tokenizer_are_told() -> None:
    data = Dataset.from_dict({"input_ids": [[1, 2], [3, 99999]], "completion_mask": [[1, 1]] * 2})
    tuned = qa.attach(qa.quantize(str(small_model()), "none"), "lora", r=2)
    with pytest.raises(DataError, match="1 of 2 examples hold tokens"):
        qa.train(tuned, data, max_steps=1)
    qa.train(tuned, data.select([0]), max_steps=1, per_device_train_batch_size=1)


def configured(folder: Path, **values: object) -> str:
    """Change the config of the tokenizer of a small model."""
    shutil.copytree(small_model(), folder, dirs_exist_ok=True)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return str(folder)


def test_a_pad_token_without_an_embedding_is_not_padded_with(tmp_path) -> None:
    model = qa.quantize(configured(tmp_path, pad_token="<never seen>"), "none")
    data = Dataset.from_dict({"input_ids": [[1, 2], [3]], "completion_mask": [[1, 1], [1]]})
    tuned = qa.attach(model, "lora", r=2)
    assert math.isfinite(qa.train(tuned, data, max_steps=1).losses[-1][1])
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_a_longest_length_that_is_text_is_told(tmp_path) -> None:
    with pytest.raises(ModelError, match='model_max_length of its tokenizer is "long"'):
        load_tokenizer(configured(tmp_path, model_max_length="long"))
