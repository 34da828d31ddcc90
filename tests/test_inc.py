"""Intel Neural Compressor: the conformance suite for each method, and what is INC's alone."""

import copy
import gc
import inspect
import logging
import os
import re
import subprocess
import sys
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from quantadapt_inc import INC, vendor
from quantadapt_inc.config import config_for
from quantadapt_inc.layers import inner
from quantadapt_inc.quantize import looking_on
from quantadapt_inc.vendor import running, showing
from torch import nn

import quantadapt
from quantadapt.errors import MergeRefused, ModelError, PlanRefused, PluginError
from quantadapt.facade import facades, unwrap
from quantadapt.planning import plan
from quantadapt.quantizing.state import state_of
from quantadapt.spec import Spec
from quantadapt.testing import BackendSuite, TargetSuite
from quantadapt.testing.bench import weight_bytes
from quantadapt.testing.small_demo import calibration_examples, demo_tokens, small_model
from quantadapt.testing.tensors import relative

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "any-module.md"
METHODS = ("fp8", "rtn", "gptq", "awq")


class TestFP8(BackendSuite):
    backend = "inc"
    bits = 8


class TestE5M2(TargetSuite):
    backend = "inc"
    options: ClassVar = {"fp8_format": "e5m2"}
    bits = 8


class TestRTN(BackendSuite):
    backend = "inc"
    options: ClassVar = {"method": "rtn", "bits": 4, "group_size": 64}
    adapters = ("lora",)


@pytest.mark.slow
class TestGPTQ(TargetSuite):
    backend = "inc"
    options: ClassVar = {"method": "gptq", "bits": 4, "symmetric": False}
    test_bfloat16 = test_biases_are_kept = None  # slow; `Blocks` below are small


@pytest.mark.slow
class TestAWQ(TargetSuite):
    backend = "inc"
    options: ClassVar = {"method": "awq", "group_size": 128}
    test_bfloat16 = test_biases_are_kept = None  # slow; `Blocks` below are small
    test_live_module_is_quantized_as_from_disk = None  # slow; as for GPTQ


# Small modules ---------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(72, 96)
        self.down = nn.Linear(96, 72, bias=False)

    def forward(self, hidden_states):
        return hidden_states + self.down(self.up(hidden_states))


