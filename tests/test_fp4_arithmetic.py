"""MXFP4 and NVFP4, number by number: against the definitions in float64, and against the packing of
compressed-tensors."""

import math
import struct

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import preset_name_to_scheme
from quantadapt_fp4 import MXFP4, NVFP4
from quantadapt_fp4 import arithmetic as fp4
from torch import nn

# The definitions ---------------------------------------------------------------------------------


def e2m1(code):
    """Return what the OCP says that four bits stand for: s ee m."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -size if sign else size


def e4m3(byte):
    """Return what eight bits stand for: s eeee mmm, bias 7, no infinities."""
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


def nearest(number):
    """Return the code of the nearest e2m1 number; the even one of two that are equally near."""
    sizes = [abs(e2m1(code)) for code in range(8)]
    away = [abs(min(abs(number), 6.0) - size) for size in sizes]
    best = [code for code in range(8) if away[code] == min(away)]
    size = next((code for code in best if code % 2 == 0), best[0])
    return size + 8 * (math.copysign(1, number) < 0)


CODES = torch.arange(16, dtype=torch.uint8)


def test_each_code_is_its_number():
    found = fp4.values_of(CODES)
    assert found.tolist() == [e2m1(code) for code in range(16)]
    assert math.copysign(1, found[8]) == -1
    assert torch.equal(fp4.codes_of(found), CODES)


def test_numbers_become_the_nearest_and_ties_the_even_one():
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    beside = [math.nextafter(t, to) for t in ties for to in (0.0, 9.0)]
    singles = [struct.unpack("f", struct.pack("f", number))[0] for number in beside]
    around = torch.tensor(ties).nextafter(torch.tensor(0.0)).tolist()
    around += torch.tensor(ties).nextafter(torch.tensor(9.0)).tolist()
    generator = torch.Generator().manual_seed(0)
    many = (torch.randn(500, generator=generator) * 3).tolist()
    numbers = [0.0, -0.0, 6.0, 6.1, 1e30, *ties, *singles, *around, *many, 1e-45]
    numbers += [-number for number in numbers]
    found = fp4.codes_of(torch.tensor(numbers)).tolist()
    assert found == [nearest(number) for number in numbers]
    assert fp4.codes_of(torch.tensor([math.inf, -math.inf])).tolist() == [7, 15]


def test_two_codes_share_a_byte_the_first_in_its_lower_half():
    assert fp4.pack(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)).tolist() == [[0x21, 0x0F]]
    every = torch.cartesian_prod(CODES, CODES).view(4, -1)
    assert torch.equal(fp4.unpack(fp4.pack(every)), every)


def test_each_scale_of_mxfp4_is_its_power_of_two():
    found = fp4.mx_steps(torch.arange(256, dtype=torch.uint8)[None])[0]
    assert found[:255].double().tolist() == [2.0 ** (byte - 127) for byte in range(255)]
    assert found[255].isnan()  # the OCP's one NaN


def test_each_scale_of_nvfp4_is_its_number():
    scales = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[None]
    found = fp4.nv_steps(scales, torch.tensor([1.0]))[0].double().tolist()
    wanted = [e4m3(byte) for byte in range(256)]
    assert all(
        a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(found, wanted, strict=True)
    )


def mx_floor(block):
    """Return the scale of 32 numbers as section 6.3 of the OCP's specification has it."""
    largest = max(map(abs, block))
    exponent = -127 if largest == 0 else math.floor(math.log2(largest)) - 2
    return min(max(exponent, -127), 127) + 127


def error_of(block, step):
    return sum((number - e2m1(nearest(number / step)) * step) ** 2 for number in block)


