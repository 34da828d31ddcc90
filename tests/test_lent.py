"""Liger's kernels are lent to a model and taken back."""

from __future__ import annotations

import sys

import pytest
import torch

import quantadapt as qa
from quantadapt.testing.small_demo import demo_tokens, small_model
from quantadapt.training.lent import fused_kernels


def loss_and_gradients(model) -> dict[str, torch.Tensor]:
    ids = demo_tokens().to(next(model.parameters()).device)
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def patches(model) -> dict[str, list[str]]:
    return {n: sorted(vars(m).keys() & {"forward", "_get_name"}) for n, m in model.named_modules()}


def test_on_a_cpu_the_model_stays_as_it_is() -> None:
    model = qa.attach(qa.quantize(str(small_model()), "hqq"), "lora")
    before = patches(model)
    with fused_kernels(model) as done:
        assert done is False
        assert patches(model) == before


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_numbers_are_the_same_and_nothing_stays(dtype) -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is optional")
    model = qa.quantize(str(small_model()), "bnb-nf4", device="cuda", dtype=dtype)
    model = qa.attach(model, "lora", init_lora_weights=False).train()
    definitions = vars(sys.modules[type(model.get_base_model()).__module__])
    before, names = patches(model), dict(definitions)
    expected = loss_and_gradients(model)
    with fused_kernels(model) as done:
        assert done is True
        assert patches(model) != before
        found = loss_and_gradients(model)
    assert patches(model) == before
    assert {k: v for k, v in definitions.items() if names.get(k) is not v} == {}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = float((found[name] - value).float().norm() / value.float().norm())
        assert error < (1e-4 if dtype == "float32" else 0.05), (name, error)
