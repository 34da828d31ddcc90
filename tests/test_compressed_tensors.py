"""compressed-tensors: schemes, checkpoints of the library in every format, and the suite."""

# ruff: noqa: RUF012 (options are given as a plain dict)

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from datasets import Dataset
from merging import moved
from parameters import slow_but
from quantadapt_compressed_tensors import METHOD, CompressedTensors, LeftOutWarning
from quantadapt_compressed_tensors.inputs import RANGE
from quantadapt_compressed_tensors.layers import rounded_inputs
from quantadapt_compressed_tensors.schemes import SCHEMES
from safetensors.torch import load_file, save_file
from test_experts_backends import dense_model
from test_experts_merging import dense_lora
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

import quantadapt as qa
from quantadapt.adapting.merge_aware import make_merge_aware
from quantadapt.errors import ModelError, PlanRefused, QuantadaptError
from quantadapt.exporting.merging import merged_model
from quantadapt.exporting.stage import write
from quantadapt.exporting.tuned import Tuned
from quantadapt.facade import QuantLinear, facades, linear_facades, stack_facades
from quantadapt.planning import plan
from quantadapt.planning.exports import export_of
from quantadapt.quantizing.state import state_of
from quantadapt.spec import Spec
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
OFTEN = ("W4A16", "W8A8", "FP8", "NVFP4", "MXFP4A16", "W4A16 asymmetric", "W8A8 static", "W3A16")
"""Of each way to round and to pack one; the others are tried where there is time."""
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


@pytest.mark.parametrize("kind", slow_but(KINDS, *OFTEN))
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


@pytest.mark.parametrize("kind", slow_but(KINDS, *OFTEN))
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
@pytest.mark.parametrize("adapter", slow_but(["lora", "dora", "ia3"], "dora"))
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [k for k in KINDS if scheme_of(k).input_activations])
def test_inputs_are_rounded_as_the_library_rounds_them(kind: str, dtype: Any) -> None:
    """Bit by bit, zeros and single large numbers too."""
    scheme = scheme_of(kind)
    group = {"group_0": scheme.model_dump(mode="json")}
    quantizer = CompressedTensors(scheme=None, config_groups=group)
    linear = nn.Linear(256, 128, bias=False).to(dtype)
    setattr(linear, RANGE, (torch.tensor(-3.0), torch.tensor(2.0)))
    vendor: Any = quantizer.quantize_linear(linear)
    vendor.quantization_status = QuantizationStatus.FROZEN
    x = torch.randn(2, 7, 256).to(dtype)
    x[0, 0], x[1, 3, 5], x[1, 4, :128] = 0, 100, 0
    expected = forward_quantize(vendor, x, "input", scheme.input_activations).to(dtype)
    assert torch.equal(rounded_inputs(vendor, x), expected)


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


# Kinds of checkpoints ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"bias": False}, {"tied": True}])
def test_other_models_are_adopted(options: dict[str, bool], checkpoint: Any) -> None:
    folder = checkpoint("W4A16 asymmetric", **options)
    assert relative(logits(adopted(folder)), as_served(folder, "W4A16 asymmetric")) < 1e-5


