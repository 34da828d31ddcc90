"""compressed-tensors: schemes, checkpoints of the library in every format, and the suite."""

# ruff: noqa: RUF012 (options are given as a plain dict)

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from datasets import Dataset
from merging import moved
from quantadapt_compressed_tensors import METHOD, CompressedTensors
from quantadapt_compressed_tensors.inputs import RANGE
from quantadapt_compressed_tensors.schemes import SCHEMES
from safetensors.torch import load_file
from test_experts_merging import dense_lora
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

import quantadapt as qa
from quantadapt.facade import QuantLinear, facades
from quantadapt.testing import AdapterSuite, BackendSuite, TargetSuite
from quantadapt.testing.bench import weight_bytes
from quantadapt.testing.tensors import relative


class TestW4A16(BackendSuite):
    backend = "compressed-tensors"


class TestW4A16Asymmetric(TargetSuite):
    backend = "compressed-tensors"
    options = {"scheme": "W4A16_ASYM", "group_size": 64}


class TestW8A8(TargetSuite, AdapterSuite):
    backend = "compressed-tensors"
    options = {"scheme": "W8A8"}
    adapters = ("lora", "dora")


class TestFP8Block(TargetSuite):
    backend = "compressed-tensors"
    options = {"scheme": "FP8_BLOCK"}


class TestNVFP4A16(TargetSuite):
    backend = "compressed-tensors"
    options = {"scheme": "NVFP4A16"}


class TestMXFP4A16(TargetSuite):
    backend = "compressed-tensors"
    options = {"scheme": "MXFP4A16"}


# The library's own checkpoints -------------------------------------------------------------------

GROUPS = {"weights": {"num_bits": 4, "strategy": "group", "group_size": 32}}
OTHERS: dict[str, Any] = {
    "W4A16 groups of 32": GROUPS,
    "W4A16 asymmetric": {"weights": {**GROUPS["weights"], "symmetric": False}},
    "W4A16 rows": {"weights": {"num_bits": 4, "strategy": "channel"}},
    "W4A16 asymmetric rows": {
        "weights": {"num_bits": 4, "strategy": "channel", "symmetric": False}
    },
    "W4A16 whole": {"weights": {"num_bits": 4, "strategy": "tensor"}},
    "W3A16": {"weights": {"num_bits": 3, "strategy": "group", "group_size": 32}},
    "W5A16 asymmetric": {
        "weights": {"num_bits": 5, "strategy": "group", "group_size": 64, "symmetric": False}
    },
    "W8A16 rows": {"weights": {"num_bits": 8, "strategy": "channel"}},
    "W8A8 asymmetric": {
        "weights": {"num_bits": 8, "strategy": "channel", "symmetric": False},
        "input_activations": {"strategy": "token", "dynamic": True, "symmetric": False},
    },
    "W8A8 static": {
        "weights": {"num_bits": 8, "strategy": "tensor"},
        "input_activations": {"strategy": "tensor"},
    },
    "FP8 weights alone": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}},
}
"""Groups of configs that have no name here."""
KINDS = [*SCHEMES, *OTHERS]
SOURCE = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
IDS = torch.arange(48).reshape(2, 24) + 3
HELD_OUT = Dataset.from_dict({"input_ids": IDS.tolist(), "completion_mask": [[1] * 24] * 2})


def scheme_of(kind: str) -> QuantizationScheme:
    if kind in OTHERS:
        return QuantizationScheme(targets=["Linear"], **OTHERS[kind])
    return preset_name_to_scheme(kind, ["Linear"])


