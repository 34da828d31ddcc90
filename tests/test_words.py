"""One token times weights whose codes lie in 32-bit words, as they are held.

The kernel runs on CUDA. Triton's interpreter runs it on a CPU, where TRITON_INTERPRET says so
before Triton is imported.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from interpreted import calls_of, cuda_tests_interpreted
from torch import nn

from quantadapt.facade import QuantLinear
from quantadapt.protocols import WordCodes
from quantadapt.registry import registry
from quantadapt.testing.tensors import relative

BF16 = torch.bfloat16
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
TOLERANCES = {torch.float32: 1e-6, BF16: 5e-3 if DEVICE == "cuda" else 1e-2}
"""Of bfloat16, what rounding the outputs takes; the interpreter cuts them off instead."""

LAYERS: list[tuple[str, dict[str, Any]]] = [
    *(("gptq", {"bits": bits, "group_size": 64}) for bits in (2, 3, 4, 8)),
    ("gptq", {"sym": False, "group_size": 16}),
    ("gptq", {"bits": 3, "sym": False, "group_size": -1}),
    *(("awq", {"group_size": size}) for size in (16, 64, -1)),
    ("awq", {"sym": True}),
    *(("autoround", {"bits": bits, "group_size": 64}) for bits in (2, 3, 4, 8)),
    ("autoround", {"bits": 3, "sym": False, "group_size": None}),
    ("autoround", {"sym": False, "group_size": 48}),
    ("compressed-tensors", {"scheme": "W4A16"}),
    ("compressed-tensors", {"scheme": "W8A16"}),
    ("compressed-tensors", {"scheme": "W4A16_ASYM", "group_size": 64}),
    *(("compressed-tensors", {"scheme": scheme}) for scheme in ("NVFP4A16", "MXFP4A16")),
    *((name, {}) for name in ("nvfp4", "mxfp4")),
    *(("inc", {"method": "rtn", "bits": bits}) for bits in (2, 4, 8)),
]
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def made(
    backend: str, sizes: tuple[int, int], device: str = "cpu", bias: bool = True, **options: Any
) -> tuple[Any, Any]:
    """Return a quantizer, and the layer that it makes of random weights."""
    torch.manual_seed(0)
    quantizer: Any = registry().backend(backend).quantizer(**options)
    linear = nn.Linear(*sizes, bias=bias, device=device, dtype=BF16).requires_grad_(False)
    return quantizer, quantizer.quantize_linear(linear)


def unpacked(words: torch.Tensor, bits: int, interleaved: bool) -> torch.Tensor:
    """Return the codes along the first dimension, bit by bit, int64."""
    places = torch.arange(32, device=words.device)[:, None]
    bit = (words.long()[:, None] >> places) & 1
    bit = bit.flatten(0, 1).unflatten(0, (-1, bits))
    codes = (bit << places[:bits]).sum(1)
    if interleaved:  # a word has 0, 2, 4, 6, 1, 3, 5, 7
        codes = codes.unflatten(0, (-1, 2, 4)).transpose(1, 2).flatten(0, 2)
    return codes


def weight_of(codes: WordCodes) -> torch.Tensor:
    """Return what codes stand for, float64 [out_features, in_features]."""
    words = codes.held.t() if codes.along_outputs else codes.held
    held = unpacked(words, codes.bits, codes.interleaved)
    held = held if codes.along_outputs else held.t()
    scale, zero = codes.scale.t().float(), torch.tensor(codes.zero, device=held.device)
    zero = zero.expand(scale.shape)
    if codes.zeros is not None:
        zero = zero + unpacked(codes.zeros.t(), codes.bits, codes.interleaved)
    each = {"repeats": codes.group_size, "dim": 1}
    zero, scale = zero.repeat_interleave(**each), scale.double().repeat_interleave(**each)
    if codes.divisor is not None:
        scale /= codes.divisor.double().view(-1, 1)
    numbers = torch.tensor(E2M1, device=held.device)[held] if codes.floats else held - zero
    return numbers.double() * scale


@pytest.mark.parametrize(("backend", "options"), LAYERS)
def test_codes_in_words_are_the_weight(backend, options):
    sizes = (384 if options.get("group_size") == 48 else 256, 96)
    quantizer, vendor = made(backend, sizes, **options)
    weight = quantizer.target.dequantize(vendor)
    found = weight_of(quantizer.target.word_codes(vendor))
    # Scales are of 16 bits, and so are products with them where the vendor computes in these.
    assert relative(found.to(weight.dtype), weight) < 1e-3
    assert quantizer.target.byte_codes(vendor) is None


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("compressed-tensors", {"scheme": "W8A8"}),
        ("compressed-tensors", {"scheme": "MXFP8A16"}),
        ("hqq", {"bits": 3}),
        ("inc", {"method": "rtn", "bits": 3}),
        ("inc", {"method": "rtn", "symmetric": False}),
        ("inc", {}),
        ("bnb-nf4", {}),
    ],
)
def test_others_have_none(backend, options):
    quantizer, vendor = made(backend, (256, 96), **options)
    assert quantizer.target.word_codes(vendor) is None


def test_experts_with_scales_of_their_own_divide_by_row():
    """A stack in NVFP4 has a global scale for each row, where those of experts differ."""
    quantizer, first = made("nvfp4", (64, 32), bias=False)
    second = quantizer.quantize_linear(nn.Linear(64, 32, bias=False).requires_grad_(False))
    second.weight_global_scale = second.weight_global_scale / 2
    stack = quantizer.join_rows([first, second])
    codes = quantizer.target.word_codes(stack)
    assert codes.divisor.shape == (64,)
    assert relative(weight_of(codes), quantizer.target.dequantize(stack).double()) < 1e-6


def test_scattered_groups_have_none():
    quantizer, vendor = made("gptq", (256, 96), group_size=64)
    vendor.desc_act = True
    assert quantizer.target.word_codes(vendor) is None


def multiplies(
    shape: tuple[int, int],
    tokens: int,
    bias: bool,
    dtype: torch.dtype,
    backend: str,
    **options: Any,
) -> None:
    """Compare the kernel's product with float64's, for exact codes and for the vendor's weight."""
    from quantadapt.facade.triton_words import product, takes

    quantizer, vendor = made(backend, shape, DEVICE, bias, **options)
    codes = quantizer.target.word_codes(vendor)
    x = torch.randn(1, tokens, shape[0], device=DEVICE).to(dtype)
    assert takes(codes, x)
    y = product(x, codes, vendor.bias)
    assert y.dtype == dtype
    assert y.shape == (1, tokens, shape[1])
    vendors = quantizer.target.dequantize(vendor).double()  # of 16 bits, mostly
    for weight, off in ((weight_of(codes), 0.0), (vendors, 1e-3)):
        wanted = x.double() @ weight.T + (vendor.bias.double() if bias else 0)
        assert relative(y.double(), wanted) < TOLERANCES[dtype] + off


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize(("backend", "options"), LAYERS)
def test_the_kernel_multiplies_tokens_with_them(backend, options, dtype):
    """A kernel for each size and dtype is made anew, which takes a second. That of bfloat16 is the
    one of the test of facades."""
    inputs = 384 if options.get("group_size") == 48 else 256 if dtype == BF16 else 4480
    tokens, outputs = (3, 96) if dtype == BF16 else (1, 32)
    multiplies((inputs, outputs), tokens, dtype == BF16, dtype, backend, **options)


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["gptq", "awq", "compressed-tensors"])
def test_the_kernel_goes_through_large_layers(backend):
    shape = (14336, 4128) if DEVICE == "cuda" else (14336, 64)
    multiplies(shape, 2, False, BF16, backend)


@pytest.mark.slow
def test_the_kernel_is_right_where_it_is_interpreted():
    said = cuda_tests_interpreted(__file__, "multiplies or goes")
    assert f"{2 * len(LAYERS) + 3} passed" in said, said[-3000:]


@pytest.mark.cuda
@pytest.mark.parametrize(("backend", "options"), LAYERS)
def test_a_facade_answers_few_tokens_by_the_kernel(monkeypatch, backend, options):
    from quantadapt.facade import triton_words

    calls = calls_of(triton_words, "product", monkeypatch)
    inputs = 384 if options.get("group_size") == 48 else 256
    quantizer, vendor = made(backend, (inputs, 96), "cuda", **options)
    facade = QuantLinear(vendor, quantizer.target, BF16)
    weight = facade.dequantize().double()
    with torch.no_grad():
        for tokens, training, called in ((1, False, 1), (1, True, 0), (4, False, 1), (5, False, 0)):
            calls.clear()
            x = torch.randn(1, tokens, inputs, device="cuda", dtype=BF16)
            y = facade.train(training)(x)
            assert len(calls) == called
            wanted = x.double() @ weight.T + facade.bias.double()
            assert relative(y.double(), wanted) < 6e-3
