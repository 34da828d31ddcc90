"""Training stops at a gradient that is no number, before it reaches the weights."""

from __future__ import annotations

import math

import pytest
import torch

from quantadapt.errors import TrainingError
from quantadapt.training.loop import GradientCheck


def adamw(device: str, fused: bool) -> torch.optim.AdamW:
    weight = torch.nn.Parameter(torch.ones(4, device=device))
    return torch.optim.AdamW([weight], lr=0.1, fused=fused)


@pytest.mark.parametrize("norm", [math.nan, math.inf, torch.tensor(math.nan)])
def test_a_bad_norm_stops_at_once_on_a_cpu(norm) -> None:
    check, optimizer = GradientCheck(), adamw("cpu", fused=True)
    check.see(torch.tensor(1.0), 1, optimizer)
    with pytest.raises(TrainingError, match="no number any more at step 2"):
        check.see(norm, 2, optimizer)


def step(check: GradientCheck, optimizer: torch.optim.AdamW, number: int, value: float) -> None:
    weight = optimizer.param_groups[0]["params"][0]
    weight.grad = torch.full_like(weight, value)
    check.see(weight.grad.norm(), number, optimizer)
    optimizer.step()


@pytest.mark.cuda
def test_a_fused_optimizer_skips_a_bad_step_and_the_error_follows() -> None:
    check, optimizer = GradientCheck(), adamw("cuda", fused=True)
    weight = optimizer.param_groups[0]["params"][0]
    step(check, optimizer, 1, 1.0)
    before = weight.detach().clone()
    assert float(before[0]) == pytest.approx(0.9 - 0.001, abs=1e-3)
    step(check, optimizer, 2, math.nan)
    assert torch.equal(weight, before)
    with pytest.raises(TrainingError, match="no number any more at step 2"):
        step(check, optimizer, 3, 1.0)
    check.settle()  # told once


@pytest.mark.cuda
def test_settling_waits_for_the_answer() -> None:
    check, optimizer = GradientCheck(), adamw("cuda", fused=True)
    step(check, optimizer, 1, 1.0)
    check.settle()
    step(check, optimizer, 2, math.inf)
    with pytest.raises(TrainingError, match="step 2"):
        check.settle()


@pytest.mark.cuda
def test_other_optimizers_are_waited_for() -> None:
    check, optimizer = GradientCheck(), adamw("cuda", fused=False)
    with pytest.raises(TrainingError, match="step 1"):
        step(check, optimizer, 1, math.nan)
