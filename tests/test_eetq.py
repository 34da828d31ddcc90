"""EETQ: the suite, the vendor's arithmetic and layout, transformers' checkpoints, and the plan."""

import json
import types
from pathlib import Path

import pytest
import torch
from quantadapt_eetq import EETQ, tiles, vendor
from torch import nn
from transformers import AutoModelForCausalLM, EetqConfig, LlamaConfig, LlamaForCausalLM

import quantadapt
from quantadapt.errors import PlanRefused
from quantadapt.facade import facades
from quantadapt.machine import Machine
from quantadapt.planning import plan
from quantadapt.spec import Spec
from quantadapt.testing import BackendSuite
from quantadapt.testing.small_demo import demo_tokens, small_model


class TestEETQ(BackendSuite):
    backend = "eetq"


# The arithmetic ----------------------------------------------------------------------------------


def test_codes_and_scales_by_hand():
    weight = torch.tensor(
        [
            [1.0, -1.0, 0.5, 1 / 256, -3 / 256],  # 128 is clamped; halves go away from zero
            [-2.0, 1.0, 0.015625, 0.0, 0.0078125],
            [0.0, 0.0, 0.0, 0.0, 0.0],
            [3.0, -1.5, 0.75, 0.02, -0.01],
        ]
    )
    codes, scales = tiles.quantize_rows(weight)
    assert codes.dtype == torch.int8
    assert codes[0].tolist() == [127, -128, 64, 1, -2]
    assert codes[1].tolist() == [-128, 64, 1, 0, 1]
    assert codes[3].tolist() == [127, -64, 32, 1, 0]
    assert scales.tolist() == [1 / 128, 2 / 128, 0.0, 3 / 128]


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (33, 65), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_code_is_the_nearest(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    codes, scales = tiles.quantize_rows(weight)
    assert torch.equal(scales, weight.float().abs().amax(1) / 128)
    off = (weight.double() / scales.double()[:, None] - codes.double()).abs()
    clamped = codes == 127
    assert (off[~clamped] <= 0.5 + 1e-5).all()
    assert (off[clamped] <= 1 + 1e-5).all()


def test_a_row_of_zeros_stays_zero():
    weight = torch.randn(64, 64)
    weight[5] = 0
    linear = nn.Linear(64, 64, bias=False)
    linear.weight = nn.Parameter(weight)
    quantizer = EETQ()
    found = quantizer.target.dequantize(quantizer.quantize_linear(linear))
    assert (found[5] == 0).all()
    assert found.isfinite().all()


def test_dequantized_in_float16_is_the_products_rounding():
    codes = torch.arange(-128, 128).to(torch.int8).reshape(4, 64).repeat(16, 1)
    scales = (torch.rand(64) / 100).half()
    found = tiles.dequantize(tiles.pack(codes), scales).half()
    assert torch.equal(found, codes.half() * scales[:, None])


# The layout --------------------------------------------------------------------------------------


def place(row: int, column: int, columns: int) -> int:
    """Where the vendor's kernels look for the code of one weight, in bytes from the start."""
    sixteen, inside = divmod(column % 64, 16)
    half, rest = divmod(inside, 8)
    pair, one = divmod(rest, 2)
    within = 4 * pair + 2 * one + half
    start = (row // 2) * 2 * columns + (column // 64) * 128 + (row % 2) * 64
    return start + 16 * sixteen + within


@pytest.mark.parametrize("shape", [(64, 64), (128, 64), (64, 192), (192, 128)])
def test_packed_as_the_vendor_packs(shape):
    rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, shape, generator=generator).to(torch.int8)
    packed = tiles.pack(codes)
    assert packed.shape == (columns, rows)
    assert torch.equal(tiles.unpack(packed), codes)
    stored = packed.flatten().view(torch.uint8)
    places = torch.tensor([[place(r, c, columns) for c in range(columns)] for r in range(rows)])
    assert torch.equal(stored[places.flatten()].int() - 128, codes.flatten().int())


def test_the_first_bytes_of_a_packed_weight():
    """Sixteen bytes as the vendor's own preprocessing gives them: rows 0 1 8 9 2 3 10 11 4 5 12 13
    6 7 14 15, then the middle two of each four exchanged, then 128 added."""
    codes = torch.arange(64, dtype=torch.int8).repeat(64, 1)
    first = tiles.pack(codes).flatten()[:16].view(torch.uint8).int() - 128
    assert first.tolist() == [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]


# The vendor's kernel -----------------------------------------------------------------------------


def cpu_gemm(x, packed, scales):
    """The product that the vendor's kernel computes."""
    assert packed.dtype == torch.int8
    assert x.dim() in (2, 3)
    return x @ tiles.dequantize(packed, scales).to(x.dtype).t()


def test_a_kernel_is_compared_before_it_is_used(monkeypatch):
    monkeypatch.setattr(vendor, "kernel_here", lambda device: ("EETQ", ""))
    cpu = torch.device("cpu")
    kernels = {
        "right": (cpu_gemm, True),
        "wrong layout": (lambda x, w, s: x @ (w.t() * s[:, None]).to(x.dtype).t(), False),
        "not a number": (lambda x, w, s: cpu_gemm(x, w, s) * float("nan"), False),
        "few rows only": (lambda x, w, s: cpu_gemm(x, w, s) * (len(x) < 5), False),
    }
    for name, (gemm, agrees) in kernels.items():
        monkeypatch.setattr(vendor, "_import_gemm", lambda _, gemm=gemm: gemm)
        found = vendor.gemm_for.__wrapped__(cpu, torch.float16)
        assert (found is gemm) is agrees, name

    def unsupported(x, w, s):
        raise RuntimeError("Arch unsupported for CUTLASS mixed type GEMM")

    monkeypatch.setattr(vendor, "_import_gemm", lambda _: unsupported)
    assert vendor.gemm_for.__wrapped__(cpu, torch.float16) is None
    assert vendor.gemm_for.__wrapped__(cpu, torch.bfloat16) is None


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_decodes_with_the_kernel_and_trains_without(monkeypatch, bias):
    calls = []

    def gemm(*args):
        calls.append(args[0].shape)
        return cpu_gemm(*args)

    linear = nn.Linear(128, 64, bias=bias).half()
    layer = EETQ().quantize_linear(linear)
    x = torch.randn(2, 3, 5, 128, dtype=torch.float16)
    reference = layer(x)
    monkeypatch.setattr(vendor, "gemm_for", lambda device, dtype: gemm)
    assert torch.allclose(layer(x), reference, rtol=2e-3, atol=2e-3)
    assert calls == [(30, 128)]
    x.requires_grad_()
    layer(x).sum().backward()
    assert len(calls) == 1
    assert x.grad is not None
    target = EETQ().target
    assert target.decodes(layer, x)
    assert not target.decodes(layer, x.repeat(3, 1, 1, 1))


def test_the_plan_says_which_kernel_runs(monkeypatch):
    def note(*cards, device="cuda", installed="EETQ"):
        monkeypatch.setattr(vendor, "this_machine", lambda: Machine(cuda=cards))
        monkeypatch.setattr(vendor, "find_spec", lambda name: name == installed or None)
        (found,) = EETQ().notes(device)
        return found

    assert "vendor's kernel (EETQ)" in note((8, 0))
    assert "reference" in note((8, 0), device="cpu")
    assert "reference" in note()
    assert "not installed" in note((8, 6), installed="")
    assert "another layout" in note((7, 0))
    assert "another layout" in note((8, 0), (7, 0), device="cuda:1")
    assert "if this build" in note((9, 0))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert "vendor's kernel (kernels)" in note((8, 9), installed="kernels")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/nowhere")
    assert "the hub is off" in note((8, 9), installed="kernels")
    monkeypatch.undo()
    made = plan(Spec(backend={"name": "eetq"}, device="cpu"), check_output=False)
    assert any("reference kernel" in text for text in made.notes)


# Checkpoints -------------------------------------------------------------------------------------


@pytest.fixture
def stock(monkeypatch):
    """transformers' EETQ on a CPU: its own code, with the hub's kernel computed in PyTorch."""

    def quant_weights(weight, dtype, unprocessed):
        codes, scales = tiles.quantize_rows(weight.t())
        return tiles.pack(codes), scales.half()

    kernel = types.SimpleNamespace(w8_a16_gemm=cpu_gemm, quant_weights=quant_weights)
    hub = "transformers.integrations.hub_kernels.get_kernel"
    monkeypatch.setattr(hub, lambda *_, **__: kernel)
    quantizer = "transformers.quantizers.quantizer_eetq.EetqHfQuantizer.validate_environment"
    monkeypatch.setattr(quantizer, lambda *_, **__: None)
    return AutoModelForCausalLM.from_pretrained


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=demo_tokens()).logits.float()