def rewritten(folder: str | Path, place: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Copy a checkpoint, with another config."""
    shutil.copytree(folder, place)
    config = json.loads((place / "config.json").read_text())
    change(config["quantization_config"])
    (place / "config.json").write_text(json.dumps(config))
    return place


def in_groups_by_activation(folder: Path) -> dict[str, Tensor]:
    """Give the columns of each layer groups of their own, as GPTQ does with `actorder: group`, and
    return the weights that are meant, float64."""
    files = load_file(folder / "model.safetensors")
    meant = {}
    for name in [n.removesuffix(".weight_packed") for n in files if n.endswith("_packed")]:
        rows, columns = files[f"{name}.weight_shape"].tolist()
        codes = unpack_from_int32(files[f"{name}.weight_packed"], 4, (rows, columns)).double()
        scale = files[f"{name}.weight_scale"].double()
        group = torch.arange(columns) // (columns // scale.shape[1])
        group = group[torch.randperm(columns, generator=torch.Generator().manual_seed(columns))]
        files[f"{name}.weight_g_idx"] = group.int()
        meant[name] = torch.stack([codes[:, n] * scale[:, group[n]] for n in range(columns)], 1)
    save_file(files, folder / "model.safetensors", metadata={"format": "pt"})
    return meant


def test_columns_with_groups_of_their_own(checkpoint: Any, tmp_path: Path) -> None:
    """GPTQ's `actorder: group`, which newer libraries do not read any more."""

    def change(config: dict[str, Any]) -> None:
        config["config_groups"]["group_0"]["weights"]["actorder"] = "group"

    folder = rewritten(checkpoint("W4A16 groups of 32"), tmp_path / "base", change)
    meant = in_groups_by_activation(folder)
    model = adopted(folder)
    for name, facade in linear_facades(model):
        assert relative(facade.dequantize(), meant[name]) < 1e-6
        again = facade.target.requantize(facade.vendor, facade.dequantize())
        assert torch.equal(facade.target.dequantize(again), facade.dequantize())
        grid = facade.target.grid(facade.vendor)
        assert torch.equal(grid.nearest(facade.dequantize()), facade.dequantize())
        other = facade.dequantize() * 1.5 + 0.01
        exact = facade.target.dequantize(facade.target.requantize(facade.vendor, other))
        assert relative(exact, other) < 0.15
    merged = merged_model(moved(qa.attach(model, "lora")), "requantize")
    state_of(model).quantizer.save(merged, tmp_path / "merged")
    assert relative(logits(adopted(tmp_path / "merged")), logits(merged)) < 1e-6


@pytest.mark.parametrize("kind", ["NVFP4A16", "NVFP4", "MXFP4"])
def test_configs_that_leave_out_what_scales_are_in(
    kind: str, checkpoint: Any, tmp_path: Path
) -> None:
    """As those of older libraries: merged, weights are rounded onto scales of the same kind."""

    def change(config: dict[str, Any]) -> None:
        for args in config["config_groups"]["group_0"].values():
            if isinstance(args, dict):
                args.pop("scale_dtype", None)

    folder = rewritten(checkpoint(kind), tmp_path / "base", change)
    model = adopted(folder)
    assert relative(logits(model), logits(adopted(checkpoint(kind)))) == 0
    for name, facade in linear_facades(model):
        weight = facade.dequantize() * torch.linspace(0.5, 1.5, facade.in_features)
        made = facade.target.requantize(facade.vendor, weight)
        files = {f"{name}.{key}": tensor for key, tensor in made.state_dict().items()}
        assert relative(exact(name, files), weight) < 0.15
        assert relative(facade.target.dequantize(made), exact(name, files)) < 1e-6


def test_groups_of_several_kinds(tmp_path: Path) -> None:
    """FP8 for attention and 4 bits for the rest, as in Kimi's; all of it is written again."""
    model = tiny(bias=False)
    groups = {
        "attention": QuantizationScheme(
            targets=["re:.*self_attn.*"], **scheme_of("FP8_DYNAMIC").model_dump(exclude={"targets"})
        ),
        "rest": QuantizationScheme(targets=["re:.*mlp.*"], **OTHERS["W4A16 groups of 32"]),
    }
    config = QuantizationConfig(config_groups=groups, ignore=["lm_head"])
    apply_quantization_config(model, config, show_progress=False)
    for layer in model.modules():
        if hasattr(layer, "quantization_scheme"):
            calibrated(layer)
            layer.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "base")
    compressor.update_config(str(tmp_path / "base"))
    found = adopted(tmp_path / "base")
    expected = logits(stock(tmp_path / "base"))
    assert relative(logits(found), expected) < 1e-5
    tuned = moved(qa.attach(found, "lora"))
    qa.merge(tuned, tmp_path, kind="requantize", data=HELD_OUT)
    merged = tmp_path / "merged"
    assert relative(logits(adopted(merged)), logits(stock(merged))) < 1e-5
    assert relative(logits(adopted(merged)), expected) > 1e-3


