"""The fused DoRA against PEFT's own: outputs, all gradients and losses of training."""

from __future__ import annotations

from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.dora import DoraLinearLayer
from test_fused import (
    SMALL,
    Plain,
    X,
    adapted,
    blocks,
    casts_once_a_step,
    close,
    model,
    results,
    saves_x_alone,
    second_adapter,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import quantadapt as qa
from quantadapt.adapting import fused_dora
from quantadapt.adapting.fused import FusedLoraLinear
from quantadapt.facade import recomputing
from quantadapt.training.lent import fused_layers


class Rounding(Plain):
    """Its own forward rounds what it gets, as vendors do that quantize activations."""

    quantizes_activations = True

    def forward(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear((x * 8).round() / 8, module.weight, module.bias)


def dora(fused: bool, **options) -> nn.Module:
    return adapted(fused, use_dora=True, **options)


def both(**options) -> tuple[nn.Module, nn.Module]:
    return dora(True, **options), dora(False, **options)


def peft_is_not_asked():
    return patch.object(DoraLinearLayer, "forward", side_effect=AssertionError)


def gradients(made: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"lora_dropout": 0.3}, {"bias": False}],
    ids=str,
)
@pytest.mark.parametrize("x", [X, X[0], X[0, 0]], ids=["3-D", "2-D", "1-D"])
def test_it_is_peft_in_float64(options, x) -> None:
    fused, stock = both(**options)
    expected = results(stock, x)
    assert sum("magnitude" in name for name in expected) == 2
    with peft_is_not_asked():
        close(results(fused, x), expected)
    fused.eval()
    stock.eval()
    assert torch.allclose(fused(x), stock(x), rtol=1e-12)


def test_where_a_vendor_quantizes_activations_it_is_left_to_peft() -> None:
    fused, stock = both()
    for made in (fused, stock):
        for layer in (made[0], made[2]):
            layer.base_layer.target = Rounding()
    found, expected = results(fused, X), results(stock, X)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert not torch.allclose(found["y"], results(dora(True), X)["y"])


def test_where_only_evaluation_quantizes_activations_training_is_fused(monkeypatch) -> None:
    monkeypatch.setattr(Rounding, "straight_through", False)
    made, plain = dora(True), dora(True)
    for layer in (made[0], made[2]):
        layer.base_layer.target = Rounding()
    with peft_is_not_asked():
        close(results(made, X), results(plain, X))
    assert not torch.allclose(made.eval()(X), plain.eval()(X))


def test_x_without_a_gradient() -> None:
    fused, stock = both(lora_dropout=0.3)
    for made in (fused, stock):
        torch.manual_seed(0)
        checkpoint(made, X, use_reentrant=False).sum().backward()
    close(gradients(fused), gradients(stock))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, dropout) -> None:
    fused, stock = both(lora_dropout=dropout)
    found = results(fused, X, lambda x: checkpoint(fused, x, use_reentrant=reentrant))
    close(found, results(stock, X))


def keeping(made):
    """As the trainer recomputes: what backward wants is kept."""
    context = lambda: (nullcontext(), recomputing())  # noqa: E731
    return lambda x: checkpoint(made, x, use_reentrant=False, context_fn=context)


@pytest.mark.parametrize(
    ("keeps", "weights", "products"), [(False, 2 + 1 + 2, 2 + 1 + 2), (True, 2 + 1 + 1, 2 + 1 + 1)]
)
def test_how_often_weights_and_their_products_are_made(keeps, weights, products) -> None:
    """Once in forward, once in the recomputation, but for the last layer, and once in backward,
    unless the recomputation keeps them."""
    made, x = dora(True), X.repeat(30, 1, 1)  # weights are kept where they are smaller than x
    run = keeping(made) if keeps else lambda x: checkpoint(made, x, use_reentrant=False)
    target = made[0].base_layer.target
    target.count = 0
    with patch.object(fused_dora, "_product", wraps=fused_dora._product) as calls:
        found = results(made, x, run)
    assert (target.count, calls.call_count) == (weights, products)
    close(found, results(dora(False), x))
    assert made[0].base_layer._kept_product is None


