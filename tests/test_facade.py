"""The facade: metadata for free, numbers when read, no vendor in the module tree."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import quantadapt as qa
from quantadapt.errors import PluginError
from quantadapt.facade import LazyWeight, QuantLinear, densify, unwrap, wrap
from quantadapt.model.modules import is_skipped
from quantadapt.probe import dequantize_by_probe
from quantadapt.protocols import AdapterTarget


class Counting(AdapterTarget):
    """A view of `nn.Linear` that counts how often the weight is really made."""

    def __init__(self, shape: tuple[int, int] | None = None) -> None:
        self.count = 0
        self._shape = shape

    def matches(self, module: nn.Module) -> bool:
        return type(module) is nn.Linear

    def shape(self, module: nn.Module) -> tuple[int, int]:
        return self._shape or super().shape(module)

    def dequantize(self, module: nn.Module) -> torch.Tensor:
        self.count += 1
        return module.weight.detach()

    def requantize(self, module: nn.Module, weight: torch.Tensor) -> nn.Module:
        result = copy.deepcopy(module)
        result.weight = nn.Parameter(weight.round(decimals=2))
        return result


class Precise(Counting):
    """Its kernel answers in float32, and its weight has its columns one behind the other."""

    quantizes_activations = True

    def forward(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x.float(), module.weight, module.bias)

    def dequantize(self, module: nn.Module) -> torch.Tensor:
        return super().dequantize(module).T.contiguous().T


def facade(**kwargs) -> QuantLinear:
    torch.manual_seed(0)
    made = wrap(nn.Linear(6, 4), Counting(**kwargs), torch.float32)
    made.target.count = 0  # wrapping tries the shape once
    return made


def test_metadata_is_free_and_numbers_are_not() -> None:
    layer = facade()
    weight = layer.weight
    assert isinstance(weight, LazyWeight)
    assert (weight.shape, weight.dtype, weight.device) == ((4, 6), torch.float32, layer.device)
    assert weight.requires_grad is False
    assert weight.numel() == 24
    assert "4, 6" in repr(weight)
    assert layer.target.count == 0
    assert torch.equal(weight + 0, layer.vendor.weight)
    assert layer.target.count == 1


@pytest.mark.parametrize(
    "read",
    [
        lambda w: w.float(),
        lambda w: w.T.contiguous().T,
        lambda w: w.data.clone(),
        lambda w: w.detach() * 1,
        lambda w: w[:, :].clone(),
        lambda w: torch.cat([w]),
        lambda w: nn.functional.linear(torch.eye(6), w).T,
        lambda w: copy.deepcopy(w),
    ],
)
def test_every_way_to_read_gives_the_numbers(read) -> None:
    layer = facade()
    torch.testing.assert_close(read(layer.weight), layer.vendor.weight.detach())


def test_assigning_to_data_goes_through_the_quantizer() -> None:
    layer = facade()
    new = torch.full((4, 6), 0.123456)
    layer.weight.data = new
    torch.testing.assert_close(layer.dequantize(), torch.full((4, 6), 0.12))
    layer.weight.data = new.double()
    assert layer.vendor.weight.dtype == torch.float32  # the quantizer is given the compute dtype
    assert not any(p.requires_grad for p in layer.parameters())


def test_one_module_and_the_vendors_own_tensors() -> None:
    layer = facade()
    assert [type(m) for m in nn.Sequential(layer).modules()] == [nn.Sequential, QuantLinear]
    assert [n for n, _ in layer.named_parameters()] == ["weight", "bias"]
    assert dict(layer.named_parameters())["weight"] is layer.vendor.weight
    assert list(nn.Sequential(layer).state_dict()) == ["0.weight", "0.bias"]
    assert not any(p.requires_grad for p in layer.parameters())


def test_moving_and_copying_keep_facade_and_vendor_together() -> None:
    layer = copy.deepcopy(facade()).double()
    assert layer.vendor.weight.dtype == torch.float64
    assert layer._parameters is layer.vendor._parameters
    other = facade()
    with torch.no_grad():
        layer.vendor.weight.add_(1)
    assert not torch.equal(layer.dequantize(), other.dequantize())


def test_gradient_with_respect_to_the_input() -> None:
    layer = facade()
    x = torch.randn(3, 5, 6, requires_grad=True)
    y = layer(x)
    dense = layer.dense()
    assert torch.equal(y, nn.functional.linear(x, dense.weight, dense.bias))
    dy = torch.randn_like(y)
    y.backward(dy)
    torch.testing.assert_close(x.grad, dy @ dense.weight)


def test_a_dense_copy_is_a_copy() -> None:
    """Merging changes it in place, and a backend may hand out the very weight of the layer."""
    layer = facade().eval()
    x = torch.randn(3, 6)
    before, dense = layer(x), layer.dense()
    assert torch.equal(dense(x), before)
    assert not dense.training
    for copied in (*dense.parameters(), copy.deepcopy(layer.weight)):
        copied.data.add_(1)
    assert torch.equal(layer(x), before)


def test_autocast_and_dtypes() -> None:
    layer = facade()
    x = torch.randn(2, 6)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)
    half, vendor = wrap(nn.Linear(6, 4).bfloat16(), Counting(), torch.bfloat16), facade().vendor
    expected = nn.functional.linear(x.bfloat16(), half.vendor.weight, half.bias)
    assert torch.equal(half(x), expected.float())  # in the dtype of the layer, whatever comes in
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert wrap(vendor, Precise(), torch.float32)(x).dtype == torch.bfloat16


def test_wrap_and_unwrap() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    first = model[0]
    wrap(model, Counting(), torch.float32, skip=("2",))
    assert isinstance(model[0], QuantLinear)
    assert type(model[2]) is nn.Linear
    nested = wrap(
        nn.Sequential(nn.Sequential(nn.Linear(6, 4))), Counting(), torch.float32, ("0.0",)
    )
    assert type(nested[0][0]) is nn.Linear
    wrap(model, Counting(), torch.float32, skip=("2",))
    assert model[0].vendor is first
    assert unwrap(model)[0] is first
    wrap(model, Counting(), torch.float32)
    x = torch.randn(2, 6)
    y = model(x)
    torch.testing.assert_close(densify(model)(x), y)
    assert type(model[0]) is nn.Linear


class Outer(nn.Linear):
    """A vendor's layer that has a layer of its own inside."""

    def __init__(self) -> None:
        super().__init__(6, 4)
        self.inner = nn.Linear(6, 4)


