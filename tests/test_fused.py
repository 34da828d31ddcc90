"""The fused LoRA layer against PEFT's own: outputs and all gradients, in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from functools import partial
from unittest.mock import Mock, patch

import pytest
import torch
from allocations import peak_of
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear
from torch import nn
from torch.utils.checkpoint import checkpoint

import quantadapt as qa
from quantadapt.adapting import fused as fused_module
from quantadapt.adapting.fused import (
    _KNOWN_OPTIONS,
    _KNOWN_PARTS,
    FusedLoraLinear,
    forget_unfinished,
    use_fused_layers,
)
from quantadapt.facade import QuantLinear, densify, recomputed_later, recomputing, wrap
from quantadapt.protocols import AdapterTarget
from quantadapt.testing.small_demo import small_model
from quantadapt.training.lent import fused_layers

SMALL = str(small_model())


class Plain(AdapterTarget):
    """An unquantized layer that counts how often its weight is made."""

    count = 0

    def matches(self, module: nn.Module) -> bool:
        return type(module) is nn.Linear

    def dequantize(self, module: nn.Module) -> torch.Tensor:
        self.count += 1
        return module.weight.detach()

    def requantize(self, module: nn.Module, weight: torch.Tensor) -> nn.Module:
        made = copy.deepcopy(module)
        made.weight = nn.Parameter(weight.clone())
        return made


class Viewing(Plain):
    """Its own forward returns a view, as kernels do; some have the tokens first in memory."""

    quantizes_activations = True

    def __init__(self, tokens_first: bool) -> None:
        self.tokens_first = tokens_first

    def forward(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.linear(x.flatten(0, -2), module.weight, module.bias)
        y = y.unflatten(0, x.shape[:-1])
        return y.transpose(0, 1).contiguous().transpose(0, 1) if self.tokens_first else y


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
    factors = torch.arange(y.numel(), dtype=y.dtype, device=y.device).cos()
    (y * factors.reshape(y.shape)).sum().backward()
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


def test_without_a_gradient_to_give_the_base_is_left_alone() -> None:
    made = adapted(True)
    loss, target = made[0](X).sum(), made[0].base_layer.target
    target.count = 0
    loss.backward()
    assert target.count == 0


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_second_derivative_is_refused(use_dora) -> None:
    """Backward is made of what autograd does not see: through it, gradients would be wrong."""
    made, x = adapted(True, use_dora=use_dora), X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(made(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("tokens_first", [False, True])
def test_what_a_vendor_returns_may_be_a_view_and_is_changed_in_place(tokens_first) -> None:
    made, stock = adapted(True), adapted(False)
    for layer in (made[0], made[2]):
        layer.base_layer.target = Viewing(tokens_first)
    for one, other in ((made[0], stock[0]), (made[0].base_layer, stock[0].base_layer)):
        x = X.clone().requires_grad_()
        y = one(x)
        y += 1
        y.sum().backward()
        assert torch.allclose(y, other(X) + 1, rtol=1e-12)
    made.zero_grad()
    assert_same(results(made, X), results(stock, X))


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_float32_input_of_a_bfloat16_base(use_dora) -> None:
    options = {"dtype": torch.bfloat16, "master": torch.float32, "use_dora": use_dora}
    found, expected = (results(adapted(fused, **options), X.float()) for fused in (True, False))
    for name, value in expected.items():
        assert found[name].dtype == value.dtype == torch.float32, name
        assert float((found[name] - value).norm() / value.norm()) < 2e-2, name


@pytest.mark.parametrize("trains", [False, True])
def test_a_merged_adapter_is_not_added_again(trains) -> None:
    made = adapted(True)
    expected = made(X)
    with fused_layers(made) if trains else nullcontext():
        made[0].merge()
        assert torch.allclose(made(X), expected, rtol=1e-10)
        made[0].unmerge()
        assert torch.allclose(made(X), expected, rtol=1e-10)


def test_an_adapter_over_a_base_that_was_made_dense() -> None:
    made = adapted(True)
    expected = made(X)
    assert torch.allclose(densify(made)(X), expected, rtol=1e-12)
    assert type(made[0].base_layer) is nn.Linear


@pytest.mark.parametrize("autocast", [False, True])
def test_without_gradients_no_function_of_autograd_runs(monkeypatch, autocast) -> None:
    """It would take as long as the layer itself when single tokens are decoded."""
    from quantadapt.adapting.fused_lora import _FusedLora
    from quantadapt.facade.frozen import Frozen

    fused, base = adapted(True, torch.float32), model(torch.float32)
    x, among = X.float(), torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with among:
        expected = [made(x).detach() for made in (fused, base)]
    for function in (Frozen, _FusedLora):
        monkeypatch.setattr(function, "apply", None)
    with among, torch.no_grad():
        found = [made(x) for made in (fused, base)]
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


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


@pytest.mark.parametrize("again", [False, True])
def test_what_a_makes_of_x_is_kept_where_it_does_not_come_again(again, monkeypatch) -> None:
    """Else all layers would keep theirs, beside their inputs alone."""
    from quantadapt.adapting import fused_lora as file

    made, passes = adapted(True), []
    own = file._through_a
    monkeypatch.setattr(file, "_through_a", lambda *given: passes.append(1) or own(*given))
    kept = {}

    def forward(x: torch.Tensor) -> torch.Tensor:
        with recomputed_later() if again else nullcontext():
            y = made(x)
        kept["low"] = y.grad_fn.low
        return y

    results(made, X, forward)
    assert len(passes) == (4 if again else 2)
    assert (kept["low"] is None) == again


def second_adapter(made: nn.Module, **options) -> None:
    config = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False, **options)
    torch.manual_seed(3)
    inject_adapter_in_model(config, made, adapter_name="other")
    for layer in (made[0], made[2]):
        layer.to(torch.float64)


def test_several_adapters_and_switching_off() -> None:
    fused, stock = adapted(True), adapted(False)
    for made in (fused, stock):
        second_adapter(made)
    for active in (["default"], ["other"], ["default", "other"]):
        for made in (fused, stock):
            for layer in (made[0], made[2]):
                layer.set_adapter(active)
        assert torch.allclose(fused(X), stock(X), rtol=1e-12)
    for made in (fused, stock):
        made[0].enable_adapters(False)
    assert torch.allclose(fused(X), stock(X), rtol=1e-12)


def test_each_example_may_have_an_adapter_of_its_own() -> None:
    fused, stock = adapted(True), adapted(False)
    for made in (fused, stock):
        second_adapter(made)
    names = ["default", "__base__", "other"]
    found, expected = (made[0](X, adapter_names=names) for made in (fused, stock))
    assert torch.allclose(found, expected, rtol=1e-12)
    assert not torch.allclose(found, fused[0](X))


@pytest.mark.parametrize("variant", [{"alora_invocation_tokens": [1]}, {"use_dora": True}])
def test_a_variant_in_training_keeps_its_own_forward(variant) -> None:
    fused, stock = (adapted(f, **variant) for f in (True, False))
    with fused_layers(fused):
        assert torch.allclose(fused(X), stock(X), rtol=1e-12)


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_with_float32_masters(autocast) -> None:
    fused, stock = (adapted(f, torch.bfloat16, master=torch.float32) for f in (True, False))
    x = X.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, expected = results(fused, x), results(stock, x)
    assert found["0.lora_A.default.weight"].dtype == torch.float32
    assert_same(found, expected, rtol=2e-2)


def test_in_bfloat16_it_is_nearer_to_float64_than_two_roundings_are() -> None:
    """The adapter's part is rounded while it is small, and the sum once; PEFT rounds the base's
    output, and then the sum."""
    generator = torch.Generator().manual_seed(3)
    x, dy = (torch.randn(256, n, generator=generator).bfloat16() for n in (64, 96))

    def passed(fused: bool, dtype: torch.dtype) -> list[torch.Tensor]:
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=4, target_modules=["0"])
        if fused:
            use_fused_layers(config)
        base = nn.Sequential(nn.Linear(64, 96, False)).bfloat16().to(dtype)
        made = inject_adapter_in_model(config, wrap(base, Plain(), dtype))
        for name, weight in made.named_parameters():
            if "lora_" in name:
                values = torch.linspace(-2, 2, weight.numel()).sin().view(weight.shape) / 20
                weight.data = values.bfloat16().to(dtype)
        given = x.clone().to(dtype).requires_grad_()
        y = made(given)
        y.backward(dy.to(dtype))
        return [y.detach().double(), given.grad.double()]

    exact = passed(False, torch.float64)
    once, twice = (passed(fused, torch.bfloat16) for fused in (True, False))
    for right, one, two in zip(exact, once, twice, strict=True):
        assert (one - right).norm() < 0.8 * (two - right).norm() < 0.01 * right.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_evaluated_is_what_is_trained_to_the_bit(dtype) -> None:
    made, x = adapted(True, dtype), X.to(dtype)
    trained = made.train()(x).detach()
    with torch.no_grad():
        assert torch.equal(made.eval()(x), trained)


def saves_x_alone(made: nn.Module) -> None:
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        made(X.clone().requires_grad_())
    sizes = sorted(t.numel() for t in saved)
    assert sizes == sorted([3 * 5 * 12, 3 * 5 * 20, 3 * 5 * 20])  # SiLU saves its input


def test_it_saves_x_and_nothing_else() -> None:
    saves_x_alone(adapted(True))


def test_attached_and_loaded_layers_are_fused(tmp_path) -> None:
    made = qa.attach(qa.quantize(SMALL, "hqq"), "lora")
    fused = [m for m in made.modules() if isinstance(m, FusedLoraLinear)]
    assert len(fused) == 14
    assert all(isinstance(m.base_layer, QuantLinear) for m in fused)
    qa.save(made, tmp_path)
    loaded = qa.load(tmp_path)
    assert sum(isinstance(m, FusedLoraLinear) for m in loaded.modules()) == 14


class Block(nn.Module):
    """Three layers of one input and one that gets another, as in attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, n) for n in (12, 8, 8))
        self.o = nn.Linear(12, 12)
        self.skips_v = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.q(x).tanh() + self.k(x).sum(-1, keepdim=True)
        return self.o(y if self.skips_v else y * self.v(x).mean(-1, keepdim=True))