def weight_of_all_sizes(rows=24, columns=96):
    """Return blocks of random numbers from the smallest to the largest, one of zeros among them."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= 2.0 ** torch.linspace(-140, 120, rows)[:, None]
    weight[3, :32] = 0
    weight[4, 5] = 2.0**100  # one number beside which the others are nothing
    return weight


def test_mxfp4_is_what_the_ocp_specifies():
    """Its scale, or the next larger one where that leaves a smaller error; the nearest codes."""
    random = torch.randn(16, 96, generator=torch.Generator().manual_seed(2))
    weight = torch.cat([weight_of_all_sizes(), random])
    made = fp4.mx_quantize(weight)
    codes, larger = fp4.unpack(made["weight_packed"]), 0
    for row in range(weight.shape[0]):
        for block in range(3):
            where = slice(32 * block, 32 * block + 32)
            numbers = weight[row, where].double().tolist()
            scale = mx_floor(numbers)
            errors = [error_of(numbers, 2.0 ** (scale + more - 127)) for more in (0, 1)]
            found = int(made["weight_scale"][row, block])
            if 40 < scale < 200:  # elsewhere float32 has no room for the squares
                assert found == scale + (errors[1] < errors[0])
            assert found - scale in (0, 1)
            larger += found - scale
            assert codes[row, where].tolist() == [
                nearest(n / 2.0 ** (found - 127)) for n in numbers
            ]
    assert 10 < larger < 100


def test_nvfp4_is_what_its_scales_say():
    """Each block's scale is the e4m3 number next to a sixth of its largest weight, or to a fourth
    where that is better; each code is the nearest."""
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(3)) * 0.05
    weight[2, :16] = 0
    weight[3, :16] *= 1e-4  # its scale is subnormal
    made = fp4.nv_quantize(weight)
    common = float(made["weight_global_scale"])
    assert common == 512
    scales = made["weight_scale"].view(torch.uint8)
    codes, found = fp4.unpack(made["weight_packed"]), fp4.nv_dequantize(*made.values())
    fourths = 0
    for row in range(16):
        for block in range(4):
            where = slice(16 * block, 16 * block + 16)
            numbers = weight[row, where].double().tolist()
            largest = max(map(abs, numbers))
            options = []
            for most in (6, 4):
                wanted = min(max(largest / most * common, 2.0**-9), 448)
                byte = min(range(127), key=lambda b: (abs(e4m3(b) - wanted), b % 2))
                options.append((error_of(numbers, e4m3(byte) / common), byte))
            error, byte = min(options, key=lambda option: option[0])
            assert scales[row, block] == byte
            fourths += byte != options[0][1]
            step = e4m3(byte) / common
            assert codes[row, where].tolist() == [nearest(n / step) for n in numbers]
            away = [(a - b) ** 2 for a, b in zip(found[row, where].tolist(), numbers, strict=True)]
            assert sum(away) == pytest.approx(error, rel=1e-6, abs=1e-30)
    assert 10 < fourths < 60


@pytest.mark.parametrize("largest", [0.0, 1e-30, 1e-3, 0.02, 1.0, 5.0, 6.0, 1e4, 3e38])
def test_weights_of_any_size_have_room_in_the_scales_of_nvfp4(largest):
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(4))
    weight *= largest / weight.abs().max()
    made = fp4.nv_quantize(weight)
    common = float(made["weight_global_scale"])
    assert math.frexp(common)[0] == 0.5  # a power of two
    assert (common == 512) == (largest == 0 or 512 <= 448 * 6 / largest < 2**18)
    found = fp4.nv_dequantize(*made.values())
    assert float((found - weight).norm()) <= 0.15 * float(weight.norm())


def test_weights_are_exact_in_bfloat16():
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(5)) * 0.1
    for found in (
        fp4.mx_dequantize(*fp4.mx_quantize(weight).values()),
        fp4.nv_dequantize(*fp4.nv_quantize(weight).values()),
    ):
        assert torch.equal(found.bfloat16().float(), found)


@pytest.mark.parametrize("kind", ["mx", "nv"])
def test_quantizing_again_changes_nothing(kind):
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(6)) * 0.1
    quantize, dequantize = (getattr(fp4, f"{kind}_{what}") for what in ("quantize", "dequantize"))
    once = dequantize(*quantize(weight).values())
    assert torch.equal(dequantize(*quantize(once).values()), once)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_no_number_stays_in_its_block(value):
    weight = torch.randn(2, 64, generator=torch.Generator().manual_seed(7))
    wanted = fp4.mx_dequantize(*fp4.mx_quantize(weight).values())
    weight[0, 3] = value
    found = fp4.mx_dequantize(*fp4.mx_quantize(weight).values())
    assert not found[0, 3].isfinite()
    assert torch.equal(found[0, 32:], wanted[0, 32:])
    assert torch.equal(found[1], wanted[1])


def test_rows_do_not_depend_on_how_many_are_quantized_together(monkeypatch):
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(8))
    for quantize in (fp4.mx_quantize, fp4.nv_quantize):
        whole = quantize(weight)
        with monkeypatch.context() as patched:
            patched.setattr(fp4, "AT_ONCE", 64 * 7)
            parts = quantize(weight)
        alone = quantize(weight[5:6])
        for name, tensor in whole.items():
            assert torch.equal(tensor.view(torch.uint8), parts[name].view(torch.uint8))
            if tensor.ndim == 2:
                assert torch.equal(tensor[5:6].view(torch.uint8), alone[name].view(torch.uint8))


# compressed-tensors ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "scheme", "layout"),
    [
        (NVFP4(), "NVFP4A16", "nvfp4-pack-quantized"),
        (MXFP4(), "MXFP4A16", "mxfp4-pack-quantized"),
    ],
)
def test_compressed_tensors_packs_and_unpacks_the_same(options, scheme, layout):
    """On the scales that are here: its codes are ours, and its weight is ours."""
    linear = nn.Linear(128, 24, bias=False)
    generator = torch.Generator().manual_seed(9)
    linear.weight.data = torch.randn(24, 128, generator=generator) * 0.1
    layer = options.quantize_linear(linear)
    ours = layer.state_dict()
    scheme = preset_name_to_scheme(scheme, ["Linear"])
    compressor = BaseCompressor.get_value_from_registry(layout)
    dense = {k: v for k, v in ours.items() if k == "weight_global_scale"}
    block = options.block
    steps = layer.dequantize().unflatten(-1, (-1, block)).abs().amax(-1)
    assert bool((steps > 0).all())
    dense |= {"weight": linear.weight.data.clone()}
    if layout.startswith("nv"):
        dense["weight_scale"] = ours["weight_scale"].float()
    else:
        dense["weight_scale"] = 2.0 ** (ours["weight_scale"].float() - 127)
    theirs = compressor.compress(dense, scheme)
    assert torch.equal(theirs["weight_packed"], ours["weight_packed"])
    same = theirs["weight_scale"].view(torch.uint8) == ours["weight_scale"].view(torch.uint8)
    assert bool(same.all())
    back = compressor.decompress(dict(ours), scheme)["weight"]
    assert torch.equal(back.float(), options.target.dequantize(layer))
