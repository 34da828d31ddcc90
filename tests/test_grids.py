"""The values that a backend's scales allow: rounded to, and packed, bit for bit."""

import re
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import quantadapt_torchao
import torch
from quantadapt_bnb.four_bit import FP4, NF4
from quantadapt_bnb.int8 import Int8
from quantadapt_eetq import EETQ
from quantadapt_hqq import HQQ
from quantadapt_quanto import Quanto
from quantadapt_torchao import Float8, Int4, Intx
from quantadapt_torchao import Int8 as TorchAOInt8
from quantadapt_torchao.tiles import joined_tiles
from torch import nn

from quantadapt import compiling
from quantadapt.model.noise import fixed_noise
from quantadapt.protocols import CodebookGrid, UniformGrid, grids
from quantadapt.protocols.grids import _place

QUANTIZERS = [
    *(HQQ(bits=b, axis=a, group_size=g) for b in (1, 2, 3, 4, 8) for a, g in ((0, 64), (1, None))),
    *(HQQ(bits=b, group_size=32) for b in (1, 2, 3, 4, 8)),
    *(NF4(), FP4(), NF4(double_quant=False), FP4(quant_storage="bfloat16"), Int8(), EETQ()),
    *(TorchAOInt8(), Float8(), Int4(), Intx(bits=2), Intx(bits=8, group_size=32)),
    *(Quanto(weights=weights) for weights in ("int8", "int4", "int2", "float8")),
]
SIZES = [(64, 128), (7, 33)]


def quantized(quantizer, shape, dtype):
    linear = nn.Linear(shape[1], shape[0]).to(dtype).requires_grad_(False)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[1] = 0
    linear.weight.data = weight.to(dtype)
    return quantizer.quantize_linear(linear)


def shaken(weight, seed):
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    return weight.float() + 0.01 * noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda q: f"{type(q).__module__}-{q!r}")
def test_grid_and_repack(quantizer, dtype):
    target = quantizer.target
    for shape in SIZES:
        if quantizer.misfit(shape[1], shape[0]):
            continue
        module = quantized(quantizer, shape, dtype)
        grid, kept = target.grid(module), target.dequantize(module)
        assert grid.dtype == kept.dtype
        assert torch.equal(grid.nearest(kept), kept)
        weight = shaken(kept, 1)
        rounded = grid.nearest(weight)
        assert torch.equal(grid.nearest(weight[:, 3:20], slice(3, 20)), rounded[:, 3:20])
        packed = target.repack(module, weight)
        assert torch.equal(target.dequantize(packed), rounded)
        assert torch.equal(target.dequantize(module), kept)
        assert torch.equal(target.dequantize(target.repack(packed, kept)), kept)
        slack = torch.finfo(dtype).eps * weight.abs().max()
        for seed in (2, 3, 4):
            other = grid.nearest(shaken(weight, seed)).float()
            assert ((rounded.float() - weight).abs() <= (other - weight).abs() + slack).all()
        none = torch.zeros(shape)
        assert torch.equal(grid.dithered(kept, none), kept)
        assert torch.equal(grid.nearest(grid.dithered(kept, none + 0.003)).float(),
                           grid.dithered(kept, none + 0.003).float())  # fmt: skip


@pytest.mark.parametrize(
    ("quantizer", "bits"),
    [(HQQ(), 4), (HQQ(bits=2), 2), (NF4(), 4), (FP4(), 4), (Int8(), 8), (Float8(), 6),
     (Quanto(weights="int4"), 4), (Intx(bits=3), 3)],
    ids=lambda value: repr(value),
)  # fmt: skip
def test_dithering_keeps_changes_far_below_a_step(quantizer, bits):
    """Its mean is what was asked for, in both directions; to nearest, much of it is lost."""
    module = quantized(quantizer, (256, 512), torch.float32)
    target = quantizer.target
    grid, start = target.grid(module), target.dequantize(module)
    inner = start.abs() < start.abs().amax(1, keepdim=True) * 0.5
    inner[1] = False
    for change in (0.012 / 2**bits, -0.012 / 2**bits):  # a tenth of a step
        changed = grid.dithered(start, torch.full_like(start, change))
        assert abs((changed - start)[inner].mean() / change - 1) < 0.1
        nearest = (grid.nearest(start + change) - start)[inner].mean()
        assert abs(nearest) < 0.5 * abs(change)


@pytest.mark.parametrize("quantizer", [HQQ(bits=3), NF4(), FP4(), Int8(), Float8(), Intx(bits=3),
                         Quanto(weights="int4")], ids=lambda value: repr(value))  # fmt: skip
def test_dithering_is_one_kernel(quantizer):
    """Its operations, traced as for CUDA, give the same bits."""
    module = quantized(quantizer, (64, 128), torch.bfloat16)
    grid, start = quantizer.target.grid(module), quantizer.target.dequantize(module)
    change = shaken(torch.zeros(64, 128), 1)
    expected = grid.dithered(start, change)
    with (
        patch.object(compiling, "_kernels", {}),
        patch.object(compiling, "_active", True),
        patch.object(compiling, "_gains", lambda packed: True),
        patch.object(compiling, "_compile", lambda *a: lambda *t: compiling.traced(*a)(*t)[0]),
    ):
        assert torch.equal(grid.dithered(start, change), expected)