def tiny(*, bias: bool = True, tied: bool = False) -> Any:
    torch.manual_seed(0)
    more = {"attention_bias": bias, "mlp_bias": bias, "tie_word_embeddings": tied}
    model = LlamaForCausalLM(LlamaConfig(**SOURCE, **more)).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.ndim > 1:
            parameter.normal_(0, 0.1)
        elif bias:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def ends(weight: Tensor, args: Any) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Return the smallest and largest number of what shares a scale, and the shape of scales."""
    rows, columns = weight.shape
    if args.strategy == "tensor":
        return weight.min(), weight.max(), (1,)
    height, width = args.block_structure or (1, args.group_size or columns)
    blocks = weight.view(rows // height, height, columns // width, width)
    return blocks.amin((1, 3)), blocks.amax((1, 3)), (rows // height, columns // width)


def calibrated(layer: Any) -> None:
    """Give a layer of the library its scales: of its weight, and of inputs from -4 to 4."""
    for name, args in (
        ("weight", layer.quantization_scheme.weights),
        ("input", layer.quantization_scheme.input_activations),
    ):
        if args is None or args.dynamic is True:
            continue
        value = layer.weight.data if name == "weight" else torch.tensor([[-4.0, 4.0]])
        whole = None
        if args.strategy == "tensor_group":
            whole = generate_gparam(*value.aminmax())
            getattr(layer, f"{name}_global_scale").data.copy_(whole)
        if args.dynamic:
            continue
        low, high, shape = ends(value, args)
        scale, zero = calculate_qparams(low, high, args, global_scale=whole)
        getattr(layer, f"{name}_scale").data.copy_(scale.view(shape))
        if not args.symmetric:
            getattr(layer, f"{name}_zero_point").data.copy_(zero.view(shape))


def compressed(model: Any, kind: str, ignore: tuple[str, ...] = ("lm_head",)) -> ModelCompressor:
    """Quantize and pack a model by the library."""
    groups = {"group_0": scheme_of(kind)}
    config = QuantizationConfig(config_groups=groups, ignore=list(ignore))
    apply_quantization_config(model, config, show_progress=False)
    for layer in model.modules():
        if hasattr(layer, "quantization_scheme"):
            calibrated(layer)
            layer.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    return compressor


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Return the folder of a checkpoint that the library wrote."""
    root = tmp_path_factory.mktemp("compressed")

    def folder(kind: str, **options: Any) -> str:
        place = root / "-".join([kind, *map(str, options.values())]).replace(" ", "-")
        if not place.exists():
            model = tiny(**options)
            compressor = compressed(model, kind)
            model.save_pretrained(place)
            compressor.update_config(str(place))
        return str(place)

    return folder


def adopted(folder: str | Path) -> Any:
    return qa.quantize(str(folder), METHOD, device="cpu", dtype="float32")


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(input_ids=IDS).logits.float()
    return found


def stock(folder: str | Path, **options: Any) -> Any:
    """What transformers loads; `dequantize` leaves inputs as they are."""
    if options:
        options = {"quantization_config": CompressedTensorsConfig(**options)}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def as_served(folder: str | Path, kind: str) -> Tensor:
    """Return what the library computes with a checkpoint in float32. Floats of 4 bits and MX it
    unpacks to bfloat16, zero points that are packed it cannot load packed: there, what rounds
    inputs is the library's, and weights are what the format says, in float64."""
    scheme = scheme_of(kind)
    weights = scheme.weights
    coarse = weights.type == "float" and (weights.num_bits == 4 or weights.scale_dtype is not None)
    if not coarse and (weights.symmetric or scheme.input_activations):
        return logits(stock(folder))
    model, files = stock(folder, dequantize=True), load_file(f"{folder}/model.safetensors")
    inputs = QuantizationScheme(targets=["Linear"], input_activations=scheme.input_activations)
    config = QuantizationConfig(config_groups={"group_0": inputs}, ignore=["lm_head"])
    apply_quantization_config(model, config, show_progress=False)
    for name, layer in model.named_modules():
        if f"{name}.weight_scale" not in files:
            continue
        layer.quantization_status = QuantizationStatus.FROZEN
        if coarse:
            layer.weight.data = exact(name, files).float()
        if f"{name}.input_global_scale" in files:
            layer.input_global_scale.data.copy_(files[f"{name}.input_global_scale"])
    return logits(model)


