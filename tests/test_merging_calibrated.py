"""Merging into what a calibrating backend made: layer by layer, on the scales that are there, and
without data. Stock transformers reads what is written."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import quantadapt as qa
from quantadapt.evaluation.held_out import held_out_data
from quantadapt.testing.small_demo import calibration_examples, demo_tokens, small_model

ADAPTED = ("q_proj", "down_proj")
CASES: list[tuple[str, dict[str, Any]]] = [
    ("gptq", {"bits": 4, "group_size": 32, "sym": False, "desc_act": True}),
    ("awq", {"group_size": 32}),
]
MORE: list[tuple[str, dict[str, Any]]] = [
    ("gptq", {"bits": 3, "group_size": -1}),
    ("autoround", {"group_size": 32, "iters": 1}),
    ("autoround", {"bits": 2, "group_size": 64, "sym": False, "iters": 1}),
]


@pytest.fixture(
    scope="module",
    params=[*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)],
    ids=str,
)
def base(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A checkpoint that is quantized already: whoever made it, and on which data, is not known."""
    backend, options = request.param
    folder = tmp_path_factory.mktemp(backend) / "base"
    given = {"dtype": "float32", "calibration": calibration_examples(), **options}
    qa.save(qa.quantize(str(small_model(1)), backend, **given), folder)
    return backend, folder


@pytest.fixture(scope="module")
def tuned(base: tuple[str, Path]) -> Any:
    model = qa.attach(
        qa.quantize(str(base[1]), base[0], dtype="float32"), "lora", target_modules=list(ADAPTED)
    )
    qa.train(model, max_steps=8, learning_rate=4e-3, per_device_train_batch_size=4, verbose=False)
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=demo_tokens(16)).logits.float()
    return found


def apart(found: Tensor, wanted: Tensor) -> float:
    """Return the KL in nats per token."""
    p, q = wanted.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def loss(model: Any) -> float:
    """Return the mean loss in nats of each token but the first."""
    found, ids = logits(model)[:, :-1], demo_tokens(16)[:, 1:]
    return float(torch.nn.functional.cross_entropy(found.flatten(0, 1), ids.flatten()))


@pytest.fixture(scope="module")
def merged(base: Any, tuned: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged")
    data = held_out_data(None, tuned.quantadapt.tokenizer).select(range(12))
    wanted = logits(tuned)
    qa.merge(tuned, folder, kind="requantize", data=data, min_gain=0, rounding="dithered")
    assert torch.equal(logits(tuned), wanted), "the model that is merged has changed"
    return folder / "merged"


def test_what_the_adapter_does_not_touch_keeps_its_bytes(base: Any, merged: Path) -> None:
    """And so do scales and zero points, everywhere: only codes of adapted layers are others."""
    before, after = load_file(base[1] / "model.safetensors"), files(merged)
    assert before.keys() == after.keys()
    changed = {name for name in before if not same_bytes(before[name], after[name])}
    layers = {"self_attn.q_proj", "mlp.down_proj"}
    assert changed == {f"model.layers.0.{layer}.qweight" for layer in layers}


def files(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def same_bytes(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def test_stock_transformers_reads_what_is_written(base: Any, tuned: Any, merged: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    ours = qa.load(merged)
    assert apart(logits(plain), logits(ours)) < 1e-4  # kernels compute in 16 bits
    with tuned.disable_adapter():
        of_base = loss(tuned)
    assert of_base - loss(plain) > 0.7 * (of_base - loss(tuned)) > 0.1


def test_merged_again_it_is_a_base_like_any_other(base: Any, merged: Path, tmp_path: Path) -> None:
    """An untrained adapter on it changes nothing, whatever the way of rounding."""
    model = qa.attach(qa.quantize(str(merged), base[0], dtype="float32"), "lora", r=2)
    data = held_out_data(None, model.quantadapt.tokenizer).select(range(4))
    qa.merge(model, tmp_path, kind="requantize", data=data, rounding="grid")
    before, after = files(merged), files(tmp_path / "merged")
    assert all(same_bytes(before[name], after[name]) for name in before.keys() | after.keys())
