"""Training experts through the quantizer: what was trained is what is merged, read from disk.

Gradients are compared with autograd's in float64, on the dense model of transformers that has the
merged weights.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from merging import moved, relative, saved_model
from test_experts import KINDS, made
from torch import Tensor, nn
from torch.func import functional_call

import quantadapt as qa
from quantadapt.adapting.merge_aware import make_merge_aware
from quantadapt.errors import PlanRefused
from quantadapt.exporting.merging import merged_model
from quantadapt.facade import densify, stack_facades

IDS = torch.arange(24).reshape(2, 12) * 5 % 128
DATA = Dataset.from_dict({"input_ids": IDS.tolist(), "completion_mask": [[1] * 12] * 2})
BACKENDS: dict[str, dict[str, Any]] = {
    "hqq": {"bits": 4, "group_size": 32},
    "bnb-nf4": {},
    "mxfp4": {},
    "torchao-int8": {},
    "quanto": {"weights": "int4"},
}
ON_EXPERTS = ["gate_up_proj", "down_proj"]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def kl(found: Tensor, reference: Tensor) -> float:
    p, q = (x.double().log_softmax(-1) for x in (reference, found))
    return float((p.exp() * (p - q)).sum(-1).mean())


def aware(kind: str, backend: str, adapter: str = "lora", **options: Any) -> tuple[Any, Tensor]:
    """A model with an adapter that has moved by a part of a step, and computes as it is merged; and
    what it said before it did."""
    base = qa.quantize(made(kind), backend, device="cpu", dtype="float32", **BACKENDS[backend])
    model = moved(qa.attach(base, adapter, r=2, **options), by=0.02)
    before = logits(model)
    make_merge_aware(model)
    return model.eval(), before


@pytest.mark.parametrize(
    ("kind", "backend", "adapter"),
    [
        ("mixtral", "hqq", "lora"),
        ("gpt-oss", "hqq", "lora"),
        ("gpt-oss", "hqq", "dora"),
        ("mixtral", "bnb-nf4", "lora"),
        ("mixtral", "bnb-nf4", "dora"),
        ("gpt-oss", "mxfp4", "lora"),
        ("qwen3-moe", "torchao-int8", "lora"),
        ("qwen3-moe", "quanto", "lora"),
    ],
)
def test_merged_files_are_the_trained_model(
    kind: str, backend: str, adapter: str, tmp_path: Path
) -> None:
    model, unrounded = aware(kind, backend, adapter)
    trained = logits(model)
    assert kl(trained, unrounded) > 1e-6  # rounding is there to be seen
    qa.merge(model, tmp_path, kind="requantize", data=DATA, min_gain=0)
    assert kl(logits(qa.load(tmp_path / "merged")), trained) < 1e-9


@pytest.mark.parametrize("kind", list(KINDS))
def test_of_all_kinds_the_merged_model_is_the_trained_one(kind: str) -> None:
    model, unrounded = aware(kind, "hqq")
    trained = logits(model)
    assert relative(trained, unrounded) > 1e-4
    assert relative(logits(merged_model(model, "requantize")), trained) < 1e-5


def test_several_adapters_are_rounded_in_one() -> None:
    model, _ = aware("mixtral", "hqq", target_modules=ON_EXPERTS)
    config = copy.deepcopy(model.peft_config["default"])
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    trained = logits(moved(model, by=0.02))
    assert relative(logits(merged_model(model, "requantize")), trained) < 1e-5
    with model.disable_adapter():
        bare = logits(model)
    torch.testing.assert_close(logits(model.unload()), bare, rtol=0, atol=0)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in found.values())
    return found  # type: ignore[return-value]


def in_float64(model: Any) -> dict[str, Tensor]:
    """Gradients of adapters on experts: the weight is the merged one, and moves as W + dW does."""
    dense = densify(merged_model(model, "requantize")).double()
    dense.set_experts_implementation("eager")
    found = stack_facades(model.get_base_model())
    bases = {name.replace(".base_layer", ""): stack for name, stack in found}
    scaling = model.peft_config["default"].lora_alpha / model.peft_config["default"].r
    leaves, weights = {}, {}
    for name, wrapper in model.named_modules():
        if not hasattr(wrapper, "parameter_name"):
            continue
        own = {n: p for n, p in wrapper.named_parameters() if not n.startswith("base_layer")}
        parts = {n: p.detach().double().requires_grad_() for n, p in own.items()}
        leaves |= {f"{name}.{n}": part for n, part in parts.items()}
        a, b = parts["lora_A.default.weight"], parts["lora_B.default.weight"]
        place = f"{name}.{wrapper.parameter_name}".removeprefix("base_model.model.")
        place = place.replace(".base_layer", "")
        weight = bases[place].by_expert().double()
        by_expert = (b.view(len(b), -1, len(weight)), a.view(len(weight), -1, a.shape[1]))
        change = torch.einsum("ore,eri->eoi", *by_expert) * scaling
        if (magnitude := parts.get("lora_magnitude_vector.default.weight")) is not None:
            c = magnitude / (weight + change).detach().norm(dim=2)
            change = (c[..., None] - 1) * weight + c[..., None] * change
        merged = dense.get_parameter(place)
        change = change if merged.shape == change.shape else change.transpose(1, 2)
        weights[place] = merged.detach() + change - change.detach()
    loss = functional_call(dense, weights, kwargs={"input_ids": IDS, "labels": IDS}).loss
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


@pytest.mark.parametrize(
    ("kind", "backend", "adapter", "composed"),
    [
        ("qwen3-moe", "hqq", "lora", False),
        ("gpt-oss", "hqq", "lora", False),
        ("gpt-oss", "bnb-nf4", "lora", True),
        ("gpt-oss", "hqq", "dora", False),
        ("qwen3-moe", "bnb-nf4", "dora", False),
    ],
)
def test_gradients_go_straight_through(
    kind: str, backend: str, adapter: str, composed: bool
) -> None:
    model, _ = aware(kind, backend, adapter, target_modules=ON_EXPERTS)
    right = in_float64(model)
    if composed:  # a bias is trained, and no fused function is for that
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or "_proj_bias" in name)
    found = gradients(model.train())
    for name, gradient in right.items():
        assert relative(found[name].double(), gradient) < 1e-5, name


def test_training_and_merging(tmp_path: Path) -> None:
    folder = saved_model(made("mixtral"), tmp_path / "base")
    model = qa.attach(qa.quantize(folder, "hqq", bits=2, group_size=32), "lora")
    qa.train(model, DATA, merge_aware=True, max_steps=4, learning_rate=3e-3, verbose=False)
    stacks = dict(stack_facades(model))
    assert stacks
    assert all(stack.keeps_scales for stack in stacks.values())
    trained = logits(model)
    qa.merge(model, tmp_path, kind="requantize", data=DATA, min_gain=0)
    assert kl(logits(qa.load(tmp_path / "merged")), trained) < 1e-9
    saved = qa.save(model, tmp_path / "adapter")
    assert relative(logits(qa.load(saved)), trained) < 1e-6


def test_a_stack_whose_scales_are_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    base = qa.quantize(made("mixtral"), "hqq", device="cpu", dtype="float32", bits=4, group_size=32)
    model = qa.attach(base, "lora", r=2, target_modules=ON_EXPERTS)
    for _, stack in stack_facades(model):
        monkeypatch.setattr(stack.target, "grid", lambda vendor: None, raising=False)
    with pytest.raises(PlanRefused, match="not known what values"):
        make_merge_aware(model)