class Blocks(nn.Module):
    """Something that is no language model and has no config."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.mix = nn.Conv1d(3, 3, 1)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.mix(x)


@pytest.fixture
def examples():
    torch.manual_seed(1)
    return [{"x": torch.randn(8, 3, 72)} for _ in range(4)]


def quantized(module, examples, dtype="float32", **options):
    options = {"group_size": 24, **options} if options.get("method", "fp8") != "fp8" else options
    model = quantadapt.quantize(
        module, "inc", device="cpu", dtype=dtype, calibration=examples, **options
    )
    return model.eval()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_any_module(method, dtype, examples):
    dense = Blocks().eval().to(getattr(torch, dtype))
    model = quantized(copy.deepcopy(dense), examples, dtype, method=method)
    x = examples[0]["x"].to(dense.mix.weight.dtype)
    assert len(dict(facades(model))) == 4
    assert torch.equal(model.mix.weight, dense.mix.weight)
    with torch.no_grad():
        assert relative(model(x), dense(x)) < 0.05
    for name, facade in facades(model):
        bias = dense.get_submodule(name).bias
        assert facade.bias is None if bias is None else torch.equal(facade.bias, bias)
        assert relative(facade.dequantize(), dense.get_submodule(name).weight) < 0.15


@pytest.mark.parametrize("method", METHODS)
def test_skipped_layers_stay_as_they_are(method, examples):
    dense = Blocks().train()
    options = {} if method == "fp8" else {"group_size": 24}
    model = quantadapt.quantize(
        copy.deepcopy(dense),
        "inc",
        method=method,
        device="cpu",
        calibration=examples,
        skip_modules=["down"],
        **options,
    )
    assert [name for name, _ in facades(model)] == ["blocks.0.up", "blocks.1.up"]
    assert type(model.blocks[1].down) is nn.Linear
    assert torch.equal(model.blocks[1].down.weight, dense.blocks[1].down.weight)
    assert all(module.training for module in model.modules())
    for before, after in zip(dense.modules(), model.modules(), strict=True):
        left = vars(after).keys() - vars(before).keys()
        assert type(after) is not type(before) or not left - {"quantadapt", "_is_hf_initialized"}


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_gptq_and_awq_want_one_stack(method, examples):
    outside = Blocks()
    outside.head = nn.Linear(72, 72)
    with pytest.raises(ModelError, match=r"blocks\.0, blocks\.1, head.*\n.*fp8 or rtn"):
        quantized(outside, examples, method=method)
    nested = Blocks()
    nested.blocks[0].more = nn.Sequential(nn.Linear(72, 72))
    with pytest.raises(ModelError, match="one stack of blocks"):
        quantized(nested, examples, method=method)
    with pytest.raises(ModelError, match="the same layers"):
        quantized(Blocks(), examples, method=method, skip_modules=["blocks.1.up"])


def test_awq_wants_whole_groups(examples):
    with pytest.raises(PlanRefused, match="whole groups: 64 does not divide 72 inputs"):
        quantized(Blocks(), examples, method="awq", group_size=64)
    model = quantized(Blocks(), examples, method="awq", group_size=32, skip_misfits=True)
    assert [name for name, _ in facades(model)] == ["blocks.0.down", "blocks.1.down"]


def test_layers_that_calibration_does_not_reach_are_named(examples):
    class Half(Blocks):
        def forward(self, x):
            return self.blocks[0](x)

    with pytest.raises(ModelError, match=r"did not reach blocks\.1\.up, blocks\.1\.down \(2"):
        quantized(Half(), examples)
    assert len(dict(facades(quantized(Half(), examples, skip_modules=["blocks.1"])))) == 2


# Layers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integers_are_what_inc_recovers(bits, symmetric, examples):
    if bits == 8 and not symmetric:
        with pytest.raises(PlanRefused, match="overflows where 8 bits have zero points"):
            quantized(Blocks(), examples, method="rtn", bits=bits, symmetric=symmetric)
        return
    options = {"bits": bits, "symmetric": symmetric, "group_size": 40}  # the last group is short
    model = quantized(Blocks(), examples, method="rtn", **options)
    quantizer = state_of(model).quantizer
    for _, facade in facades(model):
        assert torch.equal(facade.dequantize(), facade.vendor.recover().float())
        size = facade.in_features, facade.out_features
        declared = quantizer.bits_per_weight(*size, device="cpu", dtype="float32")
        found = 8 * weight_bytes(facade) / (size[0] * size[1])
        assert declared == pytest.approx(found, rel=0.1)  # rows and groups are padded


@pytest.mark.parametrize("method", METHODS)
def test_what_few_tokens_are_multiplied_with_is_what_the_layer_has(method, examples):
    """Codes in words that a row does not fill are not read so."""
    model, x = quantized(Blocks(), examples, method=method), torch.randn(1, 72)
    for facade in [block.up for block in model.blocks]:
        given = facade.target.inputs_of_codes(facade.vendor, x)
        codes = facade.target.byte_codes(facade.vendor)
        words = facade.target.word_codes(facade.vendor)
        assert (codes is None, words is None) == (method != "fp8", method == "fp8")
        if codes is not None:
            weight = codes.held.float() * codes.grid.scale
        else:
            places = 4 * torch.arange(8)[:, None]
            held = (words.held[:, None] >> places & 15).flatten(0, 1) - words.zero
            weight = (held * words.scale.float().repeat_interleave(words.group_size, 0)).t()
        with torch.no_grad():
            expected = facade.vendor(x)
        # INC's integers times scales are rounded to 16 bits.
        off = 1e-6 if method == "fp8" else 1e-3
        assert relative(given @ weight.t() + facade.bias, expected) < off
    odd = nn.Linear(76, 16).requires_grad_(False)
    assert INC(method="rtn").target.word_codes(INC(method="rtn").quantize_linear(odd)) is None


def of_words(words):
    """The weight that a kernel for few tokens reads in words."""
    places = words.bits * torch.arange(32 // words.bits)[:, None]
    codes = (words.held[:, None] >> places & 2**words.bits - 1).flatten(0, 1) - words.zero
    return (codes * words.scale.float().repeat_interleave(words.group_size, 0)).t()


@pytest.mark.parametrize("act_order", [False, True])
def test_columns_that_inc_put_in_another_order_are_not_read_as_words(act_order, tmp_path, examples):
    """As its GPTQ does where it is asked to, without us."""

    class Chain(Blocks):
        def forward(self, x):
            return self.blocks[1](self.blocks[0](x))

    model = Chain().eval()
    with running(torch.device("cpu")), torch.no_grad():
        from neural_compressor.torch.quantization import GPTQConfig, convert, prepare

        options = {"bits": 4, "group_size": 24, "use_sym": True, "model_path": str(tmp_path)}
        config = GPTQConfig(**options, act_order=act_order, use_layer_wise=False)
        prepared = prepare(model, config)
        for example in examples:
            prepared(example["x"] * torch.linspace(0.1, 3, 72).roll(13))
        convert(prepared)
    live = quantadapt.quantize(model, "inc", device="cpu", dtype="float32")
    for _, facade in facades(live):
        words = facade.target.word_codes(facade.vendor)
        assert (words is None) == act_order
        assert torch.equal(facade.dequantize(), facade.vendor.recover().float())
        assert act_order or relative(of_words(words), facade.dequantize()) < 1e-3


def test_layers_with_zero_points_beside_others_are_not_read_as_words(examples):
    """Each layer is looked at, and again where its tensors are others."""
    made = [quantized(Blocks(), examples, method="rtn", symmetric=s) for s in (True, False)]
    first, second = made
    first.blocks[1] = second.blocks[1]
    live = quantadapt.quantize(unwrap(first), "inc", device="cpu", dtype="float32")
    layers = [facade for _, facade in facades(live)]
    for layer, plain in zip(layers, [True, True, False, False], strict=True):
        for _ in range(2):
            words = layer.target.word_codes(layer.vendor)
            assert (words is not None) == plain
        assert not plain or relative(of_words(words), layer.dequantize()) < 1e-3
        layer.requantize(layer.dequantize() + 0.1)  # as it was quantized
        assert (layer.target.word_codes(layer.vendor) is not None) == plain
    up = layers[0]
    up.load_state_dict(layers[2].state_dict())
    assert up.target.word_codes(up.vendor) is None
    assert torch.equal(up.dequantize(), layers[2].dequantize())


def test_inputs_that_were_nothing_but_zeros_are_told(examples):
    """0 divided by their scale is no number."""
    zeros = [{"x": torch.zeros(8, 3, 72)}]
    with pytest.raises(ModelError, match=r"showed blocks\.0\.up nothing but zeros \(1 layer.*"):
        quantized(Blocks(), zeros)
    model = quantized(Blocks(), zeros, skip_modules=["blocks.0.up"])
    with torch.no_grad():
        assert model(zeros[0]["x"]).isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_takes_another_weight(method, examples):
    """As PiSSA wants it, and with the scales of the inputs as calibrated."""
    model = quantized(Blocks(), examples, method=method)
    for _, facade in facades(model):
        generator = torch.Generator().manual_seed(2)
        weight = 3 * torch.randn(facade.out_features, facade.in_features, generator=generator)
        old, bias = facade.vendor, facade.bias
        facade.requantize(weight.clone())
        assert relative(facade.dequantize(), weight) < 0.15
        again = facade.dequantize().clone()
        facade.requantize(again.clone())
        assert relative(facade.dequantize(), again) < 0.01
        assert bias is None or torch.equal(facade.bias, bias)
        x = torch.randn(2, facade.in_features, generator=generator)
        with torch.no_grad():
            assert relative(facade(x), facade.vendor(x)) < 1e-6
        if method == "fp8":
            assert facade.vendor.quant_input.scale == old.quant_input.scale
        if method == "awq":
            assert torch.equal(facade.vendor.input_scale, old.input_scale)


@pytest.mark.parametrize("method", ["fp8", "awq"])
def test_pissa(method, examples):
    model = quantized(Blocks(), examples, method=method)
    x = examples[0]["x"]
    with torch.no_grad():
        before = model(x)
        peft_model = quantadapt.attach(model, "pissa", r=4)
        assert 0 < relative(peft_model(x), before) < 0.05
    peft_model(x).square().mean().backward()
    assert all(p.grad is not None for p in peft_model.parameters() if p.requires_grad)


# Options ---------------------------------------------------------------------------------------


def test_options_belong_to_methods():
    assert INC().model_dump() == {
        "method": "fp8",
        "fp8_format": "e4m3",
        "bits": None,
        "group_size": None,
        "symmetric": None,
    }
    assert INC(method="awq", bits=3).model_dump() == {
        "method": "awq",
        "fp8_format": None,
        "bits": 3,
        "group_size": 64,
        "symmetric": True,
    }
    for options in ({"bits": 4}, {"method": "rtn", "fp8_format": "e5m2"}):
        with pytest.raises(PlanRefused, match=r"method (fp8|rtn) has no (bits|fp8_format)"):
            plan(Spec(backend={"name": "inc", **options}))


def test_merging_offers_the_unquantized_model():
    spec = Spec(backend="inc", device="cpu", export={"merge": "dense"}, output="nowhere")
    with pytest.raises(MergeRefused, match=r"inc-merge-never(.|\n)*--onto"):
        plan(spec)


# Checkpoints -----------------------------------------------------------------------------------


def logits(model):
    with torch.no_grad():
        return model(input_ids=demo_tokens()).logits.float()


def made(tmp_path, **options):
    """Return a quantized model, its logits, and the folder that it is saved to."""
    examples = calibration_examples()
    model = quantadapt.quantize(
        str(small_model()), "inc", device="cpu", calibration=examples, **options
    )
    return model, logits(model), quantadapt.save(model, tmp_path / "saved")


@pytest.mark.parametrize("fp8_format", ["e4m3", "e5m2"])
def test_inc_reads_fp8_checkpoints(fp8_format, tmp_path, monkeypatch):
    from neural_compressor.torch.quantization import load

    monkeypatch.chdir(tmp_path)
    _, expected, folder = made(tmp_path, dtype="float32", fp8_format=fp8_format)
    with running(torch.device("cpu")):
        assert torch.equal(logits(load(str(folder), format="huggingface", device="cpu")), expected)
    assert not re.search(rf"{tmp_path}|/tmp", (folder / "config.json").read_text())


@pytest.mark.parametrize("method", ["fp8", "rtn"])
def test_bfloat16_checkpoints(method, tmp_path):
    _, expected, folder = made(tmp_path, dtype="bfloat16", method=method)
    assert torch.equal(logits(quantadapt.load(folder, device="cpu")), expected)


def test_rtn_checkpoints_are_gptq_checkpoints(tmp_path, monkeypatch):
    from neural_compressor.torch.quantization import load

    monkeypatch.chdir(tmp_path)
    options = {"method": "rtn", "bits": 8, "skip_modules": ["lm_head", "layers.1.self_attn"]}
    _, expected, folder = made(tmp_path, dtype="float32", **options)
    assert torch.equal(logits(quantadapt.load(folder, device="cpu")), expected)
    with running(torch.device("cpu")):
        assert torch.equal(logits(load(str(folder), format="huggingface", device="cpu")), expected)
    by_gptqmodel = quantadapt.quantize(str(folder), "gptq", device="cpu", dtype="float32")
    assert relative(logits(by_gptqmodel), expected) < 1e-6


def test_what_inc_made_alone_is_taken_over(tmp_path, monkeypatch):
    import shutil

    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(small_model(), dtype=torch.float32).eval()
    with running(torch.device("cpu")), torch.no_grad():
        from neural_compressor.torch.quantization import FP8Config, convert, prepare, save

        config = FP8Config(
            hp_dtype="fp32",
            use_qdq=True,
            scale_method="maxabs_arbitrary",
            blocklist={"names": ["lm_head"], "types": ()},
        )
        prepared = prepare(model, config)
        for example in calibration_examples():
            prepared(**example)
        save(convert(prepared), "saved")
    expected = logits(model)
    for file in small_model().glob("*token*"):
        shutil.copy(file, "saved")
    adopted = quantadapt.quantize("./saved", "inc", device="cpu", dtype="float32")
    assert torch.equal(logits(adopted), expected)
    live = quantadapt.quantize(model, "inc", device="cpu", dtype="float32")
    assert torch.equal(logits(live), expected)
    assert state_of(live).quantizer == state_of(adopted).quantizer == INC()


def test_a_checkpoint_of_other_layers_is_refused():
    linear = nn.Linear(64, 32, bias=False, device="meta")
    with pytest.raises(ModelError, match=r"other tensors than .*: .*scale_weight"):
        INC().load_linear(linear, {"weight": torch.zeros(64, 32), "scale_weight": torch.ones(1)})


# INC itself ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_inc_keeps_no_module_alive(method, examples):
    environment, level = dict(os.environ), logging.getLogger("neural_compressor").level
    scratch = tempfile.tempdir
    model = quantized(Blocks(), examples, method=method)
    found = [weakref.ref(module) for module in model.modules()]
    found += [weakref.ref(inner(facade.vendor)) for _, facade in facades(model)]
    del model
    gc.collect()
    assert [reference() for reference in found if reference() is not None] == []
    assert dict(os.environ) == environment
    assert logging.getLogger("neural_compressor").level == level
    assert tempfile.tempdir == scratch


@pytest.mark.slow
def test_inc_leaves_no_files_and_says_nothing(tmp_path):
    """In a process of its own, because most of it happens when INC is imported."""
    script = f"""
