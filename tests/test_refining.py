"""A tuned adapter that is trained on for its own rounding; figures are of plain logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from merging import HELD_OUT, gpt2, llama, logits, moved, seq2seq
from torch import Tensor

import quantadapt as qa
from quantadapt.errors import MergeRefused
from quantadapt.exporting import refining
from quantadapt.exporting.merging import merged_model
from quantadapt.exporting.refining import refined_model
from quantadapt.exporting.rounding import WAYS
from quantadapt.exporting.tuned import Tuned
from quantadapt.facade import facades, linear_facades

SHOWN = [
    {"input_ids": torch.randint(5, 2000, (1, 40), generator=torch.Generator().manual_seed(n))}
    for n in range(6)
]
COARSE: dict[str, dict[str, Any]] = {
    "hqq": {"bits": 2, "group_size": 32},
    "bnb-nf4": {},
    "torchao-intx": {"bits": 2, "group_size": 32},
}


@pytest.fixture(autouse=True)
def fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refining, "STEPS", 12)


def kl(found: Tensor, reference: Tensor) -> float:
    p, q = (x.double().log_softmax(-1) for x in (reference, found))
    return float((p.exp() * (p - q)).sum(-1).mean())


@torch.no_grad()
def on_shown(model: Any) -> Tensor:
    return torch.cat([model.eval()(**example).logits[0] for example in SHOWN])


@pytest.mark.parametrize(
    ("backend", "kind", "adapter"),
    [
        ("hqq", "untied", "dora"),
        ("hqq", "gpt2", "lora"),
        pytest.param("hqq", "untied", "lora", marks=pytest.mark.slow),
        pytest.param("bnb-nf4", "tied", "lora", marks=pytest.mark.slow),
        pytest.param("torchao-intx", "untied", "vera", marks=pytest.mark.slow),
    ],
)
def test_it_comes_nearer_and_leaves_the_model_as_it_is(backend, kind, adapter, tmp_path) -> None:
    folder = tmp_path / "base"
    source = gpt2(folder) if kind == "gpt2" else llama(folder, tied=kind == "tied")
    model = moved(qa.attach(qa.quantize(source, backend, **COARSE[backend]), adapter), by=0.02)
    model.train()
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    before = {name: value.clone() for name, value in trained.items()}
    wanted = on_shown(model)
    dithered = WAYS["dithered"].merged(Tuned(model))
    refined = refined_model(model, SHOWN)
    assert kl(on_shown(refined), wanted) < kl(on_shown(dithered), wanted)
    kept, found = (dict(linear_facades(each)) for each in (dithered, refined))
    for name, facade in kept.items():  # the scales are those of the base
        weight = found[name].dequantize()
        nearest = facade.target.grid(facade.vendor).nearest(weight)
        torch.testing.assert_close(nearest, weight, rtol=1e-6, atol=1e-7)
    for name, value in trained.items():
        assert value.requires_grad
        assert torch.equal(value, before[name]), name
    assert torch.equal(on_shown(model), wanted)
    assert not model.quantadapt.merge_aware
    assert not any(facade.keeps_scales for _, facade in facades(model))


@pytest.mark.slow
def test_it_is_the_same_each_time(tmp_path) -> None:
    model = qa.quantize(llama(tmp_path / "base", tied=False), "hqq", bits=2, group_size=32)
    model = moved(qa.attach(model, "lora", lora_dropout=0.5), by=0.02)
    torch.manual_seed(1)
    first = logits(refined_model(model, SHOWN))
    torch.manual_seed(2)
    assert torch.equal(logits(refined_model(model, SHOWN)), first)


def test_of_several_adapters_those_that_are_active_are_trained(tmp_path) -> None:
    model = qa.quantize(llama(tmp_path / "base", tied=False), "hqq", bits=2, group_size=32)
    model = moved(qa.attach(model, "lora", r=4), by=0.02)
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    moved(model, by=0.02)
    wanted = on_shown(model)
    dithered = kl(on_shown(WAYS["dithered"].merged(Tuned(model))), wanted)
    assert kl(on_shown(refined_model(model, SHOWN)), wanted) < 0.97 * dithered


@pytest.mark.slow
def test_a_loaded_adapter_is_refined_and_written(tmp_path) -> None:
    """One that PEFT loads to answer with: none of its parameters is to be trained."""
    model = qa.quantize(llama(tmp_path / "base", tied=False), "hqq", bits=2, group_size=32)
    saved = qa.save(moved(qa.attach(model, "lora", r=4), by=0.02), tmp_path / "run")
    loaded = qa.load(saved)
    loaded.requires_grad_(False)
    given = {"data": HELD_OUT, "calibration": SHOWN, "min_gain": 0, "rounding": "refined"}
    found = qa.merge(loaded, tmp_path / "out", kind="requantize", **given)
    assert found["rounding"] == "refined"
    merged = qa.load(tmp_path / "out" / "merged")
    assert torch.equal(logits(merged), logits(refined_model(loaded, SHOWN)))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_without_what_it_needs_it_is_refused(tmp_path) -> None:
    model = qa.quantize(seq2seq(tmp_path / "t5", "t5"), "hqq", bits=8, group_size=32)
    model = moved(qa.attach(model, "lora"), by=0.02)
    given = {"data": HELD_OUT, "calibration": SHOWN, "rounding": "refined"}
    with pytest.raises(MergeRefused, match="a decoder alone predicts"):
        qa.merge(model, tmp_path / "out", kind="requantize", **given)
    model = qa.quantize(llama(tmp_path / "base", tied=False), "hqq", bits=8, group_size=32)
    model = moved(qa.attach(model, "lora"), by=0.02)
    given.pop("calibration")
    with pytest.raises(MergeRefused, match=r"needs data(.|\n)*--calibration FILE"):
        qa.merge(model, tmp_path / "out", kind="requantize", **given)


def test_without_an_adapter_on_a_quantized_layer_nothing_is_trained(tmp_path) -> None:
    model = qa.quantize(llama(tmp_path / "base", tied=False), "hqq", bits=4, group_size=32)
    model = moved(qa.attach(model, "lora", target_modules=["embed_tokens"]), by=0.02)
    right = merged_model(model, "dense")
    assert kl(on_shown(refined_model(model, SHOWN)), on_shown(right)) < 1e-9
