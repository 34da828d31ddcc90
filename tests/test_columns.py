"""Columns times a trained factor: the kernels and what computes without them, against float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quantadapt.adapting import columns

CASES = [(70, 300, 5, True), (129, 128, 16, False), (1, 40, 100, True), (300, 513, 0, False)]
cases = pytest.mark.parametrize(("tokens", "width", "ranks", "bias"), CASES)
DTYPES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def drawn(tokens: int, width: int, ranks: int, bias: bool, dtype, device="cpu") -> dict:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype=dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    return {
        "z": draw(tokens, width),
        "c": draw(width, dtype=torch.float32),
        "low": draw(tokens, ranks) if ranks else None,
        "b": draw(width, ranks) if ranks else None,
        "scaling": 0.7,
        "bias": draw(width) if bias else None,
    }


def exact(z, c, low, b, scaling, bias) -> torch.Tensor:
    z, c, low, b, bias = (None if t is None else t.double() for t in (z, c, low, b, bias))
    y = z if low is None else z + scaling * low @ b.T
    return y * c if bias is None else y * c + bias


def assert_close(found: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    assert found.shape == expected.shape
    assert (found.double() - expected).norm() <= limit * expected.norm()


def check(given: dict) -> None:
    """Outputs and gradients, also where the one of z takes the place of what it is made from."""
    z, c, limit = given["z"], given["c"], DTYPES[given["z"].dtype]
    y = columns.scaled(**given)
    assert y.dtype == z.dtype
    assert_close(y, exact(**given), limit)
    dy = y.flip(0)
    for out in (None, "z", "dy"):
        parts = {"z": z.clone(), "dy": dy.clone()}
        dz, sums = columns.scaled_back(parts["dy"], parts["z"], c, parts.get(out))
        assert dz is parts.get(out, dz)
        assert sums.dtype == torch.float32
        assert_close(dz, dy.double() * c.double(), limit)
        assert_close(sums, (dy.double() * z.double()).sum(0), 3e-6)
        if out is None:
            assert torch.equal(parts["z"], z)
            assert torch.equal(parts["dy"], dy)


@dtypes
@cases
def test_without_kernels(tokens, width, ranks, bias, dtype, monkeypatch) -> None:
    monkeypatch.setattr(columns, "CHUNK", 1000)  # so that there are several
    check(drawn(tokens, width, ranks, bias, dtype))


def interpreted() -> None:
    """What a process does in which Triton interprets its kernels."""
    from quantadapt.adapting import triton_columns as kernels

    columns._on_cuda = lambda _: True
    kernels.MOST_PARTS = 2  # so that one has more rows than usual
    for case in CASES:
        for dtype in (torch.float32, torch.float16):  # products of bfloat16 it computes wrongly
            check(drawn(*case, dtype))


def test_kernels_as_tritons_interpreter_runs_them() -> None:
    pytest.importorskip("triton", reason="triton comes with CUDA builds of torch")
    code = "from tests.test_columns import interpreted; interpreted(); print('checked')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "checked", done.stderr


@pytest.mark.cuda
@dtypes
@pytest.mark.parametrize(
    ("tokens", "width", "ranks", "bias"),
    [*CASES, (8192, 14336, 16, False), (70000, 256, 128, True)],
)
def test_kernels(tokens, width, ranks, bias, dtype) -> None:
    check(drawn(tokens, width, ranks, bias, dtype, "cuda"))


def test_float64_is_computed_in_float64() -> None:
    given = {
        name: value.double() if isinstance(value, torch.Tensor) else value
        for name, value in drawn(70, 30, 5, True, torch.float32).items()
    }
    assert_close(columns.scaled(**given), exact(**given), 1e-14)
    z, c = given["z"], given["c"]
    dz, sums = columns.scaled_back(z.flip(0), z, c)
    assert_close(dz, z.flip(0) * c, 1e-15)
    assert_close(sums, (z.flip(0) * z).sum(0), 1e-14)
    assert sums.dtype == torch.float64
