"""torchao: which live models and checkpoints are adopted, and what tiles stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreted import interpreted
from quantadapt_torchao import Int4, Int8, Intx
from quantadapt_torchao.tiles import repacked_tiles
from torch import nn
from torchao import quantization
from transformers import TorchAoConfig

from quantadapt import compiling
from quantadapt.compiling import results_in
from quantadapt.facade import QuantLinear


@pytest.mark.parametrize(
    ("config", "quantizer"),
    [
        (quantization.Int8WeightOnlyConfig(version=2), Int8()),
        (quantization.Int8DynamicActivationInt8WeightConfig(version=2), None),
        (
            quantization.IntxWeightOnlyConfig(
                weight_dtype=torch.int4, granularity=quantization.PerGroup(32)
            ),
            Intx(group_size=32),
        ),
        (
            quantization.Int8DynamicActivationIntxWeightConfig(
                weight_dtype=torch.int4, weight_granularity=quantization.PerGroup(32)
            ),
            None,
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_weight_only_models_are_adopted(config, quantizer) -> None:
    """Facades would leave out the rounding of activations that others were made with."""
    model = nn.Sequential(nn.Linear(64, 64))
    quantization.quantize_(model, config)
    found = [kind.from_model(model) for kind in (Int8, Intx)]
    assert found == [quantizer if isinstance(quantizer, kind) else None for kind in (Int8, Intx)]
    if quantizer is None:
        assert Int4.from_model(model) is None


@pytest.mark.parametrize("size", [32, 4, None])
def test_groups_that_there_are_not_here(size) -> None:
    """Too small for an option, or a whole row."""
    grain = quantization.PerGroup(size) if size else quantization.PerAxis(0)
    config = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=grain)
    stored = TorchAoConfig(config).to_dict()
    found = [kind.from_checkpoint(stored) for kind in (Intx, Int4)]
    ours = [Intx(group_size=32), Int4(group_size=32, layout="unpacked")]
    assert found == (ours if size == 32 else [None, None])
    model = nn.Sequential(nn.Linear(24, 24))
    if size == 4:
        quantization.quantize_(model, config)
        assert [kind.from_model(model) for kind in (Intx, Int4)] == [None, None]


def random_tiles(
    rows: int, columns: int, size: int, words: int = 4
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tiles, scales and zeros, padded, and the weight in float64."""
    generator = torch.Generator().manual_seed(rows + columns + size)
    eights, tiles = -(-rows // 8), -(-columns // (32 * words))
    codes = torch.randint(16, (rows, columns), generator=generator)
    blank = torch.randint(-(2**31), 2**31, (eights, tiles, 32, words), generator=generator)
    groups = -(-tiles * 32 * words // size)
    parts = torch.randn(groups, 8 * eights, 2, generator=generator).bfloat16()
    scale, zero = parts[: columns // size, :rows].double().repeat_interleave(size, 0).unbind(-1)
    weight = (codes - 8) * scale.T + zero.T
    return repacked_tiles(blank.to(torch.int32), codes), parts, weight


@pytest.mark.parametrize("size", [32, 64, 128, 256])
@pytest.mark.parametrize(
    ("rows", "columns", "words"),
    [(8, 256, 1), (20, 512, 2), (40, 1024, 4), (3 * 48, 768, 4)],
)
def test_tiles_are_read_in_order(
    size: int, rows: int, columns: int, words: int, monkeypatch
) -> None:
    """The kernel for CUDA, interpreted: layers, and experts one below the other; rows and columns
    that fill no tile, no program of the kernel. To the bit, in each compute dtype."""
    kernel = interpreted("quantadapt_torchao.triton_tiles", monkeypatch)
    packed, parts, weight = random_tiles(rows, columns, size, words)
    expected = weight.float().bfloat16()
    for dtype in (None, torch.bfloat16, torch.float16, torch.float32):
        found = kernel.dense_of_tiles(packed, parts, rows, columns, size, dtype)
        assert found.dtype == (dtype or torch.bfloat16)
        assert torch.equal(found, expected.to(found.dtype))
    first, own = 8 * (rows // 16), parts[:, 8 * (rows // 16) :]
    given = packed[first // 8 :], own, rows - first, columns, size, None
    assert torch.equal(kernel.dense_of_tiles(*given), expected[first:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_in_tiles_are_read_so(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is on CUDA, but interpreted, whole and rows alone."""
    interpreted("quantadapt_torchao.triton_tiles", monkeypatch)
    packed, parts, weight = random_tiles(48, 768, 64)
    linear = nn.Linear(768, 48, bias=False, device="meta")
    tiles = quantization.Int4TilePackedTo4dTensor(packed, parts, [1, 64], torch.Size((48, 768)))
    linear.weight = nn.Parameter(tiles, requires_grad=False)
    layer = QuantLinear(linear, Int4().target, dtype)
    by_hand = []

    def run(written: Any, tensors: Any, static: Any) -> torch.Tensor:
        by_hand.append(written(*tensors, *static, compiling._dtype()))
        return by_hand[-1]

    monkeypatch.setattr(compiling, "_by_hand", run)
    expected = weight.float().bfloat16().to(dtype)
    found = layer.dequantize()
    assert found is by_hand[0]  # in the wanted dtype and layout: there is no second pass
    assert torch.equal(found, expected)
    assert torch.equal(layer.dequantize_rows(8, 40), expected[8:40])
    assert torch.equal(layer.dequantize_rows(3, 9), expected[3:9])


@pytest.mark.cuda
@pytest.mark.parametrize("size", [32, 64, 128, 256])
@pytest.mark.parametrize(("rows", "columns"), [(1032, 768), (128 * 96, 2048), (4096, 4096)])
def test_tiles_on_cuda(size: int, rows: int, columns: int) -> None:
    """To the bit what torchao's product with an identity matrix gives; no memory but the result's,
    in rows, and in what is recorded, too."""
    generator = torch.Generator("cuda").manual_seed(0)
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    weight = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16, generator=generator)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    quantizer = Int4(group_size=size)
    made, target = quantizer.quantize_linear(linear), quantizer.target
    one = torch.eye(columns, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = torch.cat([made(part) for part in one.split(256)]).T.contiguous()
    found = target.dequantize(made)
    assert torch.equal(found, expected)
    for dtype in (torch.float16, torch.float32):
        with results_in(dtype):
            assert torch.equal(target.dequantize(made), expected.to(dtype))
    half = rows // 16 * 8
    assert torch.equal(target.dequantize_rows(made, half, rows), expected[half:])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    again = target.dequantize(made)
    assert torch.cuda.max_memory_allocated() - before <= again.nbytes + 2**21
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = target.dequantize(made)
    made.weight.qdata.fill_(0x77777777)
    graph.replay()
    assert torch.equal(recorded, target.dequantize(made))
    assert not torch.equal(recorded, expected)