@pytest.mark.slow
def test_kernels_compute_noise_in_32_bits(monkeypatch):
    """Inductor would multiply the columns of groups by constants beyond that, which Triton does not
    take."""
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.graph import GraphLowering

    class Written(Exception):
        pass

    def written(graph):
        raise Written(str(graph.codegen()[0].value))

    module = quantized(HQQ(), (96, 256), torch.bfloat16)
    grid, start = HQQ().target.grid(module), HQQ().target.dequantize(module)
    given = []
    monkeypatch.setattr(grids, "one_kernel", lambda f, *t, static: given.append((f, t, static)))
    monkeypatch.setattr(grids, "_KEPT", 0)
    monkeypatch.setattr(GraphLowering, "compile_to_module", written)
    grid.dithered(start, torch.zeros(96, 256))
    ((function, tensors, static),) = given
    with torch.no_grad(), pytest.raises(Exception, match="Written") as found:
        compile_fx_inner(compiling.traced(function, tensors, static), [*tensors])
    numbers = [int(digits) for digits in re.findall(r"(?<![\w.])\d{10,}", str(found.value))]
    assert 2**32 - 0x85EBCA77 in numbers
    assert max(numbers) < 2**31


def test_noise_is_even_and_without_a_pattern():
    noise = fixed_noise(300, 500, device=torch.device("cpu")).double()
    assert noise.min() > -0.5
    assert noise.max() < 0.5
    counts = torch.histc(noise, 20, -0.5, 0.5) / noise.numel()
    assert (counts - 0.05).abs().max() < 0.002
    singular = torch.linalg.svdvals(noise - noise.mean())  # as of independent numbers
    assert singular[0] < 1.1 * (300**0.5 + 500**0.5) * 12**-0.5
    assert torch.equal(fixed_noise(7, 5, device=torch.device("cpu")).double(), noise[:7, :5])


def test_repacked_goes_on_as_a_module():
    """Its own forward, its state, and what a first forward has moved (int8)."""
    for quantizer in (HQQ(), NF4(), Int8(), TorchAOInt8(), Quanto(), EETQ()):
        module = quantized(quantizer, (64, 128), torch.float32).eval()
        target, x = quantizer.target, torch.randn(9, 128)
        target.forward(module, x)
        packed = target.repack(module, shaken(target.dequantize(module), 1))
        dense = x @ target.dequantize(packed).T + packed.bias
        error = (target.forward(packed, x) - dense).norm() / dense.norm()
        assert error < (0.02 if target.quantizes_activations else 1e-5)
        assert packed.state_dict().keys() == module.state_dict().keys()