import quantadapt, torch
from torch import nn

{inspect.getsource(Block)}
{inspect.getsource(Blocks)}
for method in ("fp8", "gptq"):
    examples = [{{"x": torch.randn(8, 3, 72)}}]
    quantadapt.quantize(Blocks(), "inc", method=method, device="cpu", calibration=examples)
"""
    folders = [tmp_path / "here", tmp_path / "home", tmp_path / "tmp"]
    for folder in folders:
        folder.mkdir()
    path = [str(Path(__file__).parent), *sys.path]
    given = {
        "HOME": str(folders[1]),
        "TMPDIR": str(folders[2]),
        "PYTHONPATH": os.pathsep.join(path),
    }
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folders[0],
        env={**os.environ, **given},
        capture_output=True,
        text=True,
        check=True,
    )
    assert [list(folder.iterdir()) for folder in folders] == [[], [], []]
    assert not re.search("accelerator|INC|fp8_quant", run.stdout + run.stderr)


def test_inputs_are_looked_at_where_the_model_is(examples):
    """On a GPU; a device without memory stands for it. What INC is not shown goes there, too."""
    model, names = Blocks(), ["blocks.0.up", "blocks.1.up"]
    with running(torch.device("cuda")), showing(model, names):
        from neural_compressor.torch.quantization import prepare

        config = config_for(INC(), model, names, "fp8", torch.float32)
        looking_on(prepare(model, config, example_inputs=examples[0]["x"]), torch.device("meta"))
        found = [block.up._mod_extra_config.inputs[0].state for block in model.blocks]
    found += list(model.parameters())
    assert len(found) == 2 + 8
    assert all(tensor.is_meta for tensor in found)


@pytest.mark.cuda
@pytest.mark.parametrize("method", METHODS)
def test_on_a_gpu_it_is_what_it_is_on_a_cpu(method, examples):
    dense, made = Blocks().eval(), {}
    options = {"method": method} if method == "fp8" else {"method": method, "group_size": 24}
    for device in ("cpu", "cuda"):
        model = quantadapt.quantize(
            copy.deepcopy(dense),
            "inc",
            device=device,
            dtype="float32",
            calibration=examples,
            skip_modules=["blocks.1.down"] if method in ("fp8", "rtn") else None,
            **options,
        )
        assert {tensor.device.type for tensor in model.state_dict().values() if tensor.ndim} == {
            device
        }
        with torch.no_grad():
            outputs = [model(example["x"].to(device)).cpu() for example in examples]
        weights = [facade.dequantize().cpu() for _, facade in facades(model)]
        made[device] = weights, torch.cat(outputs)
    for here, there in zip(made["cpu"][0], made["cuda"][0], strict=True):
        assert torch.equal(there, here)
    # A number of an input that is halfway between two codes may become the other one.
    assert relative(made["cuda"][1], made["cpu"][1]) < 5e-3


@pytest.mark.parametrize("method", ["fp8", "rtn"])
@pytest.mark.parametrize(
    ("here", "there"),
    [
        ("cpu", "cpu"),
        pytest.param("cpu", "cuda", marks=pytest.mark.cuda),
        pytest.param("cuda", "cpu", marks=pytest.mark.cuda),
    ],
)
def test_what_one_device_saved_another_loads(here, there, method, tmp_path):
    """With codes that single tokens are multiplied with, as they were."""
    model = quantadapt.quantize(
        str(small_model()),
        "inc",
        device=here,
        dtype="bfloat16",
        method=method,
        calibration=calibration_examples(),
    )
    loaded = quantadapt.load(quantadapt.save(model, tmp_path / "saved"), device=there)
    both = list(zip(facades(model), facades(loaded), strict=True))
    assert both
    for (name, made), (same_name, layer) in both:
        assert (name, layer.device.type) == (same_name, there)
        assert torch.equal(layer.dequantize().cpu(), made.dequantize().cpu())
        x = torch.randn(1, layer.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
        given = layer.target.inputs_of_codes(layer.vendor, x.to(there)).cpu()
        assert torch.equal(given, made.target.inputs_of_codes(made.vendor, x.to(here)).cpu())
        bytes_of, words_of = layer.target.byte_codes, layer.target.word_codes
        codes = bytes_of(layer.vendor) if method == "fp8" else words_of(layer.vendor)
        if method == "fp8":
            weight = codes.held.float().cpu() * codes.grid.scale.cpu()
        else:
            weight = of_words(replace(codes, held=codes.held.cpu(), scale=codes.scale.cpu()))
        assert relative(weight, made.dequantize().float().cpu()) < 4e-3


def test_inc_on_another_device_is_told(monkeypatch, examples):
    from neural_compressor.torch.utils import auto_accelerator

    class Cuda:
        def name(self):
            return "cuda"

    monkeypatch.setattr(auto_accelerator, "auto_detect_accelerator", lambda name="": Cuda())
    vendor._import_for.cache_clear()
    with pytest.raises(PluginError, match=r"for cuda earlier(.|\n)*INC_TARGET_DEVICE=cpu"):
        quantized(Blocks(), examples)


def test_an_unwrapped_module_is_incs(examples):
    model = unwrap(quantized(Blocks(), examples))
    assert {type(block.up).__name__ for block in model.blocks} == {"PatchedLinear"}


# The page --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_page_about_any_module(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INC_TARGET_DEVICE", "cpu")
    text = PAGE.read_text(encoding="utf-8")
    names: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    output, error = names["output"], names["error"]
    dense, examples = output(names["make"]()), names["examples"]
    shares = {
        text: float(percent) / 100
        for text, percent in re.findall(r"^\| `(.+?)` \|.*; ([\d.]+)% \|$", text, re.MULTILINE)
    }
    assert len(shares) == 4
    for options, share in shares.items():
        given = eval(f"dict({options})")
        model = quantadapt.quantize(
            names["make"](), "inc", device="cpu", dtype="float32", calibration=examples, **given
        )
        assert error(output(model), dense) == pytest.approx(share, rel=0.15)
    assert names["losses"][-1] < 0.9 * names["losses"][0]
    assert error(output(names["model"]), output(names["merged"])) < 0.07
    quantized, tuned = names["quantized"], output(names["dense"])
    quantized.enable_adapters()
    assert error(output(quantized), tuned) < 0.07
    assert error(tuned, dense) > 0.3