def test_a_cache_that_is_rounded_is_told(checkpoint: Any, tmp_path: Path) -> None:
    """Its scales are left out, and said to be."""

    def change(config: dict[str, Any]) -> None:
        config["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "strategy": "tensor"}

    folder = rewritten(checkpoint("FP8_DYNAMIC"), tmp_path / "base", change)
    files = load_file(folder / "model.safetensors")
    files["model.layers.0.self_attn.k_proj.output_scale"] = torch.ones(1)
    save_file(files, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(LeftOutWarning, match="kv_cache_scheme"):
        model = adopted(folder)
    assert relative(logits(model), as_served(checkpoint("FP8_DYNAMIC"), "FP8_DYNAMIC")) < 1e-5


@pytest.mark.parametrize("kind", ["W4A16", "W8A8", "FP8"])
def test_a_live_model_of_the_library_is_adopted(kind: str, checkpoint: Any) -> None:
    """While it is packed; after its first forward it holds floats, and is refused."""
    folder = checkpoint(kind)
    expected = as_served(folder, kind)
    model = stock(folder)
    live = qa.quantize(model, METHOD, device="cpu")
    assert len(dict(facades(live))) == 7
    assert relative(logits(live), expected) < 1e-5
    tuned = moved(qa.attach(live, "lora"))
    merged = merged_model(tuned, "requantize")
    assert relative(logits(merged), expected) > 1e-4
    run = stock(folder)
    logits(run)
    with pytest.raises(QuantadaptError, match="holds floats"):
        qa.quantize(run, METHOD, device="cpu")


# Quantizing here ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["FP8", "NVFP4"])
def test_scales_of_inputs_come_from_calibration(kind: str, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "dense")
    examples = [{"input_ids": torch.arange(40)[None] + 3 * n} for n in (1, 2)]
    with pytest.raises(QuantadaptError, match="calibrates"):
        qa.quantize(str(tmp_path / "dense"), METHOD, scheme=kind, device="cpu")
    model = qa.quantize(
        str(tmp_path / "dense"),
        METHOD,
        scheme=kind,
        device="cpu",
        dtype="float32",
        calibration=examples,
    )
    seen: list[Tensor] = []
    dense = tiny()
    name = "model.layers.0.mlp.down_proj"
    dense.get_submodule(name).register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    for example in examples:
        dense(**example)
    largest = max(float(x.abs().max()) for x in seen)
    vendor = model.get_submodule(name).vendor
    if kind == "FP8":
        assert float(vendor.input_scale) == pytest.approx(largest / 448)
    else:
        assert float(vendor.input_global_scale) == pytest.approx(448 * 6 / largest)
    expected = logits(model)
    qa.save(model, tmp_path / "base")
    assert relative(logits(qa.load(tmp_path / "base")), expected) == 0
    assert relative(as_served(tmp_path / "base", kind), expected) < 1e-5
    assert relative(expected, logits(dense)) < (0.2 if kind == "FP8" else 0.6)


def test_options_that_exclude_each_other_are_refused() -> None:
    for options, told in (
        ({"scheme": "W8A8", "group_size": 64}, "group_size"),
        ({"scheme": None}, "either"),
        ({"config_groups": {"group_0": {}}}, "either"),
        ({"scheme": None, "config_groups": {"group_0": {"weights": {"num_bits": 9}}}}, "num_bits"),
        ({"scheme": "W4A16", "group_size": 0}, "group_size"),
        ({"scheme": "W5A5"}, "scheme"),
    ):
        with pytest.raises(PlanRefused, match=told):
            qa.quantize(tiny(), METHOD, **options)


def test_sizes_that_groups_do_not_divide_are_told() -> None:
    with pytest.raises(PlanRefused, match="groups of 48 do not divide its 128 inputs"):
        qa.quantize(tiny(), METHOD, group_size=48)
    with pytest.raises(ModelError, match="groups of inputs of 128"):
        CompressedTensors(scheme="FP8_BLOCK").quantize_linear(nn.Linear(320, 96))


@pytest.mark.parametrize("scheme", ["W8A16", "FP8_DYNAMIC", "NVFP4A16", "MXFP4A16", "MXFP8A16"])
def test_transformers_runs_what_was_made_in_float32(scheme: str, tmp_path: Path) -> None:
    """Without a word of dtypes: what the library unpacks to bfloat16 runs in that."""
    tiny().save_pretrained(tmp_path / "dense")
    options = {"scheme": scheme, "dtype": "float32", "device": "cpu"}
    model = qa.quantize(str(tmp_path / "dense"), METHOD, **options)
    qa.save(model, tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    coarse = scheme.startswith(("NV", "MX"))
    assert loaded.dtype == (torch.bfloat16 if coarse else torch.float32)
    assert relative(logits(loaded), logits(model)) < (2e-2 if coarse else 1e-5)


# Experts -----------------------------------------------------------------------------------------

MIXTURES = ("Qwen3-MoE", "Mixtral", "DeepSeek-V3")
OF_EXPERTS: dict[str, dict[str, Any]] = {
    "W4A16": {"group_size": 32},
    "W4A16_ASYM": {"group_size": 32},
    "W8A8": {},
    "FP8_DYNAMIC": {},
    "NVFP4A16": {},
    "MXFP4A16": {},
}


@pytest.mark.parametrize("scheme", OF_EXPERTS)
@pytest.mark.parametrize("family", slow_but(MIXTURES, "Mixtral"))
def test_experts_are_written_one_by_one(family: str, scheme: str, tmp_path: Path) -> None:
    """As the library has them; read again they are the same stacks. transformers reads those of 4
    bit integers and FP8 (of asymmetric and int8 ones none, and of NVFP4 it drops a scale)."""
    dense_model(family).save_pretrained(tmp_path / "dense")
    options = {"scheme": scheme, **OF_EXPERTS[scheme], "dtype": "float32", "device": "cpu"}
    model = qa.quantize(str(tmp_path / "dense"), METHOD, **options)
    qa.save(model, tmp_path / "base")
    names = load_file(tmp_path / "base" / "model.safetensors").keys()
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    experts = {n.removesuffix(".weight") for n in dense if ".experts." in n}
    code = "weight_packed" if "4" in scheme else "weight"
    assert {f"{name}.{code}" for name in experts} <= names
    again = qa.load(tmp_path / "base")
    stacks = dict(stack_facades(model))
    assert len(stacks) == 2
    for name, facade in stack_facades(again):
        assert torch.equal(facade.dequantize(), stacks[name].dequantize())
        assert facade.vendor.parts in (4, 8)
        rounded = facade.dequantize() * 1.1
        kept = facade.target.dequantize(facade.target.requantize(facade.vendor, rounded))
        assert relative(kept, rounded) < 0.15
        grid = facade.target.grid(facade.vendor)
        packed = facade.target.repack(facade.vendor, rounded)
        assert torch.equal(facade.target.dequantize(packed), grid.nearest(rounded))
    assert relative(logits(again), logits(model)) < 1e-6
    if scheme == "W4A16":
        assert relative(logits(stock(tmp_path / "base", dequantize=True)), logits(model)) < 1e-5


@pytest.mark.parametrize("strategy", ["tensor", "block"])
def test_scales_of_whole_experts_are_kept(strategy: str, tmp_path: Path) -> None:
    """FP8 with one scale for an expert, or blocks larger than it: the stack has them by row, files
    have them as they were."""
    base = tmp_path / "base"
    dense_model("Mixtral").save_pretrained(base)
    weights = {"num_bits": 8, "type": "float", "strategy": strategy}
    if strategy == "block":
        weights["block_structure"] = [48, 64]
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    files = load_file(base / "model.safetensors")
    exact = {}
    for name in [n for n in files if ".experts." in n]:
        rows, columns = files[name].shape
        height, width = (rows, columns) if strategy == "tensor" else (48, 64)
        shape = (-(-rows // height), -(-columns // width))
        scale = (
            torch.rand(shape, generator=torch.Generator().manual_seed(len(exact))) * 0.001 + 1e-3
        )
        spread = scale.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)
        files[name] = (files[name] / spread[:, :columns]).to(torch.float8_e4m3fn)
        files[name + "_scale"] = scale.view(1) if strategy == "tensor" else scale
        exact[name] = files[name].double() * spread[:, :columns].double()
    save_file(files, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": METHOD,
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [],
    }
    (base / "config.json").write_text(json.dumps(config))
    model = adopted(base)
    for name, facade in stack_facades(model):
        parts = ("w1", "w3") if "gate_up" in name else ("w2",)
        meant = torch.cat(
            [
                exact[f"model.layers.0.block_sparse_moe.experts.{n}.{part}.weight"]
                for n in range(4)
                for part in parts
            ]
        )
        assert relative(facade.dequantize(), meant) < 1e-6
    qa.save(model, tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == files.keys()
    assert [n for n in files if not _same(files[n], again[n])] == []
    merged = merged_model(moved(qa.attach(model, "lora", r=2)), "requantize")
    state_of(model).quantizer.save(merged, tmp_path / "merged")
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert {n: t.shape for n, t in written.items()} == {n: t.shape for n, t in files.items()}


# Bad input ---------------------------------------------------------------------------------------


def _damages() -> dict[str, Callable[[dict[str, Tensor], str], None]]:
    def lost(key: str) -> Any:
        return lambda files, name: files.pop(f"{name}.{key}")

    def put(key: str, made: Callable[[Tensor], Tensor]) -> Any:
        def change(files: dict[str, Tensor], name: str) -> None:
            files[f"{name}.{key}"] = made(files[f"{name}.{key}"]).contiguous()

        return change

    def nan(tensor: Tensor) -> Tensor:
        tensor.view(-1)[3] = float("nan")
        return tensor

    return {
        "no scales": lost("weight_scale"),
        "no codes": lost("weight_packed"),
        "no zero points": lost("weight_zero_point"),
        "nan in scales": put("weight_scale", nan),
        "too few scales": put("weight_scale", lambda t: t[:, :1]),
        "scales of other rows": put("weight_scale", lambda t: t[:-1]),
        "codes cut": put("weight_packed", lambda t: t[:, :-1]),
        "codes of another dtype": put("weight_packed", lambda t: t.float()),
        "zero points not packed": put("weight_zero_point", lambda t: t.to(torch.int8)),
        "another shape": put("weight_shape", lambda t: t.flip(0)),
        "a tensor more": lambda files, name: files.update({f"{name}.weight_extra": torch.ones(1)}),
    }


@pytest.mark.parametrize("damage", _damages())
def test_damaged_tensors_are_refused_by_name(damage: str, checkpoint: Any, tmp_path: Path) -> None:
    folder = rewritten(checkpoint("W4A16 asymmetric"), tmp_path / "base", lambda config: None)
    files = load_file(folder / "model.safetensors")
    _damages()[damage](files, "model.layers.0.mlp.down_proj")
    save_file(files, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QuantadaptError, match=r"model\.layers\.0\.mlp\.down_proj"):
        adopted(folder)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"format": "marlin-24"}, "marlin-24"),
        ({"format": "dense"}, "dense"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "rotated"),
        ({"quantization_status": "frozen"}, "frozen"),
        ({"config_groups": {}}, "config_groups"),
        ({"config_groups": {"group_0": {"targets": ["Linear"]}}}, "weights"),
        ({"config_groups": {"group_0": {"weights": {"num_bits": "many"}}}}, "num_bits"),
        ({"config_groups": {"group_0": {"weights": {"strategy": "group"}}}}, "group_size"),
        (
            {"config_groups": {"group_0": {"weights": {}, "output_activations": {"num_bits": 8}}}},
            "comes out",
        ),
        ({"config_groups": {"g": {"targets": ["Embedding"], "weights": {}}}}, "embeddings"),
    ],
)
def test_configs_that_are_not_read_are_refused(
    changed: dict[str, Any], told: str, checkpoint: Any, tmp_path: Path
) -> None:
    """While planning, before any weight is read."""

    def change(config: dict[str, Any]) -> None:
        for group in config["config_groups"].values():
            del group["format"]
        config.update(changed)

    folder = rewritten(checkpoint("W4A16 asymmetric"), tmp_path / "base", change)
    (folder / "model.safetensors").unlink()
    with pytest.raises(PlanRefused, match=told):
        plan(Spec(model=str(folder), backend=METHOD))


# The export --------------------------------------------------------------------------------------


def exported(model: Any, folder: Path, **options: Any) -> dict[str, Any]:
    """Write the export as `quantadapt export` does, and return its figures."""
    planned = export_of(METHOD, options)
    tuned = Tuned(model, data=lambda tokenizer: HELD_OUT)
    found = write(planned.exporter, tuned, folder, overwrite=False)
    return {name: figure.value for name, figure in found.items()}


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8", "FP8", "FP8_DYNAMIC", "NVFP4", "MXFP4A16"])
@pytest.mark.parametrize("backend", slow_but(["hqq", "bnb-nf4"], "bnb-nf4"))
def test_any_base_is_exported_by_a_scheme(backend: str, scheme: str, tmp_path: Path) -> None:
    """The files are those of the library, of the merged weights rounded by the library's rules."""
    tiny(bias=False).save_pretrained(tmp_path / "base")
    model = qa.quantize(str(tmp_path / "base"), backend, dtype="float32", device="cpu")
    tuned = moved(qa.attach(model, "lora"))
    folder = tmp_path / "served"
    found = exported(tuned, folder, scheme=scheme, min_gain=0)
    needed = export_of(METHOD, {"scheme": scheme}).exporter.needed(Tuned(tuned))
    assert needed == pytest.approx((folder / "model.safetensors").stat().st_size, rel=0.05)
    assert 0 < found["kl"] < 2
    assert found["dense_layers"] == 0
    dense = merged_model(tuned, "dense")
    for name, facade in linear_facades(adopted(folder)):
        off = relative(facade.dequantize(), dense.get_submodule(name).weight)
        assert off < (0.15 if "4" in scheme else 0.03), name
    assert relative(logits(qa.load(folder)), as_served(folder, scheme)) < 1e-5


def test_layers_without_an_adapter_keep_the_values_of_a_base_that_fits(
    checkpoint: Any, tmp_path: Path
) -> None:
    """Exported by the scheme that they have, what nobody trained has the bytes that it had."""
    folder = checkpoint("W4A16 asymmetric", bias=False)
    tuned = moved(qa.attach(adopted(folder), "lora", target_modules=["q_proj", "v_proj"]))
    exported(tuned, tmp_path / "served", scheme="W4A16_ASYM", group_size=32, min_gain=0)
    before, after = (
        load_file(place / "model.safetensors") for place in (Path(folder), tmp_path / "served")
    )
    assert before.keys() == after.keys()
    same = {name for name in before if _same(before[name], after[name])}
    changed = {name.split(".")[-2] for name in before.keys() - same}
    assert changed == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    ("backend", "options", "scheme"),
    [
        (METHOD, {"scheme": "W4A16", "group_size": 32}, {"scheme": "W4A16", "group_size": 32}),
        ("mxfp4", {}, {"scheme": "MXFP4A16"}),
        ("torchao-fp8", {}, {"scheme": "FP8_DYNAMIC"}),
    ],
)
def test_what_an_adapter_adds_is_kept_by_the_scheme_of_its_base(
    backend: str, options: dict[str, Any], scheme: dict[str, Any], tmp_path: Path
) -> None:
    """Changes of a few hundredths of a step, which the nearest values would all lose."""
    tiny(bias=False).save_pretrained(tmp_path / "base")
    how = {"dtype": "float32", "device": "cpu", **options}
    model = qa.quantize(str(tmp_path / "base"), backend, **how)
    before = {name: facade.dequantize().double() for name, facade in linear_facades(model)}
    tuned = moved(qa.attach(model, "lora"), by=0.01 if "fp8" not in backend else 0.003)
    exported(tuned, tmp_path / "served", **scheme, min_gain=0)
    dense = merged_model(tuned, "dense")
    wanted, found = torch.tensor(0.0).double(), torch.tensor(0.0).double()
    for name, facade in linear_facades(adopted(tmp_path / "served")):
        change = dense.get_submodule(name).weight.double() - before[name]
        assert change.norm() < 0.05 * before[name].norm()
        wanted += change.square().sum()
        found += (change * (facade.dequantize().double() - before[name])).sum()
    assert found / wanted == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("scheme", ["W4A16", "W8A16", "FP8_DYNAMIC"])
