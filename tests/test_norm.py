"""The backward of a norm with a frozen weight, against float64 and Liger's own."""

from __future__ import annotations

import os

import pytest
import torch
from interpreted import cuda_tests_interpreted
from torch import Tensor

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
MODES = {"llama": 0.0, "gemma": 1.0}


def drawn(rows: int, columns: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """x, the weight and a gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, columns), (columns,), (rows, columns)
    return [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]


def exact(x: Tensor, weight: Tensor, offset: float, dy: Tensor) -> Tensor:
    x = x.double().requires_grad_()
    y = x * (x.pow(2).mean(1, keepdim=True) + 1e-5).rsqrt() * (weight.double() + offset)
    (gradient,) = torch.autograd.grad(y, x, dy.double())
    return gradient


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.cuda
@pytest.mark.parametrize(("rows", "columns"), [(3, 1024), (2, 1100), (1, 5000)])
@pytest.mark.parametrize("offset", MODES.values())
@pytest.mark.parametrize("in_place", [True, False])
def test_the_kernel(rows, columns, offset, in_place) -> None:
    from quantadapt.model.triton_norm import norm_back

    x, weight, dy = drawn(rows, columns, torch.float32, DEVICE)
    factors = (x.pow(2).mean(1) + 1e-5).rsqrt()
    expected, given = exact(x, weight, offset, dy), dy.clone()
    dx = given if in_place else torch.empty_like(given)
    norm_back(given, x, weight, factors, offset, dx)
    assert error(dx, expected) < 3e-7
    assert in_place or torch.equal(given, dy)


@pytest.mark.slow
def test_the_kernel_as_tritons_interpreter_runs_it() -> None:
    pytest.importorskip("triton", reason="triton comes with CUDA builds of torch")
    assert "12 passed" in cuda_tests_interpreted(__file__, "the_kernel")


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("columns", [128, 1536, 4096])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("in_place", [True, False])
def test_it_is_as_exact_as_ligers(dtype, mode, columns, trained, in_place) -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is optional")
    from liger_kernel.ops import LigerRMSNormFunction

    from quantadapt.model.frozen_norm import FrozenNorm

    x, weight, dy = drawn(300, columns, dtype, "cuda")
    x.requires_grad_()
    weight.requires_grad_(trained)
    found = []
    for function in (FrozenNorm, LigerRMSNormFunction):
        y = function.apply(x, weight, 1e-5, MODES[mode], mode, in_place, None)
        wanted = (x, weight) if trained else (x,)
        found.append((y, *torch.autograd.grad(y, wanted, dy.clone())))
    ours, ligers = found
    same = len(ours) if trained else 1  # forward is Liger's, and all of it where it is trained
    assert all(map(torch.equal, ours[:same], ligers[:same]))
    right = exact(x.detach(), weight.detach(), MODES[mode], dy)
    assert error(ours[1], right) <= 1.01 * error(ligers[1], right) + 1e-7
