"""One token times codes in bytes that are held otherwise than row by row with a scale for each:
in blocks, or as a vendor's kernels want them; and inputs that are rounded by one kernel.

Kernels run on CUDA. Triton's interpreter runs them on a CPU, where TRITON_INTERPRET says so before
Triton is imported.
"""

from __future__ import annotations

import os
from itertools import product
from typing import Any

import pytest
import torch
from interpreted import calls_of, cuda_tests_interpreted, interpreted
from torch import nn

from quantadapt.facade import QuantLinear
from quantadapt.protocols import ByteCodes
from quantadapt.registry import registry
from quantadapt.testing.tensors import relative

BF16 = torch.bfloat16
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
SIZES = (320, 192)
"""Inputs and outputs: the last block of a row, and the last row of blocks, are cut off."""
TOLERANCES = {torch.float32: 1e-6, BF16: 5e-3}

LAYERS: list[tuple[str, dict[str, Any]]] = [
    ("eetq", {}),
    *(("finegrained-fp8", {"scale_fmt": scales}) for scales in ("float", "ue8m0")),
    ("finegrained-fp8", {"weight_block_size": None}),
    *(
        ("compressed-tensors", {"scheme": scheme})
        for scheme in ("W8A8", "FP8_DYNAMIC", "MXFP8A16", "MXFP8")
    ),
    ("compressed-tensors", {"scheme": "W4A8", "group_size": 64}),
    *(("inc", {"fp8_format": kind}) for kind in ("e4m3", "e5m2")),
]


def made(
    backend: str, device: str = "cpu", dtype: torch.dtype = BF16, **options: Any
) -> tuple[Any, Any]:
    """Return a quantizer, and the layer that it makes of random weights."""
    torch.manual_seed(0)
    quantizer: Any = registry().backend(backend).quantizer(**options)
    linear = nn.Linear(*SIZES, device=device, dtype=dtype).requires_grad_(False)
    return quantizer, quantizer.quantize_linear(linear)


