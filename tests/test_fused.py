"""The fused LoRA layer against PEFT's own: outputs and all gradients, in float64."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import quantadapt as qa
from quantadapt.facade import QuantLinear, wrap
from quantadapt.fused import FusedLoraLinear, use_fused_layers
from quantadapt.protocols import AdapterTarget
from quantadapt.testing.bench import small_model

SMALL = str(small_model())


class Plain(AdapterTarget):
    """An unquantized layer that counts how often its weight is made."""

    count = 0

    def matches(self, module: nn.Module) -> bool:
        return type(module) is nn.Linear

    def dequantize(self, module: nn.Module) -> torch.Tensor:
        self.count += 1
        return module.weight.detach()


def model(dtype=torch.float64, bias=True) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(12, 20, bias), nn.SiLU(), nn.Linear(20, 8, bias)).to(dtype)
    return wrap(made, Plain(), dtype)


def adapted(fused: bool, dtype=torch.float64, bias=True, master=None, **options) -> nn.Module:
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["0", "2"], **options)
    if fused:
        use_fused_layers(config)
    made = inject_adapter_in_model(config, model(dtype, bias))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = values.to(master or dtype)
    return made


def results(made: nn.Module, x: torch.Tensor, run=None) -> dict[str, torch.Tensor]:
    """Output and every gradient."""
    x = x.clone().requires_grad_()
    torch.manual_seed(5)
    y = (run or made)(x)
    (y * torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape).cos()).sum().backward()
    gradients = {n: p.grad for n, p in made.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **gradients}


def assert_same(found, expected, rtol=1e-12) -> None:
    assert found.keys() == expected.keys()
    assert len(expected) == 6
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        error = float((found[name] - value).norm() / value.norm())
        assert error <= rtol, (name, error)


X = torch.randn(3, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"lora_dropout": 0.3},
        {"bias": False},
        {"lora_bias": True},
        {"use_dora": True},
    ],
    ids=str,
)
def test_it_is_peft_in_float64(options) -> None:
    fused, stock = adapted(True, **options), adapted(False, **options)
    assert type(fused[0]) is FusedLoraLinear
    assert type(stock[0]) is not FusedLoraLinear
    found, expected = results(fused, X), results(stock, X)
    extra = {n for n in expected if "magnitude" in n or n.endswith("lora_B.default.bias")}
    for name in extra:
        assert torch.allclose(found.pop(name), expected.pop(name))
    assert_same(found, expected)


def test_x_without_a_gradient() -> None:
    fused, stock = adapted(True), adapted(False)
    for made in (fused, stock):
        made(X).sum().backward()
    for (name, found), (_, expected) in zip(
        fused.named_parameters(), stock.named_parameters(), strict=True
    ):
        if "lora_" in name:
            assert torch.allclose(found.grad, expected.grad, rtol=1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant) -> None:
    made = adapted(True)
    saved = results(made, X, lambda x: checkpoint(made, x, use_reentrant=reentrant))
    assert_same(saved, results(adapted(True), X))


def test_the_last_layer_is_not_computed_again() -> None:
    """Weights are made once in forward, once in backward, and in the recomputation once each but
    for the last layer."""
    made = adapted(True)
    target = made[0].base_layer.target
    target.count = 0
    results(made, X, lambda x: checkpoint(made, x, use_reentrant=False))
    assert target.count == 2 + 2 + 1


def test_several_adapters_and_switching_off() -> None:
    fused, stock = adapted(True), adapted(False)
    for made in (fused, stock):
        config = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
        torch.manual_seed(3)
        inject_adapter_in_model(config, made, adapter_name="other")
        for layer in (made[0], made[2]):
            layer.to(torch.float64)
    for active in (["default"], ["other"], ["default", "other"]):
        for made in (fused, stock):
            for layer in (made[0], made[2]):
                layer.set_adapter(active)
        assert torch.allclose(fused(X), stock(X), rtol=1e-12)
    for made in (fused, stock):
        made[0].enable_adapters(False)
    assert torch.allclose(fused(X), stock(X), rtol=1e-12)


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_with_float32_masters(autocast) -> None:
    fused, stock = (adapted(f, torch.bfloat16, master=torch.float32) for f in (True, False))
    x = X.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, expected = results(fused, x), results(stock, x)
    assert found["0.lora_A.default.weight"].dtype == torch.float32
    assert_same(found, expected, rtol=2e-2)


def test_it_saves_x_and_nothing_else() -> None:
    saved = []
    made = adapted(True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        made(X.clone().requires_grad_())
    sizes = sorted(t.numel() for t in saved)
    assert sizes == sorted([3 * 5 * 12, 3 * 5 * 20, 3 * 5 * 20])  # SiLU saves its input


def test_attached_and_loaded_layers_are_fused(tmp_path) -> None:
    made = qa.attach(qa.quantize(SMALL, "hqq"), "lora")
    fused = [m for m in made.modules() if isinstance(m, FusedLoraLinear)]
    assert len(fused) == 14
    assert all(isinstance(m.base_layer, QuantLinear) for m in fused)
    qa.save(made, tmp_path)
    loaded = qa.load(tmp_path)
    assert sum(isinstance(m, FusedLoraLinear) for m in loaded.modules()) == 14