def test_transformers_loads_our_checkpoint(stock, tmp_path):
    ours = quantadapt.quantize(str(small_model()), "eetq", device="cpu", dtype="float32")
    quantadapt.save(ours, tmp_path / "saved")
    theirs = stock(tmp_path / "saved", dtype=torch.float32)
    layer = theirs.model.layers[0].mlp.down_proj
    assert type(layer).__module__ == "transformers.integrations.eetq"
    assert layer.weight_scales.dtype == torch.float16
    assert torch.allclose(logits(theirs), logits(ours), atol=1e-4)


def test_transformers_checkpoint_and_live_model_are_adopted(stock, tmp_path):
    config = EetqConfig()
    theirs = stock(small_model(), dtype=torch.float32, quantization_config=config)
    expected = logits(theirs)
    theirs.save_pretrained(tmp_path)
    for file in Path(small_model()).glob("*token*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert "layout" not in json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    loaded = quantadapt.quantize(str(tmp_path), "eetq", device="cpu", dtype="float32")
    assert torch.allclose(logits(loaded), expected, atol=1e-4)
    ours = quantadapt.quantize(str(small_model()), "eetq", device="cpu", dtype="float32")
    assert torch.equal(logits(loaded), logits(ours))
    live = quantadapt.quantize(theirs, "eetq", device="cpu", dtype="float32")
    assert torch.equal(logits(live), logits(ours))


def test_another_layout_is_refused(tmp_path):
    ours = quantadapt.quantize(str(small_model()), "eetq", device="cpu", dtype="float32")
    folder = quantadapt.save(ours, tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "eetq"
    assert config["quantization_config"]["layout"] == "turing"
    config["quantization_config"]["layout"] = "volta"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanRefused, match="cannot read it"):
        quantadapt.quantize(str(folder), "eetq", device="cpu")


def tiny(**sizes):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=160,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=2048,
        **sizes,
    )
    return LlamaForCausalLM(config).eval()


def test_sizes_that_cannot_be_packed(stock, tmp_path):
    with pytest.raises(PlanRefused, match="64 does not divide 160 outputs"):
        quantadapt.quantize(tiny(), "eetq", device="cpu", dtype="float32")
    model = quantadapt.quantize(tiny(), "eetq", device="cpu", dtype="float32", skip_misfits=True)
    names = {name.rpartition(".")[2] for name, _ in facades(model)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj"}
    folder = quantadapt.save(model, tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    dense = ["gate_proj", "up_proj", "down_proj"]
    expected = {"lm_head", *(f"model.layers.0.mlp.{name}" for name in dense)}
    assert set(config["modules_to_not_convert"]) == expected
    assert torch.allclose(logits(stock(folder, dtype=torch.float32)), logits(model), atol=1e-4)