def test_what_is_inside_a_vendors_layer_is_left_alone(monkeypatch) -> None:
    monkeypatch.setattr(Counting, "matches", lambda self, module: isinstance(module, nn.Linear))
    outer = Outer().eval()
    model = wrap(nn.Sequential(outer), Counting(), torch.float32)
    assert model[0].vendor is outer
    assert type(outer.inner) is nn.Linear
    assert not model[0].training


def test_rows_of_a_weight_lie_one_behind_the_other() -> None:
    """As safetensors wants it of a merged layer."""
    layer = wrap(facade().vendor, Precise(), torch.float32)
    assert layer.dequantize().is_contiguous()


@pytest.mark.parametrize(
    ("skip", "skipped"),
    [
        ("gate", ["model.layers.1.gate"]),
        ("layers.1", ["model.layers.1.gate", "model.layers.1.gate_proj"]),
        ("model.layers.1.gate", ["model.layers.1.gate"]),
    ],
)
def test_names_are_skipped_by_whole_words(skip, skipped) -> None:
    names = ["model.layers.1.gate", "model.layers.1.gate_proj", "model.layers.10.expert_gate"]
    assert [name for name in names if is_skipped(name, (skip,))] == skipped


def test_a_target_that_lies_about_shapes_is_an_error() -> None:
    with pytest.raises(PluginError, match=r"shape returned \(0, 4\)"):
        facade(shape=(0, 4))
    with pytest.raises(PluginError, match=r"dequantize returned \(4, 6\), its shape says \(6, 4\)"):
        facade(shape=(4, 6))


def test_probe_reads_a_weight_out_of_a_kernel() -> None:
    linear = nn.Linear(6, 4)
    found = dequantize_by_probe(linear, 6, dtype=torch.float32, device=torch.device("cpu"))
    torch.testing.assert_close(found, linear.weight)


def test_a_model_that_is_no_language_model() -> None:
    """Any `nn.Module` with linear layers can be quantized, adapted and trained."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    x, y = torch.randn(64, 64), torch.randn(64, 1)
    tuned = qa.attach(qa.quantize(model, "hqq", group_size=32), "lora", r=4)
    optimizer = torch.optim.AdamW((p for p in tuned.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = (tuned(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