def test_in_16_bits_what_nobody_trained_keeps_its_values(scheme: str, tmp_path: Path) -> None:
    """What merged weights lose in bfloat16 is no change that a noise could make steps of."""
    tiny(bias=False).save_pretrained(tmp_path / "base")
    model = qa.quantize(
        str(tmp_path / "base"), METHOD, dtype="bfloat16", device="cpu", scheme=scheme
    )
    before = {name: facade.dequantize() for name, facade in linear_facades(model)}
    tuned = moved(qa.attach(model, "lora", target_modules=["q_proj"]))
    exported(tuned, tmp_path / "served", scheme=scheme, min_gain=0)
    loaded = qa.quantize(str(tmp_path / "served"), METHOD, device="cpu", dtype="bfloat16")
    for name, facade in linear_facades(loaded):
        same = torch.equal(facade.dequantize(), before[name])
        assert same == ("q_proj" not in name), name


def test_in_16_bits_what_was_trained_rounded_stays_as_it_was(tmp_path: Path) -> None:
    tiny(bias=False).save_pretrained(tmp_path / "base")
    model = qa.quantize(
        str(tmp_path / "base"), METHOD, dtype="bfloat16", device="cpu", scheme="W4A16"
    )
    tuned = moved(qa.attach(model, "lora"))
    make_merge_aware(tuned)
    dense = merged_model(tuned, "dense")
    exported(tuned, tmp_path / "served", scheme="W4A16", min_gain=0)
    loaded = qa.quantize(str(tmp_path / "served"), METHOD, device="cpu", dtype="bfloat16")
    for name, facade in linear_facades(loaded):
        assert torch.equal(facade.dequantize(), dense.get_submodule(name).weight), name