def blocks(fused: bool, **options) -> nn.Module:
    torch.manual_seed(0)
    made = wrap(nn.Sequential(Block(), Block()).double(), Plain(), torch.float64)
    defaults = {"rank_pattern": {"k": 2}, "init_lora_weights": False}
    defaults["target_modules"] = ["q", "k", "v", "o"]
    config = LoraConfig(r=4, lora_alpha=12, **{**defaults, **options})
    if fused:
        use_fused_layers(config)
    torch.manual_seed(1)
    return inject_adapter_in_model(config, made).double()


def close(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float((found[name] - value).norm() / value.norm()) <= 1e-12, name


def fused_calls(made: nn.Module, x: torch.Tensor) -> int:
    """How many functions it takes to compute the layers."""
    with patch.object(fused_module, "fused_lora", wraps=fused_module.fused_lora) as calls:
        made(x.clone().requires_grad_())
    return calls.call_count


@contextmanager
def counted_layers(computed: list[int]) -> Iterator[None]:
    """Append how many layers are computed, each as often as it is."""
    with patch.object(fused_module, "fused_lora", wraps=fused_module.fused_lora) as calls:
        yield
    computed.append(sum(len(call.args[2]) for call in calls.call_args_list))


@pytest.mark.parametrize("recomputed", [False, True])
def test_layers_of_one_input_are_one_function(recomputed) -> None:
    stock, fused = blocks(False), blocks(True)

    def run(made):
        if not recomputed:
            return made
        return lambda x: checkpoint(
            made, x, use_reentrant=False, context_fn=lambda: (nullcontext(), recomputing())
        )

    expected = results(stock, X, run(stock))
    assert fused_calls(fused, X) == 8
    with fused_layers(fused):
        for _ in range(3):  # the first pass finds out what belongs together
            fused.zero_grad()
            close(results(fused, X, run(fused)), expected)
        assert fused_calls(fused, X) == 4
    assert fused_calls(fused, X) == 8


def test_checkpointing_where_the_input_has_no_gradient() -> None:
    """As in the first block of a model, whose embedding is frozen."""
    stock, fused = blocks(False), blocks(True)
    with fused_layers(fused):
        for _ in range(2):
            for made in (stock, fused):
                made.zero_grad()
                checkpoint(made, X, use_reentrant=False).sum().backward()
            for (name, found), (_, expected) in zip(
                fused.named_parameters(), stock.named_parameters(), strict=True
            ):
                if expected.grad is not None:
                    assert torch.allclose(found.grad, expected.grad, rtol=1e-12), name


def test_a_pass_that_is_tried_again_after_an_error() -> None:
    stock, fused = blocks(False), blocks(True)
    again = partial(checkpoint, fused, use_reentrant=False)
    with fused_layers(fused):
        for _ in range(2):
            results(fused, X, again)
        fused[0].k.forward = Mock(side_effect=torch.OutOfMemoryError)  # q has computed k and v
        with pytest.raises(torch.OutOfMemoryError):
            again(X.clone().requires_grad_())
        del fused[0].k.forward
        siblings = fused[0].q._lent.siblings
        assert len(siblings._ready) == 2
        forget_unfinished(fused)
        assert not siblings._ready
        fused.zero_grad()
        close(results(fused, X, again), results(stock, X))


def test_the_same_x_again_gets_what_the_weights_are_now() -> None:
    """An x that is a leaf, such as a trained prompt, is the same object in each pass."""
    stock, fused = (blocks(f, target_modules=["q", "k", "v"]) for f in (False, True))
    one, other = X.clone().requires_grad_(), X.clone().requires_grad_()
    with fused_layers(fused) as training:
        for given in (one, one, other, other):
            assert torch.allclose(fused(given), stock(given), rtol=1e-12)
            with torch.no_grad():
                for made in (stock, fused):
                    for name, weight in made.named_parameters():
                        if "lora_" in name:
                            weight.mul_(1.5)
            training.refresh()


def test_a_layer_that_is_not_called_any_more_is_left_out() -> None:
    stock, fused = blocks(False), blocks(True)
    with fused_layers(fused):
        computed = []
        for skips in (False, False, True, True, False):
            for block in (*stock, *fused):
                block.skips_v = skips
            stock.zero_grad()
            fused.zero_grad()
            expected = results(stock, X)
            with counted_layers(computed):
                close(results(fused, X), expected)
            for module in fused.modules():
                if isinstance(module, FusedLoraLinear) and not skips:
                    assert not module._lent.siblings._ready
        assert computed == [8, 8, 8, 6, 8]  # in vain but once


def test_a_partner_with_dropout_is_not_joined_by_one_that_is_evaluated() -> None:
    stock, fused = blocks(False, lora_dropout=0.3).eval(), blocks(True, lora_dropout=0.3).eval()
    computed = []
    with fused_layers(fused):
        for trains in (False, False, True):
            for made in (stock, fused):
                made[0].k.train(trains)
                made.zero_grad()
            expected = results(stock, X)
            with counted_layers(computed):
                close(results(fused, X), expected)
    assert computed == [8, 8, 8]


def test_dropout_and_switched_off_adapters_are_not_joined() -> None:
    stock, fused = blocks(False, lora_dropout=0.3), blocks(True, lora_dropout=0.3)
    with fused_layers(fused):
        for _ in range(2):
            stock.zero_grad()
            fused.zero_grad()
            close(results(fused, X), results(stock, X))
        stock.eval()
        fused.eval()
        assert torch.allclose(fused(X), stock(X), rtol=1e-12)
        for layer in fused.modules():
            if isinstance(layer, FusedLoraLinear):
                layer.enable_adapters(False)
        for layer in stock.modules():
            if hasattr(layer, "enable_adapters"):
                layer.enable_adapters(False)
        assert torch.allclose(fused(X), stock(X), rtol=1e-12)


@pytest.mark.parametrize(("times", "kept"), [(100, True), (1, False)])
def test_a_recomputation_keeps_a_weight_that_is_smaller_than_its_input(times, kept) -> None:
    made, x = adapted(True), X.repeat(times, *[1] * (X.ndim - 1))
    target = made[0].base_layer.target
    results(made, x)
    target.count = 0
    context = lambda: (nullcontext(), recomputing())  # noqa: E731
    results(made, x, lambda x: checkpoint(made, x, use_reentrant=False, context_fn=context))
    assert target.count == 2 + 1 + 1 + (not kept)
    assert made[0].base_layer._kept is None


class Spending(Plain):
    """Making its weight takes 100 KiB beside, which are given back."""

    def dequantize(self, module: nn.Module) -> torch.Tensor:
        return module.weight.detach() + torch.zeros(100 * 2**8)[0]


def test_what_making_a_weight_takes_is_gone_when_outputs_and_gradients_come() -> None:
    layer = wrap(nn.Sequential(nn.Linear(32, 64)), Spending(), torch.float32)
    config = LoraConfig(r=4, target_modules=["0"])
    use_fused_layers(config)
    made = inject_adapter_in_model(config, layer).train()
    x, dy = torch.randn(1024, 32, requires_grad=True), torch.randn(1024, 64)
    results(made, x[:64].detach())
    outputs: list[torch.Tensor] = []
    forward = peak_of(lambda: outputs.append(made(x)))
    backward = peak_of(lambda: outputs.pop().backward(dy))
    assert outputs == []
    assert 256 * 2**10 < forward < (256 + 64) * 2**10  # y is 256 KiB
    assert 128 * 2**10 < backward < (128 + 64) * 2**10  # dx is 128 KiB


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
def test_an_input_that_nobody_else_holds_is_gone_when_its_gradient_comes(options) -> None:
    layer = wrap(nn.Sequential(nn.Linear(256, 8)), Plain(), torch.float32)
    config = LoraConfig(r=4, target_modules=["0"], **options)
    use_fused_layers(config)
    made = inject_adapter_in_model(config, layer).train()
    x, dy = torch.randn(1024, 256, requires_grad=True), torch.randn(1024, 8)
    results(made, x[:64].detach())
    found: list[torch.Tensor] = []

    def run() -> None:
        y = made(x.clone())  # whose gradient is that of x
        found.extend(torch.autograd.grad(y, x, dy))

    assert x.nbytes < peak_of(run) < 1.25 * x.nbytes
    assert found[0].shape == x.shape


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
def test_a_graph_that_is_kept_has_all_for_another_backward(options) -> None:
    made = adapted(True, **options)
    x = X.clone().requires_grad_()
    y = made(x * 1).sum()
    weights = [x, *(p for p in made.parameters() if p.requires_grad)]
    first = torch.autograd.grad(y, weights, retain_graph=True)
    again = torch.autograd.grad(y, weights)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize(("tokens", "kept"), [(25, True), (15, False)])
def test_under_autocast_the_input_is_as_large_as_it_is_computed_with(tokens, kept) -> None:
    """Not as it comes: in float32 it is twice as large."""
    layer = adapted(True, torch.bfloat16, master=torch.float32).train()[0]
    with torch.no_grad(), recomputing(), torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(tokens, 12))
    assert (layer.base_layer._kept is not None) == kept


