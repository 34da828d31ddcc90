"""Decoding with the vendors' kernels: when they run, and that they compute what the weight does."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from quantadapt.facade import QuantLinear, wrap
from quantadapt.protocols import LayerwiseQuantizer
from quantadapt.registry import registry
from quantadapt.sharding import GatheringTarget
from quantadapt.testing.small_demo import small_model
from quantadapt.testing.tensors import relative

IN, OUT = 256, 128


def made(backend: str, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, **options: Any):
    """Return a quantizer, and the layer that it makes of random weights."""
    quantizer: Any = registry().backend(backend).quantizer(**options)
    linear = nn.Linear(IN, OUT, device=device, dtype=dtype).requires_grad_(False)
    return quantizer, quantizer.quantize_linear(linear)


@pytest.fixture
def script(monkeypatch) -> Any:
    """benchmarks/decoding.py, imported."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("decoding")


# When ------------------------------------------------------------------------------------------


class Recorder:
    """A target that decodes one token with a forward of its own."""

    quantizes_activations = False

    def __init__(self, target: Any) -> None:
        self.target, self.calls = target, 0
        self.shape, self.dequantize = target.shape, target.dequantize

    def decodes(self, module: nn.Module, x: torch.Tensor) -> bool:
        return x.numel() == x.shape[-1]

    def forward(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.target.forward(module, x)


def test_a_facade_decodes_with_the_vendors_forward():
    quantizer, vendor = made("bnb-nf4", dtype=torch.float32)
    target = Recorder(quantizer.target)
    facade = QuantLinear(vendor, target, torch.float32).eval()
    weight = facade.dequantize()
    for shape, calls in (((1, 1, IN), 1), ((IN,), 2), ((1, 2, IN), 2)):
        x = torch.randn(shape)
        assert relative(facade(x), nn.functional.linear(x, weight, facade.bias)) < 1e-6
        assert target.calls == calls
    x = torch.randn(1, IN, requires_grad=True)
    facade(x).sum().backward()
    assert target.calls == 3
    assert torch.allclose(x.grad, weight.sum(0, keepdim=True), atol=1e-5)


def test_no_layer_decodes_while_it_trains():
    quantizer, vendor = made("bnb-nf4", dtype=torch.float32)
    target = Recorder(quantizer.target)
    facade = QuantLinear(vendor, target, torch.float32).train()
    facade(torch.randn(1, IN))
    assert target.calls == 0


def like_cuda(tokens: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Return what `decodes` asks of activations, as if they were on CUDA."""
    shape, device = (1, tokens, IN), torch.device("cuda")
    return SimpleNamespace(
        shape=shape, dtype=dtype, device=device, is_cuda=True, numel=lambda: tokens * IN
    )


LAYERS = (
    *("bnb-nf4", "bnb-fp4", "hqq", "torchao-int8", "torchao-int4", "torchao-intx", "torchao-fp8"),
    *("gptq", "awq", "autoround", "quanto", "eetq"),
)


@pytest.mark.parametrize("backend", LAYERS)
def test_nothing_changes_on_a_cpu(backend):
    quantizer, vendor = made(backend)
    assert not quantizer.target.decodes(vendor, torch.randn(1, 1, IN, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("backend", "module"),
    [
        ("bnb-nf4", "quantadapt_bnb.four_bit"),
        ("bnb-fp4", "quantadapt_bnb.four_bit"),
        ("gptq", "quantadapt_gptqmodel.target"),
        ("awq", "quantadapt_gptqmodel.target"),
        ("autoround", "quantadapt_autoround"),
    ],
)
def test_few_tokens_are_decoded(monkeypatch, backend, module):
    quantizer, vendor = made(backend)
    plugin = importlib.import_module(module)
    monkeypatch.setattr(plugin, "DECODING", 3)
    for name in ("quantadapt_autoround.layers", "quantadapt_gptqmodel.layers"):
        monkeypatch.setattr(importlib.import_module(name), "find_spec", lambda _: True)
    decodes, dtype = quantizer.target.decodes, torch.float16
    assert [decodes(vendor, like_cuda(n, dtype)) for n in (1, 3, 4)] == [True, True, False]
    assert GatheringTarget(quantizer.target).decodes(vendor, like_cuda(1, dtype))
    assert decodes(vendor, like_cuda(1)) == (backend != "awq")  # whose kernel knows float16 alone


def test_layers_without_a_kernel(monkeypatch):
    """Of 3 bits, in float32, or with rows of partial blocks."""
    layers = importlib.import_module("quantadapt_gptqmodel.layers")
    monkeypatch.setattr(layers, "find_spec", lambda _: True)
    _, vendor = made("gptq")
    assert layers.vendor_product(vendor, torch.float16)
    assert layers.vendor_product(vendor, torch.float32) is None
    _, vendor = made("gptq", bits=3)
    assert layers.vendor_product(vendor, torch.float16) is None
    _, vendor = made("awq", group_size=16)
    assert layers.vendor_product(vendor, torch.float16) is None
    quantizer, vendor = made("bnb-nf4")
    x = SimpleNamespace(**{**vars(like_cuda(1)), "shape": (1, 1, 96), "numel": lambda: 96})
    assert not quantizer.target.decodes(vendor, x)


def test_torchaos_weights_decode_by_their_class(monkeypatch):
    plugin = importlib.import_module("quantadapt_torchao.target")
    monkeypatch.setattr(plugin, "DECODING", 1)
    tiles: Any = SimpleNamespace(weight=type(plugin.TILES, (), {})())
    quantizer, int8 = made("torchao-int8")
    decodes = quantizer.target.decodes
    assert [decodes(tiles, like_cuda(n)) for n in (1, 2)] == [True, False]
    assert not decodes(tiles, like_cuda(1, torch.float16))  # it computes in bfloat16
    assert not decodes(int8, like_cuda(1))


IN_BYTES = [
    *(("torchao-int8", {}), ("torchao-fp8", {}), ("torchao-intx", {"bits": 3, "group_size": 32})),
    *(("quanto", {"weights": kind}) for kind in ("int8", "float8", "int4", "int2")),
    *(("hqq", {"bits": bits, "group_size": 64}) for bits in (8, 4, 2, 1)),
    ("bnb-int8", {}),
]


@pytest.mark.parametrize(("backend", "options"), IN_BYTES)
def test_codes_in_bytes_are_the_weight(backend, options):
    quantizer, vendor = made(backend, dtype=torch.float32, **options)
    codes = quantizer.target.byte_codes(vendor)
    held, parts, mask = codes.held, 8 // codes.bits, 2**codes.bits - 1
    if parts > 1:
        order = range(parts - 1, -1, -1) if codes.high_first else range(parts)
        held = torch.cat([held.int() >> (part * codes.bits) & mask for part in order])
    of_column = torch.arange(IN) // codes.grid.group_size
    scale, zero = codes.grid.scale[:, of_column], codes.grid.zero
    zero = torch.zeros(()) if zero is None else zero[:, of_column]
    weight = scale * held.float() - zero if codes.shifted else (held.float() - zero) * scale
    assert relative(weight, quantizer.target.dequantize(vendor)) < 1e-6


@pytest.mark.parametrize("options", [{"bits": 3}, {"bits": 4, "axis": 0}])
def test_codes_that_are_not_in_bytes_by_row_are_not_read_so(options):
    quantizer, vendor = made("hqq", group_size=64, **options)
    assert quantizer.target.byte_codes(vendor) is None


@pytest.mark.cuda
@pytest.mark.parametrize("sizes", [(4096, 1024), (320, 40)])
@pytest.mark.parametrize(("backend", "options"), IN_BYTES)
def test_one_token_is_multiplied_with_the_codes(backend, options, sizes):
    from quantadapt.facade.triton_one_token import product, takes

    quantizer = registry().backend(backend).quantizer(**options)
    linear = nn.Linear(*sizes, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    vendor: Any = quantizer.quantize_linear(linear)
    x = torch.randn(1, 1, sizes[0], device="cuda", dtype=torch.bfloat16)
    weight = quantizer.target.dequantize(vendor).double()
    expected = x.double() @ weight.T + vendor.bias.double()
    codes = quantizer.target.byte_codes(vendor)
    assert takes(codes, x)
    # bfloat16 rounds the result, and in `dequantize` the weight.
    assert relative(product(x, codes, vendor.bias).double(), expected) < 1e-2


def test_aqlm_decodes_where_it_can_be_compiled(script, monkeypatch):
    plugin = importlib.import_module("quantadapt_aqlm")
    layers = importlib.import_module("quantadapt_aqlm.layers")
    quantizer: Any = registry().backend("aqlm").quantizer()
    linear = nn.Linear(IN, OUT, dtype=torch.bfloat16)
    vendor = script.random_aqlm(quantizer, linear)
    monkeypatch.setattr(plugin, "DECODING", 3)
    decodes = quantizer.target.decodes
    for compiled in (True, False):
        monkeypatch.setattr(layers, "_compiled", lambda found=compiled: found)
        assert [decodes(vendor, like_cuda(n)) for n in (1, 3, 4)] == [compiled, compiled, False]
    monkeypatch.setattr(layers, "_compiled", lambda: True)
    assert not decodes(vendor, like_cuda(1, torch.float16))  # codebooks are in bfloat16
    odd: Any = registry().backend("aqlm").quantizer(num_codebooks=3)
    assert not odd.target.decodes(script.random_aqlm(odd, linear), like_cuda(1))


def test_aqlm_that_cannot_be_compiled_is_told_once(monkeypatch):
    layers = importlib.import_module("quantadapt_aqlm.layers")

    def fails(name):
        raise RuntimeError("ninja: no such file")

    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", "/usr/local/cuda")
    monkeypatch.setattr(layers, "import_module", fails)
    with pytest.warns(UserWarning, match="ninja"):
        assert not layers._compiled.__wrapped__()
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    assert not layers._compiled.__wrapped__()


# What, on a GPU --------------------------------------------------------------------------------

BF16, FP16 = torch.bfloat16, torch.float16
TOLERANCES = {BF16: 1e-2, FP16: 2e-3}
KERNELS: list[tuple[str, Mapping[str, Any], torch.dtype]] = [
    ("bnb-nf4", {}, BF16),
    ("bnb-nf4", {"double_quant": False}, FP16),
    ("bnb-fp4", {}, BF16),
    ("torchao-int4", {}, BF16),
    ("torchao-int8", {}, BF16),
    ("gptq", {}, BF16),
    ("gptq", {"bits": 8, "sym": False}, FP16),
    ("awq", {}, BF16),
    ("awq", {}, FP16),
    ("autoround", {}, BF16),
    ("autoround", {"sym": False}, FP16),
    ("quanto", {}, BF16),
]


@pytest.mark.cuda
@pytest.mark.parametrize(("backend", "options", "dtype"), KERNELS)
def test_the_kernel_computes_what_the_weight_does(backend, options, dtype):
    quantizer, vendor = made(backend, "cuda", dtype, **options)
    facade = QuantLinear(vendor, quantizer.target, dtype).eval()
    weight = facade.dequantize()
    for tokens in (1, 2, 17):
        x = torch.randn(1, tokens, IN, device="cuda", dtype=dtype)
        wanted = nn.functional.linear(x.double(), weight.double(), facade.bias.double())
        for y in (quantizer.target.forward(vendor, x), facade(x)):
            assert y.shape == wanted.shape
            assert y.dtype == dtype
            assert relative(y.double(), wanted) < TOLERANCES[dtype]
    assert torch.equal(facade.dequantize(), weight)


@pytest.mark.cuda
def test_aqlms_kernels_compute_what_the_weight_does(script):
    quantizer: Any = registry().backend("aqlm").quantizer()
    linear = nn.Linear(IN, OUT, device="cuda", dtype=BF16).requires_grad_(False)
    vendor = script.random_aqlm(quantizer, linear)
    facade = QuantLinear(vendor, quantizer.target, BF16).eval()
    weight = facade.dequantize()
    for tokens in (1, 2, 17):
        x = torch.randn(1, tokens, IN, device="cuda", dtype=BF16)
        wanted = nn.functional.linear(x.double(), weight.double(), facade.bias.double())
        assert relative(facade(x).double(), wanted) < TOLERANCES[BF16]
    assert torch.equal(facade.dequantize(), weight)


@pytest.mark.cuda
@pytest.mark.parametrize(("backend", "options", "dtype"), KERNELS)
def test_generated_tokens_are_the_same(monkeypatch, backend, options, dtype):
    quantizer: Any = registry().backend(backend).quantizer(**options)
    path = str(small_model())
    model = LayerwiseQuantizer.quantize(quantizer, path, device="cuda", dtype=dtype)
    target = quantizer.target
    model: Any = wrap(model, target, dtype).eval()
    ids = torch.arange(5, 13, device="cuda")[None]
    how: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    declared = model.generate(ids, **how)
    monkeypatch.setattr(target, "decodes", lambda module, x: False)
    assert torch.equal(declared, model.generate(ids, **how))


# The script ---------------------------------------------------------------------------------


def test_the_benchmark(script, monkeypatch, capsys, tmp_path):
    """It measures layers and models, and what fails costs one row."""
    monkeypatch.setattr(script, "ROUND_SECONDS", 1e-4)
    monkeypatch.setattr(script, "NEW_TOKENS", 4)
    monkeypatch.setitem(script.CASES, "none", script.Case("no-such-backend"))
    out = tmp_path / "figures.json"
    arguments = [
        "--device",
        "cpu",
        "--shapes",
        "64x128",
        "--tokens",
        "1",
        "2",
        "--case",
        "nf4",
        "none",
        "eetq",
    ]
    arguments += ["--model", "demo", "--model-case", "nf4", "peft-nf4", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["decoding.py", *arguments, "--out", str(out)])
    script.main()
    found = json.loads(out.read_text(encoding="utf-8"))
    rows = found["layers"]["64x128"]
    assert rows["nf4"]["error"] < 1e-2
    assert all(rows["nf4"][way]["2"] > 0 for way in ("vendor", "dequantize"))
    assert rows["nf4"]["decodes"] == []
    assert "no-such-backend" in rows["none"]["failed"]
    assert rows["eetq"]["error"] < 1e-2
    models = found["models"]["demo"]
    assert models["nf4"]["same"] == 4
    assert all(models[case]["lora"] > 0 for case in ("nf4", "peft-nf4"))
    printed = capsys.readouterr().out
    assert "64x128, microseconds" in printed
    assert "Llama-demo shape" in printed