def exact(name: str, files: dict[str, Tensor]) -> Tensor:
    """Return a weight of floats with scales of groups, float64."""
    scale = files[f"{name}.weight_scale"]
    powers = scale.dtype == torch.uint8
    scale = torch.exp2(scale.double() - 127) if powers else scale.double()
    scale = scale / files.get(f"{name}.weight_global_scale", torch.ones(1)).double()
    if (packed := files.get(f"{name}.weight_packed")) is None:
        codes = files[f"{name}.weight"].double()
    else:
        table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]).double()
        table = torch.cat([table, -table])
        codes = torch.stack([table[packed.long() % 16], table[packed.long() // 16]], -1).flatten(1)
    return codes * scale.repeat_interleave(codes.shape[1] // scale.shape[1], 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_the_library_is_adopted_as_it_is_served(
    kind: str, checkpoint: Any, tmp_path: Path
) -> None:
    """It answers as the library does, stays packed in memory, and is written as it was."""
    folder = checkpoint(kind)
    model = adopted(folder)
    expected = as_served(folder, kind)
    assert relative(logits(model), expected) <= 1e-5
    files = load_file(f"{folder}/model.safetensors")
    held = sum(t.nbytes for n, t in files.items() if "proj" in n and not n.endswith("bias"))
    layers = dict(facades(model))
    assert len(layers) == 7
    assert held == sum(weight_bytes(facade) for facade in layers.values())
    qa.save(model, tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == files.keys()
    assert [n for n in files if not _same(files[n], again[n])] == []
    for place in (folder, tmp_path / "again"):
        config = json.loads(Path(place, "config.json").read_text())["quantization_config"]
        read = [QuantizationConfig.model_validate(config).config_groups["group_0"]]
    assert read[0].weights.model_dump() == read[-1].weights.model_dump()
    assert relative(as_served(tmp_path / "again", kind), expected) == 0


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.float().equal(other.float())


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_rounded_as_the_library_rounds_it(kind: str, checkpoint: Any) -> None:
    """Quantized here, a layer has the tensors that the library makes of it, to the bit."""
    files = load_file(f"{checkpoint(kind)}/model.safetensors")
    group = scheme_of(kind).model_dump(mode="json")
    quantizer = CompressedTensors(scheme=None, config_groups={"group_0": group})
    name = "model.layers.0.mlp.down_proj"
    linear = tiny().get_submodule(name)
    setattr(linear, RANGE, (torch.tensor(-4.0), torch.tensor(4.0)))
    made = quantizer.quantize_linear(linear).state_dict()
    theirs = {n.removeprefix(f"{name}."): t for n, t in files.items() if n.startswith(name)}
    assert made.keys() == theirs.keys()
    assert [key for key in made if not _same(made[key], theirs[key])] == []


@pytest.mark.parametrize("kind", ["W4A16 asymmetric", "W8A8", "FP8", "NVFP4"])
@pytest.mark.parametrize("adapter", ["lora", "dora", "ia3"])
def test_an_adapter_is_trained_on_it_and_merged_into_its_format(
    adapter: str, kind: str, checkpoint: Any, tmp_path: Path
) -> None:
    """The files merged are those of a quantized model, in the format that the base has, which the
    library reads as we do; dense they are what stock PEFT makes of the library's weights."""
    folder = checkpoint(kind)
    model = moved(qa.attach(adopted(folder), adapter))
    found = qa.merge(model, tmp_path / "q", kind="requantize", data=HELD_OUT)
    assert found["kl"] < 1
    merged = tmp_path / "q" / "merged"
    assert relative(logits(adopted(merged)), as_served(merged, kind)) <= 1e-5
    before, after = (load_file(f"{at}/model.safetensors") for at in (folder, merged))
    assert before.keys() == after.keys()
    assert {n: t.dtype for n, t in before.items()} == {n: t.dtype for n, t in after.items()}
    assert any(not _same(before[n], after[n]) for n in before)
    if adapter == "lora":
        qa.merge(model, tmp_path / "dense", kind="dense", data=HELD_OUT)
        right = dense_lora(stock(folder, dequantize=True), model).merge_and_unload()
        theirs, ours = right.state_dict(), stock(tmp_path / "dense" / "merged").state_dict()
        coarse = 5e-3 if kind == "NVFP4" else 1e-6
        assert max(relative(ours[n], t) for n, t in theirs.items()) <= coarse


def test_training_rounds_inputs_as_serving_does() -> None:
    """The forward in training is the library's; the gradient goes straight through."""
    torch.manual_seed(0)
    linear = nn.Linear(128, 64)
    vendor = CompressedTensors(scheme="W8A8").quantize_linear(linear)
    facade = QuantLinear(vendor, CompressedTensors(scheme="W8A8").target, torch.float32)
    x = torch.randn(2, 5, 128, requires_grad=True)
    scale = x.detach().abs().amax(-1, keepdim=True) / 127.5
    rounded = (x.detach() / scale).round().clamp(-128, 127).double() * scale.double()
    codes, scales = vendor.weight.double(), vendor.weight_scale.double()
    expected = rounded @ (codes * scales).T + linear.bias.double()
    for training in (True, False):
        facade.train(training)
        assert relative(facade(x), expected) < 1e-6
    facade(x).sum().backward()
    assert relative(x.grad, (codes * scales).sum(0).expand_as(x)) < 1e-6
    assert relative(facade(x[:, 0]), expected[:, 0]) < 1e-6  # tokens in a row of their own