@pytest.mark.parametrize("fused", [True, False])
def test_no_tokens_at_all(fused) -> None:
    """As an expert may get that no token is routed to."""
    found = results(adapted(fused).train(), X[:, :0])
    assert found["x"].shape == (3, 0, 12)
    assert found["y"].shape == (3, 0, 8)
    assert not any(value.any() for value in found.values())


def test_a_kept_weight_is_dropped_when_the_base_changes() -> None:
    made = adapted(True)
    facade = made[0].base_layer
    for change in (
        lambda: facade.to(torch.float64),
        lambda: facade.load_state_dict(facade.state_dict()),
        lambda: forget_unfinished(made),
    ):
        with recomputing():
            facade.vendor_forward(X.repeat(100, *[1] * (X.ndim - 1)))
        assert facade._kept is not None
        change()
        assert facade._kept is None


def casts_once_a_step(made: nn.Module) -> None:
    x = X.bfloat16()
    with fused_layers(made) as training:
        before = made(x)
        with torch.no_grad():
            made[0].lora_B["default"].weight.mul_(3)
        assert torch.equal(made(x), before)
        training.refresh()
        changed = made(x)
    with fused_layers(made, keep_casts=False) as training:
        assert not training._casts
        assert torch.equal(made(x), changed)
    assert torch.equal(made(x), changed)
    assert not torch.equal(changed, before)


