"""VBLoRA that saves its largest weights alone: the run goes on from its checkpoints, the adapter is
stock PEFT's, and training on that is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from merging import logits, moved
from safetensors.torch import load_file

import quantadapt as qa
from quantadapt.adapting.vblora import refuse_cut_short
from quantadapt.errors import PlanRefused, TrainingError
from quantadapt.exporting.merging import merged_model
from quantadapt.planning import plan
from quantadapt.spec import Spec
from quantadapt.testing.small_demo import small_model

torch.set_num_threads(1)
OPTIONS = {"vector_length": 16, "num_vectors": 8, "topk": 2, "save_only_topk_weights": True}


def model() -> Any:
    torch.manual_seed(0)
    base = qa.quantize(str(small_model()), "none", device="cpu", dtype="float32")
    return qa.attach(base, "vblora", **OPTIONS)


def train(tuned: Any, output: Path | None = None, **options: Any) -> Any:
    from transformers import AutoTokenizer

    ids = [[token + n for token in range(5, 25)] for n in range(6)]
    rows = Dataset.from_dict({"input_ids": ids, "completion_mask": [[1] * 20] * 6})
    given = {"max_steps": 4, "logging_steps": 1, "learning_rate": 0.01, **options}
    return qa.train(
        tuned, rows, output=output, tokenizer=AutoTokenizer.from_pretrained(small_model()), **given
    )


def weights(tuned: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in tuned.named_parameters() if p.requires_grad}


def test_a_run_is_resumed_to_the_bit(tmp_path) -> None:
    whole = model()
    losses = train(whole, tmp_path / "whole").losses
    train(model(), tmp_path / "cut", max_steps=2, save_steps=2)
    again = model()
    result = train(again, tmp_path / "cut", resume=True)
    assert result.resumed_from == 2
    assert [loss for _, loss in result.losses] == [loss for _, loss in losses]
    for name, weight in weights(whole).items():
        assert torch.equal(weights(again)[name], weight), name
    assert again.peft_config["default"].save_only_topk_weights is True


def test_what_is_saved_is_stock_pefts_and_merges(tmp_path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tuned = moved(model())
    wanted = logits(tuned)
    qa.save(tuned, tmp_path)
    tuned.save_pretrained(tmp_path / "stock")
    ours, stock = (
        load_file(tmp_path / place / "adapter_model.safetensors") for place in ("adapter", "stock")
    )
    assert ours.keys() == stock.keys()
    assert all(torch.equal(ours[key], stock[key]) for key in stock)
    assert any("topk_indices" in key for key in ours)
    dense = AutoModelForCausalLM.from_pretrained(small_model(), dtype="float32")
    by_peft = PeftModel.from_pretrained(dense, tmp_path / "adapter").eval().merge_and_unload()
    found = logits(merged_model(qa.load(tmp_path, device="cpu"), "dense"))
    for made in (logits(by_peft), found):
        assert float((made - wanted).norm() / wanted.norm()) < 1e-6


def test_training_on_what_is_cut_short_is_refused(tmp_path) -> None:
    qa.save(moved(model()), tmp_path / "saved")
    with pytest.raises(PlanRefused, match="holds the top-k weights of VBLoRA alone"):
        train(qa.load(tmp_path / "saved", device="cpu"))


def test_a_checkpoint_holds_all_and_one_that_does_not_is_refused(tmp_path) -> None:
    train(model(), tmp_path, max_steps=2, save_steps=2)
    checkpoint = tmp_path / "checkpoints" / "checkpoint-2"
    config = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["save_only_topk_weights"] is False
    refuse_cut_short(model(), checkpoint)
    moved(model()).save_pretrained(tmp_path / "by-peft")  # as earlier versions wrote them
    with pytest.raises(TrainingError, match="the checkpoint holds the top-k weights"):
        refuse_cut_short(model(), tmp_path / "by-peft")


def test_the_plan_says_what_becomes_of_the_adapter(tmp_path) -> None:
    spec = Spec(
        model=str(small_model()),
        adapter={"name": "vblora", **OPTIONS},
        output=str(tmp_path / "run"),
    )
    assert any("not trained further" in note for note in plan(spec).notes)