def test_gptq_checkpoints_keep_their_values_too(tmp_path: Path) -> None:
    tiny(bias=False).save_pretrained(tmp_path / "base")
    examples = [{"input_ids": torch.arange(40)[None] + 3 * n} for n in range(4)]
    model = qa.quantize(
        str(tmp_path / "base"),
        "gptq",
        dtype="float32",
        device="cpu",
        calibration=examples,
        group_size=32,
    )
    weights = {name: facade.dequantize() for name, facade in linear_facades(model)}
    tuned = moved(qa.attach(model, "lora", target_modules=["q_proj"]))
    exported(tuned, tmp_path / "served", scheme="W4A16", group_size=32, min_gain=0)
    for name, facade in linear_facades(adopted(tmp_path / "served")):
        close = relative(facade.dequantize(), weights[name])
        # gptqmodel's values are rounded to float16
        assert close > 1e-3 if name.endswith("q_proj") else close < 5e-4, name


def test_an_export_that_keeps_too_little_or_fits_nowhere_is_refused(tmp_path: Path) -> None:
    tiny(bias=False).save_pretrained(tmp_path / "base")
    tuned = moved(qa.attach(qa.quantize(str(tmp_path / "base"), "hqq", device="cpu"), "lora"))
    with pytest.raises(ModelError, match="no layer of the model fits"):
        exported(tuned, tmp_path / "served", group_size=48)
    assert not (tmp_path / "served").exists()
    for options in ({"scheme": "W8A8", "group_size": 32}, {"scheme": "W5A5"}):
        with pytest.raises(PlanRefused):
            export_of(METHOD, options)