def test_while_it_trains_a_and_b_are_cast_once_a_step() -> None:
    casts_once_a_step(adapted(True, torch.bfloat16, master=torch.float32))


def test_an_adapter_switched_in_training_is_noticed() -> None:
    fused, stock = adapted(True), adapted(False)
    with fused_layers(fused):
        for enabled in (True, False, True):
            for made in (fused, stock):
                made[0].enable_adapters(enabled)
            assert torch.allclose(fused(X), stock(X), rtol=1e-12)


# What a later PEFT may do -------------------------------------------------------------------------


@dataclass
class LaterConfig(LoraConfig):
    """LoRA with an option that is not there yet, and that changes the forward."""

    gain: float | None = None
    names: list[str] = field(default_factory=list)


@pytest.mark.parametrize(
    ("options", "fused"),
    [({}, True), ({"gain": 2.0}, False), ({"names": ["a"]}, False), ({"names": []}, True)],
)
def test_an_option_that_is_not_known_is_left_to_peft(options, fused) -> None:
    config = LaterConfig(r=4, target_modules=["0", "2"], **options)
    use_fused_layers(config)
    made = inject_adapter_in_model(config, model())
    assert all(isinstance(m, FusedLoraLinear) == fused for m in (made[0], made[2]))


def test_so_is_a_part_that_is_not_known(monkeypatch) -> None:
    """A PEFT that multiplies what an adapter adds by a gain that its layer keeps."""
    made = adapted(fused=True)
    layer, x = made[0], torch.randn(3, 12, dtype=torch.float64)
    plain = layer(x)
    forward = Linear.forward

    def gained(self, x, *args, **kwargs):
        base = self.base_layer(x)
        return base + (forward(self, x, *args, **kwargs) - base) * self.gain["default"]

    monkeypatch.setattr(Linear, "forward", gained)
    layer.other_param_names = (*layer.other_param_names, "gain")
    layer.gain = {"other": 2.0}
    assert torch.equal(layer(x), plain)
    layer.gain = {"default": 3.0}
    expected = layer.base_layer(x) + 3 * (plain - layer.base_layer(x))
    assert torch.allclose(layer(x), expected, rtol=1e-12)


def test_what_the_installed_peft_has_is_known() -> None:
    """If this fails, PEFT has something new: see whether its forward does, and name it there."""
    assert {option.name for option in fields(LoraConfig)} <= _KNOWN_OPTIONS
    layer = adapted(fused=True)[0]
    assert {*layer.adapter_layer_names, *layer.other_param_names} <= _KNOWN_PARTS


@pytest.mark.cuda
@pytest.mark.parametrize(("rank", "columns", "rows"), [(16, 4096, 1024), (12, 5000, 300)])
def test_what_is_added_to_one_token_is_lora(rank: int, columns: int, rows: int) -> None:
    from quantadapt.adapting.triton_lora import add_to_one_token

    generator = torch.Generator("cuda").manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        numbers = torch.randn(*shape, generator=generator, device="cuda")
        return numbers.bfloat16()

    x, a, b, y = drawn(columns), drawn(rank, columns), drawn(rows, rank), drawn(rows)
    expected = y.double() + 0.5 * b.double() @ (a.double() @ x.double())
    add_to_one_token(y, x, a, b, 0.5)
    assert float((y.double() - expected).norm() / expected.norm()) < 4e-3
