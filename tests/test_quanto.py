"""Quanto: the suite on its four types, quanto's own numbers, zeros, copies, and checkpoints."""

# ruff: noqa: RUF012 (options are given as a plain dict)

import copy
import json

import pytest
import torch
from quantadapt_quanto import Quanto
from quantadapt_quanto.weights import unpack
from torch import nn
from transformers import AutoModelForCausalLM, QuantoConfig

import quantadapt
from quantadapt.testing import BackendSuite, TargetSuite
from quantadapt.testing.small_demo import demo_tokens, small_model
from quantadapt.testing.tensors import plain_tensors, relative

TYPES = ("int8", "int4", "int2", "float8")


@pytest.fixture(autouse=True)
def _nothing_is_compiled(monkeypatch):
    """quanto compiles C++ or CUDA code when it first unpacks int4 or int2."""
    from optimum.quanto.library.extensions.extension import Extension

    def compiled(_):
        raise AssertionError("quanto's extension is compiled")

    monkeypatch.setattr(Extension, "lib", property(compiled))


class TestQuantoInt8(BackendSuite):
    backend = "quanto"


class TestQuantoInt4(BackendSuite):
    backend = "quanto"
    options = {"weights": "int4"}


class TestQuantoInt2(TargetSuite):
    backend = "quanto"
    options = {"weights": "int2"}


class TestQuantoFloat8(TargetSuite):
    backend = "quanto"
    options = {"weights": "float8"}


def layer(shape=(64, 256), dtype=torch.float32):
    linear = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def digits(weight):
    return [part.detach().float() for part in plain_tensors(weight)]


@pytest.mark.parametrize("weights", TYPES)
@pytest.mark.parametrize("shape", [(64, 256), (7, 33), (48, 320), (128, 64)])
def test_numbers_are_quantos_own(weights, shape):
    from optimum.quanto import QLinear, qtypes

    quantizer = Quanto(weights=weights)
    ours = quantizer.quantize_linear(layer(shape))
    theirs = QLinear.from_module(layer(shape), weights=qtypes[ours.weight_qtype.name])
    theirs.freeze()
    assert type(ours.weight) is type(theirs.weight)
    found, expected = digits(ours.weight), digits(theirs.weight)
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    error = quantizer.target.dequantize(ours) - layer(shape).weight
    assert error.norm() < 0.6 * layer(shape).weight.norm()
    if weights in ("int8", "float8"):  # quanto compiles C++ to do so below 8 bits
        assert torch.equal(quantizer.target.dequantize(ours), theirs.weight.dequantize())


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("rows", [5, 8, 63])
def test_codes_are_unpacked_as_quanto_packs_them(bits, rows):
    from optimum.quanto.tensor.packed import PackedTensor

    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (rows, 16), generator=generator).to(torch.uint8)
    packed = PackedTensor.pack(codes, bits)
    assert torch.equal(unpack(packed._data, bits)[:rows], codes)


@pytest.mark.parametrize("weights", TYPES)
def test_rows_of_zeros_and_of_one_value(weights):
    linear = layer()
    linear.weight[3] = 0
    linear.weight[4] = 0.5
    quantizer = Quanto(weights=weights)
    found = quantizer.target.dequantize(quantizer.quantize_linear(linear))
    assert found.isfinite().all()
    assert (found[3] == 0).all()
    assert torch.allclose(found[4], linear.weight[4], rtol=1e-2)


@pytest.mark.parametrize("weights", TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_what_was_saved_changes_no_bit(weights, dtype):
    quantizer = Quanto(weights=weights)
    first = quantizer.quantize_linear(layer(dtype=dtype))
    empty = nn.Linear(256, 64, bias=False, dtype=dtype, device="meta")
    again = quantizer.load_linear(empty, dict(first.state_dict()))
    for a, b in zip(digits(first.weight), digits(again.weight), strict=True):
        assert torch.equal(a, b)
    assert again.weight.dtype == dtype
    copied = copy.deepcopy(first)
    for a, b in zip(plain_tensors(first.weight), plain_tensors(copied.weight), strict=True):
        assert torch.equal(a.float(), b.float())
        assert a.data_ptr() != b.data_ptr()
    assert isinstance(copied.weight, nn.Parameter)
    assert not copied.weight.requires_grad


@pytest.mark.parametrize("weights", TYPES)
@pytest.mark.parametrize("shape", [(96, 72), (104, 72), (64, 64)])
def test_the_layer_by_itself_multiplies_with_its_weight(weights, shape):
    """Also where PyTorch's kernel for int8 in bfloat16 reads past the rows: 72 inputs."""
    quantizer = Quanto(weights=weights)
    made = quantizer.quantize_linear(layer(shape, torch.bfloat16))
    x = torch.randn(5, shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = x.float() @ quantizer.target.dequantize(made).float().t()
    assert relative(made(x).float(), expected) < 1e-2


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=demo_tokens()).logits.float()


@pytest.mark.parametrize("weights", ["int8", "float8"])
def test_quanto_loads_our_checkpoint(weights, tmp_path):
    from optimum.quanto import QuantizedModelForCausalLM

    source = str(small_model())
    ours = quantadapt.quantize(source, "quanto", device="cpu", dtype="float32", weights=weights)
    folder = quantadapt.save(ours, tmp_path / "saved")
    layers = json.loads((folder / "quanto_qmap.json").read_text())
    assert len(layers) == 14
    theirs = QuantizedModelForCausalLM.from_pretrained(str(folder))
    assert torch.equal(logits(theirs._wrapped), logits(ours))


def test_transformers_refuses_our_checkpoint(tmp_path):
    """It would leave the layers random, with a warning."""
    ours = quantadapt.quantize(str(small_model()), "quanto", device="cpu", dtype="float32")
    folder = quantadapt.save(ours, tmp_path / "saved")
    with pytest.raises(ValueError, match="qint8"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("weights", ["int8", "float8"])
def test_a_model_that_transformers_quantized_is_adopted(weights):
    config = QuantoConfig(weights=weights)
    live = AutoModelForCausalLM.from_pretrained(
        small_model(), dtype=torch.float32, quantization_config=config
    )
    expected = logits(live)
    model = quantadapt.quantize(live, "quanto", device="cpu", dtype="float32")
    assert model.quantadapt.quantizer == Quanto(weights=weights)
    assert torch.allclose(logits(model), expected, atol=1e-4)
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