def test_uniform_grid_by_brute_force():
    """Groups of neighbours, and a group for each column: against all values there are."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(6, 4, generator=generator) + 0.1
    zero = torch.randint(0, 8, (6, 4), generator=generator)
    weight = torch.randn(6, 32, generator=generator)
    order = torch.arange(4).repeat(8)
    for groups in (None, order):
        column = torch.arange(4).repeat_interleave(8) if groups is None else order
        grid = UniformGrid(scale=scale, zero=zero, group_size=8, dtype=torch.float32, groups=groups,
                           lowest=0, highest=7)  # fmt: skip
        every = (torch.arange(8) - zero[:, column, None]) * scale[:, column, None]
        best = (every - weight[..., None]).abs().argmin(-1, keepdim=True)
        assert torch.equal(grid.nearest(weight), every.gather(-1, best)[..., 0])
        part = slice(5, 11)
        assert torch.equal(grid.nearest(weight[:, part], part), grid.nearest(weight)[:, part])


def test_codebook_grid_by_brute_force():
    generator = torch.Generator().manual_seed(0)
    levels = torch.randn(16, generator=generator)
    levels[3] = torch.nan  # a code that is none
    scale, weight = torch.rand(6, 4, generator=generator), torch.randn(6, 32, generator=generator)
    grid = CodebookGrid(scale=scale, group_size=8, dtype=torch.float32, levels=levels)
    every = levels[levels.isfinite()] * scale.repeat_interleave(8, 1)[..., None]
    best = (every - weight[..., None]).abs().argmin(-1, keepdim=True)
    assert torch.equal(grid.nearest(weight), every.gather(-1, best)[..., 0])


def test_float8_keeps_a_row_of_zeros():
    """Its scale would be 0, and the row 0 / 0."""
    for dtype in (torch.float32, torch.bfloat16):
        module = quantized(Float8(), (64, 128), dtype)
        assert torch.equal(Float8().target.dequantize(module)[1], torch.zeros(128, dtype=dtype))


def test_tiles_for_tensor_cores_hold_what_is_packed():
    """torchao's layout for CUDA, whose arithmetic is plain and runs anywhere; 64 of its columns are
    padding."""
    from torchao.quantization import Int4TilePackedTo4dTensor

    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(-(2**31), 2**31, (4, 2, 32, 4), generator=generator).to(torch.int32)
    scale = torch.rand(4, 32, 1, generator=generator) * 0.01 + 0.001
    parts = torch.cat([scale, torch.randn(4, 32, 1, generator=generator) * 0.01], -1).bfloat16()
    module = nn.Linear(192, 32, bias=False, device="meta")
    shape = torch.Size((32, 192))
    module.weight = nn.Parameter(Int4TilePackedTo4dTensor(packed, parts, [1, 64], shape), False)
    target = Int4().target
    grid, kept = target.grid(module), target.dequantize(module)
    assert torch.equal(grid.nearest(kept), kept)
    assert torch.equal(grid.dithered(kept, torch.zeros(shape)), kept)
    changed = target.repack(module, shaken(kept, 1))
    assert torch.equal(target.dequantize(changed), grid.nearest(shaken(kept, 1)))
    again = target.repack(changed, kept).weight.qdata
    assert torch.equal(again, packed)


def test_tiles_are_joined_by_rows() -> None:
    from torchao.quantization import Int4TilePackedTo4dTensor

    generator = torch.Generator().manual_seed(0)
    parts = []
    for rows in (32, 32, 8):
        packed = torch.randint(-(2**31), 2**31, (rows // 8, 2, 32, 4), generator=generator)
        scales = torch.randn(4, rows, 2, generator=generator).bfloat16()
        shape = torch.Size((rows, 192))
        parts.append(Int4TilePackedTo4dTensor(packed.to(torch.int32), scales, [1, 64], shape))
    modules = [SimpleNamespace(weight=weight) for weight in (*parts, joined_tiles(parts))]
    *found, joined = [Int4().target.dequantize(module) for module in modules]
    assert torch.equal(joined, torch.cat(found))


@pytest.mark.cuda
def test_in_parts_weights_go_into_the_same_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(1032, 768, device="cuda", dtype=torch.bfloat16, generator=generator)
    made = []
    for part in (2**26, 2**18):
        monkeypatch.setattr(quantadapt_torchao, "PART", part)
        linear = nn.Linear(768, 1032, bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        made.append(Int4().quantize_linear(linear))
    whole, parts = (module.weight for module in made)
    assert torch.equal(whole.qdata, parts.qdata)
    assert torch.equal(whole.scale_and_zero, parts.scale_and_zero)
    x = torch.randn(5, 768, device="cuda", dtype=torch.bfloat16, generator=generator)
    assert torch.equal(made[0](x), made[1](x))


def test_numbers_are_looked_up_where_edges_lie() -> None:
    """All of float8 and of nf4, at the edges, one number off them, and at both zeros."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    nf4 = NF4().target.grid(quantized(NF4(), (64, 128), torch.float32)).levels
    for levels in (codes[codes.isfinite()].unique(), nf4, torch.tensor([-1.0, 1.0])):
        edges = torch.cat([(levels[1:] + levels[:-1]) / 2, torch.tensor([torch.inf] * 3)])
        ends = torch.tensor([-torch.inf, torch.inf])
        near = [edges, edges.nextafter(ends[0]), edges.nextafter(ends[1]), -edges, levels, ends,
                torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3e38])]  # fmt: skip
        numbers = torch.cat([*near, torch.randn(2**14) * levels.abs().max()])
        assert grids._buckets(tuple(edges.tolist())) is not None
        assert torch.equal(_place(numbers, edges), torch.bucketize(numbers, edges))
    close = torch.tensor([1.0, 1.0001])
    assert grids._buckets(tuple(close.tolist())) is None
    numbers = torch.linspace(0.9, 1.1, 2**15)
    assert torch.equal(_place(numbers, close), torch.bucketize(numbers, close))


@pytest.mark.parametrize("count", [3, 16, 200])
def test_few_and_many_levels_are_found_alike(count):
    """Between the levels, on the edges, far outside and where a level is no number."""
    levels = torch.randn(count, generator=torch.Generator().manual_seed(count))
    levels[1] = torch.nan
    grid = CodebookGrid(scale=torch.ones(2, 1), group_size=64, dtype=torch.float32, levels=levels)
    known = levels[levels.isfinite()].sort().values
    edges = (known[1:] + known[:-1]) / 2
    wanted = torch.cat(
        [known, edges, edges.nextafter(torch.tensor(9.0)), torch.tensor([-99, 99.0])]
    )
    wanted = wanted[torch.arange(128) % len(wanted)].view(2, 64)
    assert torch.equal(_place(wanted, edges), torch.bucketize(wanted, edges))
    many = wanted.repeat(128, 1)  # which are looked up
    assert torch.equal(_place(many, edges), torch.bucketize(many, edges))
    nearest = (wanted.view(-1, 1) - known).abs().min(1).values.view(2, 64)
    torch.testing.assert_close((grid.nearest(wanted) - wanted).abs(), nearest, rtol=0, atol=1e-6)
    assert torch.equal(
        grid.dithered(grid.nearest(wanted), torch.zeros(2, 64)), grid.nearest(wanted)
    )
