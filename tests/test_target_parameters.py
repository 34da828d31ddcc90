"""PEFT's `target_parameters` on the weights of quantized layers, beside stock PEFT on dense layers
that hold the same numbers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import quantadapt as qa
from quantadapt.errors import PlanRefused
from quantadapt.facade import facades

BACKENDS = ("none", "hqq", "bnb-nf4", "bnb-int8", "torchao-int8", "quanto")
X = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))


class Model(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.a = nn.Linear(64, 128, bias=bias)
        self.b = nn.Linear(128, 64, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))


def pair(backend: str, bias: bool = True) -> tuple[nn.Module, nn.Module]:
    """Return a model of facades, and a dense one with the same numbers."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Model(bias))
    model = qa.quantize(models[0], backend=backend, device="cpu", dtype="float32")
    for name, facade in facades(model):
        models[1].get_submodule(name).weight.data.copy_(facade.dequantize())
    return model.train(), models[1]


def config(**options: Any) -> LoraConfig:
    options = {"target_modules": [], "target_parameters": ["a.weight"], "r": 4} | options
    return LoraConfig(init_lora_weights=False, **options)


def made(model: nn.Module, adapter: LoraConfig, seed: int = 2) -> Any:
    torch.manual_seed(seed)
    return get_peft_model(model, adapter)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return float((a - b).detach().norm() / b.norm()) < tolerance


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_lora_on_a_quantized_weight_is_that_on_a_dense_one(backend, bias) -> None:
    """Outputs, gradients of adapter and input, switched off, merged in place and back."""
    models = [made(model, config(target_parameters=["a.weight", "b.weight"])) for model in
              pair(backend, bias)]  # fmt: skip
    results = []
    for model in models:
        x = X.clone().requires_grad_()
        y = model(x)
        y.square().sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        with model.disable_adapter():
            off = model(X)
        results.append((y, x.grad, off, gradients))
    ours, stock = results
    assert ours[3].keys() == stock[3].keys()
    assert len(ours[3]) == 4
    for i in range(3):
        assert close(ours[i].detach(), stock[i].detach())
    assert all(close(ours[3][name], stock[3][name]) for name in stock[3])
    assert not close(ours[0], ours[2], 0.1)  # the adapter does something

    model = models[0]
    before = [facade.dequantize().clone() for _, facade in facades(model)]
    model.merge_adapter()
    assert close(model(X), models[1](X))
    model.unmerge_adapter()
    assert close(model(X), models[1](X))
    after = [facade.dequantize() for _, facade in facades(model)]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("backend", ["hqq", "bnb-nf4"])
def test_adapters_of_parameters_go_between_facades_and_stock_layers(backend, tmp_path: Path):
    """Two adapters, both ways, and one of them beside `target_modules`."""
    model, dense = pair(backend)
    for adapter in (config(), config(target_modules=["b"])):
        for source, target in ((model, dense), (dense, model)):
            tuned = made(copy.deepcopy(source), adapter)
            tuned.add_adapter("other", adapter)
            tuned.set_adapter("other")
            expected = tuned.eval()(X)
            tuned.save_pretrained(str(tmp_path / "it"), selected_adapters=["other"])
            again = PeftModel.from_pretrained(copy.deepcopy(target), str(tmp_path / "it" / "other"))
            assert close(again.eval()(X), expected)
            assert close(again.merge_and_unload()(X), expected, 0.2)  # quantized again


def test_a_weight_goes_by_the_name_that_a_dense_layer_gives_it() -> None:
    model, _ = pair("hqq")
    with pytest.raises(ValueError, match="no `target_parameters` found"):
        made(model, config(target_parameters=["a.W_q"]))
    with pytest.raises(ValueError, match="1 dimensional"):  # as stock PEFT says
        made(model, config(target_parameters=["a.bias"]))
    with pytest.warns(RuntimeWarning, match="target_modules=.*no module was matched"):
        made(model, config(target_modules=["foo"]))


@pytest.mark.parametrize("backend", ["none", "hqq", "bnb-nf4"])
def test_attach_takes_them_too(backend, tmp_path: Path) -> None:
    """Fused layers stand beside them; saved and loaded, and a layer is named in one place only."""
    model, dense = pair(backend)
    options = {"r": 4, "lora_alpha": 4, "target_parameters": ["a.weight"], "target_modules": ["b"]}
    torch.manual_seed(2)
    tuned = qa.attach(copy.deepcopy(model), "lora", **options, init_lora_weights=False)
    stock = made(copy.deepcopy(dense), config(**options))
    for name, parameter in stock.named_parameters():
        if "lora_" in name:
            tuned.get_parameter(name).data.copy_(parameter)
    assert close(tuned(X), stock(X))
    qa.save(tuned, str(tmp_path / "it"))
    again = qa.load(str(tmp_path / "it"), base=copy.deepcopy(model))
    assert close(again.eval()(X), stock.eval()(X))
    alone = qa.attach(copy.deepcopy(model), "lora", target_parameters=["a.weight"],
                      target_modules=[])  # fmt: skip
    assert len([p for p in alone.parameters() if p.requires_grad]) == 2
    with pytest.raises(PlanRefused, match=r"target_modules names a, so a\.weight"):
        qa.attach(copy.deepcopy(model), "lora", target_parameters=["a.weight"])
    with pytest.raises(PlanRefused, match=r"a\.wait"):
        qa.attach(copy.deepcopy(model), "lora", target_parameters=["a.wait"])