def twice(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return layer(x).sin() * layer(x * 2)


def twice_and_once_again(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return layer(x).sin() + layer(x * 2)  # a sum saves nothing: its last term is not recomputed


@pytest.mark.parametrize("several", [twice, twice_and_once_again])
def test_a_kept_product_is_that_of_its_own_x(several) -> None:
    """A layer keeps one product, however often it is called."""
    fused, stock = (made[0] for made in both())
    found = results(fused, X, keeping(lambda x: several(fused, x)))
    close(found, results(stock, X, lambda x: several(stock, x)))


def test_what_is_kept_can_be_dropped() -> None:
    facade = dora(True)[0].base_layer
    for forget in (facade.forget, lambda: facade.to(torch.float64)):
        with recomputing():
            facade.keep_product(X, X)
        forget()
        assert facade.product_for_backward(X) is None


def test_it_saves_x_and_nothing_else() -> None:
    saves_x_alone(dora(True))


def test_its_output_may_be_overwritten() -> None:
    found = []
    for overwrites in (False, True):
        made = dora(True)
        y = made(X.clone().requires_grad_())
        loss = (y * 3).sum()
        if overwrites:
            y.data.zero_()
        loss.backward()
        found.append(gradients(made))
    close(*found)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_as_pefts(dtype, autocast, device) -> None:
    """Both against float64, from the same rounded weights. Without autocast PEFT computes its part
    in the float32 of A and B, and is more precise by that."""
    halves = [made.to(device) for made in both(dtype=dtype, master=torch.float32)]
    exact = dora(False).to(device)
    exact.load_state_dict({k: v.double() for k, v in halves[0].state_dict().items()})
    for layer in (exact[0], exact[2]):
        layer.to(torch.float64)
    x = X.to(device, dtype)
    expected = results(exact, x.double())
    errors = []
    for made in halves:
        with torch.autocast(device, dtype, enabled=autocast):
            found = results(made, x)
        assert found["y"].dtype == dtype
        assert found["0.lora_magnitude_vector.default.weight"].dtype == torch.float32
        errors.append(
            {n: float((found[n].double() - v).norm() / v.norm()) for n, v in expected.items()}
        )
    for name, error in errors[0].items():
        limit = (1.5 if autocast else 2.5) * errors[1][name] + 1e-3
        assert error <= limit, (name, error, limit)


def test_the_norm_is_float32_whatever_the_base() -> None:
    """Rounded to bfloat16 it would scale each row by up to 0.4% too much or too little."""
    made = dora(True, dtype=torch.bfloat16, master=torch.float32)[0]
    with torch.no_grad():
        made.lora_B["default"].weight.mul_(0.001)
    weight = made.base_layer.dequantize()
    term, _ = made.single_lora()
    norm = fused_dora._row_norms(term, weight)
    assert norm.dtype == torch.float32
    low_rank = term.b_cast.double() @ term.a_cast.double() * term.scaling
    expected = (weight.double() + low_rank).norm(dim=1)
    torch.testing.assert_close(norm.double(), expected, rtol=2e-4, atol=0)


def test_a_small_change_of_the_magnitude_is_not_rounded_away() -> None:
    """A bfloat16 number times 1.001 is itself again; its sum with the adapter's part is not."""
    made = dora(True, dtype=torch.bfloat16, master=torch.float32, bias=False)[0]
    magnitude = made.lora_magnitude_vector["default"].weight
    x = torch.randn(2000, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        made.lora_B["default"].weight.mul_(0.01)
        weight = made.base_layer.weight.float() + made.get_delta_weight("default")
        magnitude.copy_(weight.norm(dim=1))
        before = made(x).float()
        magnitude.mul_(1.001)
        change = ((made(x).float() - before) * before).sum() / (before * before).sum()
    assert float(change) == pytest.approx(1e-3, rel=0.2)


@pytest.mark.parametrize("other", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_several_adapters_and_switching_off(other) -> None:
    fused, stock = both()
    for made in (fused, stock):
        second_adapter(made, **other)
    for active in (["default"], ["other"], ["default", "other"], ["default"]):
        for made in (fused, stock):
            for layer in (made[0], made[2]):
                layer.set_adapter(active)
        assert torch.allclose(fused(X), stock(X), rtol=1e-12)
    for enabled in (False, True):
        for made in (fused, stock):
            made[0].enable_adapters(enabled)
        assert torch.allclose(fused(X), stock(X), rtol=1e-12)


def test_what_peft_merges_is_what_it_computes() -> None:
    made = inject_adapter_in_model(
        LoraConfig(r=4, target_modules=["0"], use_dora=True), nn.Sequential(model()[0].dense())
    )
    fused = dora(True)
    made[0].load_state_dict(fused[0].state_dict(), strict=False)
    expected = fused[0](X)
    made[0].scaling["default"] = fused[0].scaling["default"]
    made[0].merge()
    assert torch.allclose(made[0](X), expected, rtol=1e-10)


def test_the_base_may_change_outside_of_training() -> None:
    fused, stock = both()
    fused(X)
    with fused_layers(fused):
        fused(X)
    for made in (fused, stock):
        made[0].base_layer.vendor.weight.data.mul_(3)
    assert torch.allclose(fused(X), stock(X), rtol=1e-12)


def test_while_it_trains_rows_are_measured_once() -> None:
    fused, stock = both()
    with fused_layers(fused) as training:
        assert len(training._layers) == 2
        with patch("torch.linalg.vector_norm", wraps=torch.linalg.vector_norm) as norms:
            for _ in range(3):
                fused.zero_grad()
                stock.zero_grad()
                found = results(fused, X)
                assert norms.call_count == 2
        close(found, results(stock, X))


def test_while_it_trains_a_and_b_are_cast_once_a_step() -> None:
    casts_once_a_step(dora(True, dtype=torch.bfloat16, master=torch.float32))


def test_a_sibling_that_becomes_dora_in_training() -> None:
    """Layers of one input are computed together as LoRA; one that is DoRA now is left out."""
    stock, fused = blocks(False), blocks(True)
    with fused_layers(fused):
        for _ in range(2):
            close(results(fused, X), results(stock, X))
            for made in (stock, fused):
                made.zero_grad()
        for made in (stock, fused):
            config = LoraConfig(r=2, target_modules=["k"], use_dora=True, init_lora_weights=False)
            torch.manual_seed(4)
            inject_adapter_in_model(config, made, adapter_name="other")
            for block in made:
                block.k.to(torch.float64).set_adapter("other")
        close(results(fused, X), results(stock, X))


def losses(**options) -> list[float]:
    found: list[float] = []
    torch.manual_seed(0)
    tuned = qa.attach(qa.quantize(SMALL, "hqq", device="cpu"), "dora", r=8, **options)
    qa.train(
        tuned,
        max_steps=4,
        learning_rate=5e-3,
        logging_steps=1,
        per_device_train_batch_size=2,
        max_length=64,
        on_log=lambda entry: found.append(entry["loss"]),
    )
    return found


@pytest.mark.parametrize("dropout", [0.0, pytest.param(0.1, marks=pytest.mark.slow)])
def test_training_has_the_losses_of_peft(dropout) -> None:
    with peft_is_not_asked():
        found = losses(lora_dropout=dropout)
    with patch("quantadapt.adapting.fused.use_fused_layers"):
        expected = losses(lora_dropout=dropout)
    assert len(found) == 4
    assert found == pytest.approx(expected, rel=2e-5)
    assert found[-1] != pytest.approx(found[0], rel=1e-2)


def test_saved_and_loaded_layers_are_fused(tmp_path) -> None:
    made = qa.attach(qa.quantize(SMALL, "hqq", device="cpu"), "dora", r=4)
    qa.save(made, tmp_path)
    loaded = qa.load(tmp_path)
    layers = [m for m in loaded.modules() if isinstance(m, FusedLoraLinear)]
    assert len(layers) == 14
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = made(input_ids=ids).logits
        with peft_is_not_asked():
            assert torch.equal(loaded(input_ids=ids).logits, expected)