def weight_of(codes: ByteCodes) -> torch.Tensor:
    """Return what codes stand for, float64 [out_features, in_features], columns as they lie."""
    held, grid = codes.held, codes.grid
    if codes.run:
        pairs = held.view(len(held) // 2, -1, 2, codes.run)
        held = pairs.transpose(1, 2).reshape(held.shape)
    rows, columns = held.shape
    scale = grid.scale.float().double().repeat_interleave(codes.height, 0)[:rows]
    scale = scale.repeat_interleave(grid.group_size, 1)[:, :columns]
    return (held.float().double() - codes.zero) * scale


def multiplied(quantizer: Any, vendor: Any, x: torch.Tensor) -> torch.Tensor:
    """Return the product in float64 of what goes into a layer, rounded, and its weight."""
    target = quantizer.target
    seen = target.inputs_of_codes(vendor, x) if target.quantizes_activations else x
    return seen.double() @ target.dequantize(vendor).double().T + vendor.bias.double()


@pytest.mark.parametrize(("backend", "options"), LAYERS)
def test_codes_in_their_order_are_the_weight(backend, options):
    quantizer, vendor = made(backend, dtype=torch.float32, **options)
    target = quantizer.target
    x = torch.randn(1, SIZES[0])
    codes, given = target.byte_codes(vendor), target.inputs_of_codes(vendor, x)
    assert target.word_codes(vendor) is None
    found = given.double() @ weight_of(codes).T + vendor.bias.double()
    assert relative(found, multiplied(quantizer, vendor, x)) < 1e-6
    if target.quantizes_activations:
        assert 0 < relative(given, x) < (0.07 if options.get("fp8_format") == "e5m2" else 0.04)
        assert relative(found, target.forward(vendor, x).double()) < 6e-3


def test_zero_points_in_bytes_are_not_read():
    weights = {"num_bits": 8, "strategy": "channel", "symmetric": False}
    group = {"targets": ["Linear"], "weights": weights, "format": "int-quantized"}
    quantizer, vendor = made("compressed-tensors", scheme=None, config_groups={"group_0": group})
    assert quantizer.target.byte_codes(vendor) is None


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize(("backend", "options"), LAYERS)
def test_the_kernel_multiplies_a_token_with_them(monkeypatch, backend, options, dtype):
    if DEVICE == "cpu":  # it rounds to bfloat16, too
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
        kernel = interpreted("quantadapt.facade.triton_one_token", monkeypatch)
    else:
        from quantadapt.facade import triton_one_token as kernel
    quantizer, vendor = made(backend, DEVICE, dtype, **options)
    codes = quantizer.target.byte_codes(vendor)
    x = torch.randn(1, 1, SIZES[0], device=DEVICE).to(dtype)
    given = quantizer.target.inputs_of_codes(vendor, x)
    assert kernel.takes(codes, given)
    y = kernel.product(given, codes, vendor.bias)
    assert y.dtype == dtype
    assert relative(y.double(), multiplied(quantizer, vendor, x)) < TOLERANCES[dtype]


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize(("columns", "width"), [(256, 128), (300, 128), (5120, 5120), (64, 32)])
def test_inputs_are_rounded_by_one_kernel(monkeypatch, columns, width, dtype):
    """To the bit as in plain torch on a CPU. On a GPU that multiplies by a reciprocal for a scale,
    so that a number halfway between two codes may become the other one there."""
    from quantadapt_compressed_tensors import layers as compressed
    from quantadapt_finegrained_fp8 import layers as blocks

    if DEVICE == "cpu":
        interpreted("quantadapt.triton_rounding", monkeypatch)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, columns, generator=generator)
    x = x * (torch.rand(x.shape, generator=generator) * 20 - 14).exp2()
    x[0, 0] = 0
    x = x.to(DEVICE, dtype)
    both = [
        (module._by_group, module._by_one_kernel, powers)
        for module in (blocks,)
        for powers in (False, True)
    ]
    if columns % width == 0:
        both += [(compressed._by_own, compressed._by_one_kernel, kind) for kind in (False, True)]
    for plain, kernel, option in both:
        expected, found = plain(x.cpu(), width, option), kernel(x, width, option, None)
        assert found.dtype == dtype
        assert torch.equal(found.cpu(), expected)
    for wrong, powers in product((torch.nan, torch.inf, -torch.inf), (False, True)):
        x[1, 1, 1] = wrong
        found = blocks._by_one_kernel(x, width, powers, None)[1, 1]
        assert found[: min(width, columns)].isnan().all()  # and no number that hides it
        assert not found[width:].isnan().any()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_inputs_are_rounded_by_a_known_scale(monkeypatch, kind, dtype):
    """To the bit as in plain torch on a CPU."""
    from quantadapt_finegrained_fp8.layers import _by_known, _by_known_in_one_kernel
    from quantadapt_inc.fp8 import _by_one_kernel, _by_scale

    if DEVICE == "cpu":
        interpreted("quantadapt.triton_rounding", monkeypatch)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 1000, generator=generator)
    x = x * (torch.rand(x.shape, generator=generator) * 40 - 30).exp2()
    x[0, :5] = torch.tensor([0, torch.nan, torch.inf, -torch.inf, -0.0])
    scale = 3e-6 if kind == torch.float8_e5m2 else 0.011
    expected = _by_scale(x.to(dtype), scale, kind, dtype)
    found = _by_one_kernel(x.to(DEVICE, dtype), scale, kind, dtype, None).cpu()
    assert found.dtype == dtype
    assert torch.equal(found.nan_to_num(nan=-1), expected.nan_to_num(nan=-1))
    assert found.isnan().sum() == 1
    assert found[0, 2].item() == pytest.approx(torch.finfo(kind).max * scale, rel=4e-3)
    if kind == torch.float8_e4m3fn:  # which is held in memory there
        held = torch.tensor(scale)
        expected = _by_known(x.to(dtype), held)
        found = _by_known_in_one_kernel(x.to(DEVICE, dtype), held.to(DEVICE), None).cpu()
        assert found.dtype == dtype
        assert torch.equal(found.nan_to_num(nan=-1), expected.nan_to_num(nan=-1))


@pytest.mark.slow
def test_kernels_are_right_where_they_are_interpreted():
    said = cuda_tests_interpreted(__file__, "multiplies or rounded_by")
    assert f"{2 * len(LAYERS) + 16} passed" in said, said[-3000:]


@pytest.mark.cuda
@pytest.mark.parametrize(("backend", "options"), LAYERS)
def test_a_facade_answers_one_token_by_the_kernel(monkeypatch, backend, options):
    from quantadapt.facade import triton_one_token

    calls = calls_of(triton_one_token, "product", monkeypatch)
    quantizer, vendor = made(backend, "cuda", **options)
    facade = QuantLinear(vendor, quantizer.target, BF16)
    with torch.no_grad():
        for tokens, training, called in ((1, False, 1), (1, True, 0), (2, False, 0)):
            calls.clear()
            x = torch.randn(1, tokens, SIZES[0], device="cuda", dtype=BF16)
            y = facade.train(training)(x)
            assert len(calls) == called
            if tokens == 1:
                assert relative(y.double(), multiplied(quantizer, vendor, x)) < 6e-3