@pytest.mark.slow
def test_from_the_command_line(checkpoint: Any, tmp_path: Path) -> None:
    """A checkpoint of the library, adopted, trained, merged into its format and exported by another
    scheme."""
    from quantadapt.cli import main
    from quantadapt.testing.small_demo import small_model

    def call(*words: str) -> None:
        with pytest.raises(SystemExit) as ended:
            main([*words])
        assert ended.value.code in (0, None)

    base = tmp_path / "base"
    qa.save(qa.quantize(str(small_model(1)), METHOD, device="cpu", dtype="float32"), base)
    (base / "quantadapt.json").unlink()
    run = str(tmp_path / "run")
    told = ["--set", "export.merge=requantize", "--set", "export.min_gain=0"]
    steps = ["--max-steps", "2", "--device", "cpu", "--output", run]
    call("run", "--model", str(base), "--backend", METHOD, *told, *steps)
    merged = json.loads(Path(run, "merged", "config.json").read_text())["quantization_config"]
    assert merged["format"] == "pack-quantized"
    options = ["--set", "scheme=FP8_DYNAMIC", "--set", "min_gain=0"]
    call("export", run, METHOD, *options)
    files = load_file(Path(run, METHOD, "model.safetensors"))
    assert files["model.layers.0.mlp.up_proj.weight"].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("options", "words", "given"),
    [
        ({"scheme": "FP8_DYNAMIC", "group_size": 32}, "a group_size goes with", "group_size=32"),
        ({"scheme": None}, "give either a scheme or config_groups", "scheme=None"),
    ],
)
def test_options_that_do_not_go_together_are_told_with_a_way_out(options, words, given):
    backend = {"name": "compressed-tensors", **options}
    with pytest.raises(PlanRefused) as refused:
        plan(Spec(backend=backend), check_output=False)
    (problem,) = refused.value.problems
    assert words in problem.what
    assert problem.where == "backend"
    assert given in problem.fix
