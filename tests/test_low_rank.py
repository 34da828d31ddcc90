"""VeRA and AdaLoRA as LoRA is computed, against PEFT's own forward."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from peft import AdaLoraConfig, VeraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from short_runs import losses
from torch import nn
from torch.utils.checkpoint import checkpoint

import quantadapt as qa
from quantadapt.adapting import low_rank
from quantadapt.adapting.low_rank import low_rank_layers
from quantadapt.testing.small_demo import small_model
from tests.test_fused import X, model, results

TARGETS = ["0", "2"]
KINDS = {
    "vera": lambda **kw: VeraConfig(r=4, target_modules=TARGETS, **kw),
    "adalora": lambda **kw: AdaLoraConfig(
        init_r=4, target_r=2, total_step=10, lora_alpha=12, target_modules=TARGETS, **kw
    ),
}
DROPOUT = {"vera": {"vera_dropout": 0.3}, "adalora": {"lora_dropout": 0.3}}
kinds = pytest.mark.parametrize("kind", KINDS)


def adapted(kind: str, bias: bool = True, dtype: torch.dtype = torch.float64, **options):
    """Two layers with an adapter whose numbers are all other than those it starts with."""
    made = get_peft_model(model(dtype, bias), KINDS[kind](**options)).train()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in made.named_parameters():
        if parameter.requires_grad:
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = drawn.to(torch.float32 if dtype == torch.bfloat16 else dtype)
        elif "ranknum" in name:
            parameter.data = parameter.data.double()
    for layer in made.modules():
        for key in ("vera_A", "vera_B") if isinstance(layer, BaseTunerLayer) else ():
            for name, value in getattr(layer, key, {}).items():
                getattr(layer, key)[name] = value.to(torch.float64)
    return made


def lending(made: nn.Module, calls: list | None = None, run=None):
    """The results of a pass in which the layers are lent their forward."""
    with (
        low_rank_layers(made) as count,
        patch.object(low_rank, "fused_lora", side_effect=low_rank.fused_lora) as fused,
    ):
        assert count == 2
        found = results(made, X, run)
    if calls is not None:
        calls.append(fused.call_count)
    return found


def stock(made: nn.Module, run=None):
    for parameter in made.parameters():
        parameter.grad = None
    return results(made, X, run)


def assert_close(found, expected, rtol: float = 1e-11) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.norm() > 0, name
        assert found[name].dtype == value.dtype
        assert (found[name] - value).norm() <= rtol * value.norm(), name


@kinds
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("drops", [True, False])
def test_it_is_peft_in_float64(kind, bias, drops) -> None:
    made, calls = adapted(kind, bias, **(DROPOUT[kind] if drops else {})), []
    found = lending(made, calls)
    assert calls == [2]
    assert_close(found, stock(made))


@kinds
def test_recomputed(kind) -> None:
    made = adapted(kind)

    def run(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(made, x, use_reentrant=False)

    assert_close(lending(made, run=run), stock(made))


@kinds
def test_passes_that_do_not_train_are_pefts_own(kind) -> None:
    made, expected = adapted(kind).eval(), {}
    for layer in made.modules():
        if isinstance(layer, BaseTunerLayer):
            expected[layer] = layer(torch.ones(layer.in_features, dtype=torch.float64))
    with low_rank_layers(made), patch.object(low_rank, "fused_lora") as fused:
        for layer, output in expected.items():
            assert torch.equal(layer(torch.ones(layer.in_features).double()), output)
        made.train()
        with torch.no_grad():
            made(X)
        assert fused.call_count == 0
    assert not any("forward" in vars(module) for module in made.modules())


@kinds
def test_few_tokens_keep_no_factors(kind) -> None:
    """Those of VeRA's default rank, 256, would be more than all that PEFT keeps of few tokens."""
    made, calls = adapted(kind), []

    def run(x: torch.Tensor) -> torch.Tensor:
        return made(x.flatten(0, -2)[:7])  # of rank 4

    found = lending(made, calls, run)
    assert calls == [0]
    assert_close(found, stock(made, run), rtol=0)


@kinds
def test_what_is_switched_off_or_several_is_pefts_own(kind) -> None:
    made = adapted(kind)
    layers = [m for m in made.modules() if isinstance(m, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    off = made(X)
    with low_rank_layers(made), patch.object(low_rank, "fused_lora") as fused:
        assert torch.equal(made(X), off)
        assert fused.call_count == 0
    for layer in layers:
        layer.enable_adapters(True)
    on = made(X)
    assert not torch.allclose(on, off)


@pytest.mark.parametrize("kind", ["vera", pytest.param("adalora", marks=pytest.mark.slow)])
def test_a_run_learns_what_pefts_own_layers_learn(kind) -> None:
    """In float32, step by step; AdaLoRA's budget and its loss are as they were."""

    def learnt(without: bool) -> list[float]:
        options = {"r": 8} if kind == "vera" else {}
        tuned = qa.attach(qa.quantize(str(small_model()), "hqq"), kind, **options)
        pefts = patch.object(low_rank, "_WAYS", {} if without else low_rank._WAYS)
        with pefts, patch.object(low_rank, "fused_lora", side_effect=low_rank.fused_lora) as fused:
            found = losses(tuned, 1e-2)
        assert bool(fused.call_count) is not without
        return found

    found, expected = learnt(False), learnt(True)
    assert found == pytest.approx(expected, rel=2e-4)
    assert expected[-1] != expected[0]
