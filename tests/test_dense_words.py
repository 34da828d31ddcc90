"""Weights out of 32-bit words, by the kernel for CUDA: to the bit what codes and scales say."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from interpreted import interpreted
from quantadapt_autoround.layers import pack_codes
from quantadapt_gptqmodel.codes import AWQ_ORDER, IN_ORDER, pack
from torch import nn

from quantadapt import compiling
from quantadapt.compiling import results_in
from quantadapt.dense_words import whole_words
from quantadapt.facade import QuantLinear
from quantadapt.registry import registry


@pytest.mark.parametrize(("bits", "across"), [(2, False), (4, False), (8, False), (4, True)])
@pytest.mark.parametrize(("rows", "columns", "groups"), [(16, 64, 1), (80, 384, 3), (160, 768, 24)])
def test_words_are_read_in_order(
    bits: int, across: bool, rows: int, columns: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interpreted: rows and columns that fill no program of the kernel, and rows alone."""
    kernel = interpreted("quantadapt.triton_dense", monkeypatch)
    generator = torch.Generator().manual_seed(rows + bits)
    codes = torch.randint(2**bits, (rows, columns), generator=generator)
    zeros = torch.randint(2**bits, (rows, groups), generator=generator)
    scales = (torch.randn(groups, rows, generator=generator) / 10).half()
    order = AWQ_ORDER if across else IN_ORDER
    packed = pack(codes.t(), bits, order) if across else pack_codes(codes, bits)
    tensors = packed, pack(zeros.t(), bits, order), scales
    size = columns // groups
    assert whole_words(bits, size, across)
    for added, dtype in ((0, None), (1, torch.float32), (1, torch.bfloat16)):
        away = (zeros + added).repeat_interleave(size, 1)
        exact = (codes - away) * scales.t().double().repeat_interleave(size, 1)
        expected = exact.float().half().to(dtype or torch.float16)
        found = kernel.dense_of_words(*tensors, bits, added, across, dtype)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    columns_first = [tensor.t().contiguous().t() for tensor in tensors]
    found = kernel.dense_of_words(*columns_first, bits, 1, across, torch.bfloat16)
    assert torch.equal(found, expected)
    first = 16
    words = slice(first * bits // 32, None)
    rest = packed[:, words if across else slice(first, None)]
    given = rest, tensors[1][:, words], scales[:, first:]
    found = kernel.dense_of_words(*given, bits, 1, across, torch.bfloat16)
    assert torch.equal(found, expected[first:])


@pytest.mark.parametrize(
    ("backend", "bits"),
    [("awq", 4), *((name, bits) for name in ("gptq", "autoround") for bits in (2, 4, 8))],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_are_read_so(
    backend: str, bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is on CUDA, but interpreted: what the facade reads is what the plain function gives."""
    linear = nn.Linear(256, 64, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    quantizer: Any = registry().backend(backend).quantizer(bits=bits, sym=False, group_size=64)
    layer = QuantLinear(quantizer.quantize_linear(linear), quantizer.target, dtype)
    expected = layer.dequantize()
    interpreted("quantadapt.triton_dense", monkeypatch)
    by_hand = []

    def run(written: Any, tensors: Any, static: Any) -> torch.Tensor:
        by_hand.append(written(*tensors, *static, compiling._dtype()))
        return by_hand[-1]

    monkeypatch.setattr(compiling, "_by_hand", run)
    found = layer.dequantize()
    assert found is by_hand[0]  # in the wanted dtype and layout: there is no second pass
    assert torch.equal(found, expected)
    assert torch.equal(layer.dequantize_rows(5, 41), expected[5:41])
    assert len(by_hand) == 2


def test_groups_that_share_words_are_left_to_the_compiler() -> None:
    assert not whole_words(3, 96, False)
    assert not whole_words(4, 4, False)
    assert not whole_words(8, 64, True)
    assert not whole_words(2, 24, False)
    assert whole_words(2, 32, False)


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("backend", "bits"),
    [("awq", 4), *((name, bits) for name in ("gptq", "autoround") for bits in (2, 4, 8))],
)
@pytest.mark.parametrize(("rows", "columns"), [(1056, 768), (64 * 96, 2048)])
def test_words_on_cuda(backend: str, bits: int, rows: int, columns: int) -> None:
    """As the plain function has it; no memory but the result's, in rows, and recorded, too."""
    generator = torch.Generator("cuda").manual_seed(0)
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    weight = torch.randn(rows, columns, device="cuda", generator=generator) / 50
    linear.weight = nn.Parameter(weight.bfloat16(), requires_grad=False)
    quantizer: Any = registry().backend(backend).quantizer(bits=bits)
    made, target = quantizer.quantize_linear(linear).to("cuda"), quantizer.target
    with patch.object(compiling, "_by_hand", lambda *_: None):
        expected = target.dequantize(made).bfloat16()
    with results_in(torch.bfloat16):
        found = target.dequantize(made)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, expected)
        assert torch.equal(target.dequantize_rows(made, 48, 1000), expected[48:1000])
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        again = target.dequantize(made)
        assert torch.cuda.max_memory_allocated() - before <= again.nbytes + 2**21
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorded = target.dequantize(made)
        made.qweight.fill_(0x33333333)
        graph.replay()
        assert torch.equal(recorded, target.dequantize(made))
        assert not torch.equal(recorded, expected)
