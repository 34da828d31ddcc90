"""IA3 as one function, against PEFT's own forward."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from peft import IA3Config, get_peft_model
from peft.tuners.ia3.layer import IA3Layer
from short_runs import losses
from torch import nn
from torch.utils.checkpoint import checkpoint

import quantadapt as qa
from quantadapt.adapting import fused_ia3
from quantadapt.adapting.fused_ia3 import ia3_layers
from quantadapt.testing.small_demo import small_model
from tests.test_fused import X, model, results
from tests.test_low_rank import assert_close, stock

feeds = pytest.mark.parametrize("feeds", [[], ["2"], ["0", "2"]], ids=str)


def adapted(feeds, bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Two layers, with factors that are all other than those they start with."""
    config = IA3Config(target_modules=["0", "2"], feedforward_modules=feeds)
    made = get_peft_model(model(dtype, bias), config).train()
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        if parameter.requires_grad:
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = drawn.to(torch.float32 if dtype.itemsize == 2 else dtype)
    return made


def lending(made: nn.Module, x=X, run=None, calls: int = 2):
    with ia3_layers(made) as count:
        assert count == 2
        with spied() as back:
            found = results(made, x, run)
        assert back.call_count == calls
    return found


def spied():
    return patch.object(fused_ia3, "scaled_back", side_effect=fused_ia3.scaled_back)


@feeds
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("x", [X, X[0], X[0, 0]], ids=["3-D", "2-D", "1-D"])
def test_it_is_peft_in_float64(feeds, bias, x) -> None:
    made = adapted(feeds, bias)
    found = lending(made, x)
    for parameter in made.parameters():
        parameter.grad = None
    assert_close(found, results(made, x))


@feeds
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed(feeds, reentrant) -> None:
    made = adapted(feeds)
    found = lending(made, run=lambda x: checkpoint(made, x, use_reentrant=reentrant))
    assert_close(found, stock(made))


@feeds
def test_x_without_a_gradient(feeds) -> None:
    made, found = adapted(feeds), []
    for lent in (True, False):
        made.zero_grad()
        with ia3_layers(made) if lent else torch.enable_grad():
            made(X).square().sum().backward()
        found.append({n: p.grad for n, p in made.named_parameters() if p.requires_grad})
    assert_close(*found)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@feeds
def test_half_precision_is_as_close_as_pefts(feeds, dtype, autocast, device) -> None:
    """Both against float64, from the same rounded weights."""
    made = adapted(feeds, dtype=dtype).to(device)
    exact = adapted(feeds).to(device)
    exact.load_state_dict({k: v.double() for k, v in made.state_dict().items()})
    x = X.to(device, dtype)
    expected, errors = results(exact, x.double()), []
    for run in (lending, stock_on):
        with torch.autocast(device, dtype, enabled=autocast):
            found = run(made, x)
        assert {v.dtype for n, v in found.items() if "ia3" in n} == {torch.float32}
        assert found["y"].dtype == dtype
        errors.append(
            {n: float((found[n].double() - v).norm() / v.norm()) for n, v in expected.items()}
        )
    for name, error in errors[0].items():
        assert error <= 1.3 * errors[1][name] + 1e-4, (name, error, errors[1][name])


def stock_on(made: nn.Module, x: torch.Tensor):
    for parameter in made.parameters():
        parameter.grad = None
    return results(made, x)


def saved_by(made: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        made(x.clone().requires_grad_())
    return [tensor for tensor in saved if tensor.numel() >= x.shape[:-1].numel()]


@pytest.mark.parametrize(("feeds", "width"), [([], 20), (["0"], 12)], ids=str)
def test_it_saves_what_is_scaled_and_nothing_else(feeds, width) -> None:
    x = X.repeat(9, 1, 1).bfloat16()
    made = adapted(feeds, dtype=torch.bfloat16)
    with ia3_layers(made):
        found = saved_by(made.base_model.model[0], x)
    assert [(t.shape[-1], t.dtype) for t in found] == [(width, torch.bfloat16)]


def test_its_output_may_be_overwritten() -> None:
    made, found = adapted([]), []
    for overwrites in (False, True):
        made.zero_grad()
        with ia3_layers(made):
            y = made(X.clone().requires_grad_())
        loss = (y * 3).sum()
        if overwrites:
            y.data.zero_()
        loss.backward()
        found.append({n: p.grad for n, p in made.named_parameters() if p.grad is not None})
    assert_close(*found)


def test_backward_may_run_twice() -> None:
    made = adapted(["2"])
    with ia3_layers(made):
        loss = made(X).square().sum()
    loss.backward(retain_graph=True)
    once = {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}
    loss.backward()
    assert_close({n: p.grad / 2 for n, p in made.named_parameters() if p.grad is not None}, once)


def test_what_does_not_train_or_is_switched_off_is_pefts_own() -> None:
    made = adapted(["2"])
    layers = [m for m in made.modules() if isinstance(m, IA3Layer)]
    expected = made(X)
    with ia3_layers(made), patch.object(fused_ia3, "scaled") as ours:
        assert torch.equal(made.eval()(X), expected)
        made.train()
        with torch.no_grad():
            assert torch.equal(made(X), expected)
        for layer in layers:
            layer.enable_adapters(False)
        off = made(X)
        assert not torch.allclose(off, expected)
        assert ours.call_count == 0
    assert not any("forward" in vars(module) for module in made.modules())


def test_a_run_learns_what_pefts_own_layers_learn() -> None:
    """In float32, step by step."""

    def learnt(without: bool) -> list[float]:
        base = qa.quantize(str(small_model()), "hqq")
        tuned = qa.attach(base, "ia3", feedforward_modules=["down_proj"])
        ways = patch.object(fused_ia3, "_WAYS", {} if without else fused_ia3._WAYS)
        with ways, spied() as ours:
            found = losses(tuned, 1e-1)
        assert bool(ours.call_count) is not without
        return found

    found, expected = learnt(False), learnt(True)
    assert found == pytest.approx(expected, rel=1e-5)
    assert expected[-1] != pytest.approx(expected[0], rel=1e-3)
