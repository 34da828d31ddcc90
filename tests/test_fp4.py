"""MXFP4 and NVFP4 layers and their checkpoints: written as compressed-tensors has them, read by
transformers, made by compressed-tensors and adopted."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from merging import llama, logits, moved, relative, stock
from parameters import slow_but
from quantadapt_fp4 import MXFP4, NVFP4
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import quantadapt as qa
from quantadapt.errors import PlanRefused, QuantadaptError
from quantadapt.facade import facades, stack_facades
from quantadapt.planning import plan
from quantadapt.registry import registry
from quantadapt.spec import Spec

BACKENDS = ("mxfp4", "nvfp4")
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
SCHEMES = {"mxfp4": "MXFP4A16", "nvfp4": "NVFP4A16"}


@pytest.fixture(scope="module", params=["tied", "untied"])
def base(request: Any, tmp_path_factory: Any) -> str:
    """A small Llama with biases, in several files."""
    return llama(tmp_path_factory.mktemp("llama") / "base", tied=request.param == "tied")


def dequantizing(folder: Path) -> nn.Module:
    """The model as transformers and compressed-tensors read it."""
    how = CompressedTensorsConfig(dequantize=True)
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=how, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.float()  # transformers makes experts in bfloat16


def layer_of(options: Any, rows: int = 8, columns: int = 64, bias: bool = True) -> Any:
    linear = nn.Linear(columns, rows, bias=bias)
    return options.quantize_linear(linear.requires_grad_(False))


# Checkpoints -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_transformers_reads_what_is_written(backend: str, base: str, tmp_path: Path) -> None:
    model = qa.quantize(base, backend)
    qa.save(model, tmp_path / "saved")
    assert torch.equal(logits(qa.load(tmp_path / "saved")), logits(model))
    assert relative(logits(dequantizing(tmp_path / "saved")), logits(model)) < 1e-6
    model.save_pretrained(tmp_path / "stock", max_shard_size="10KB")
    assert len(list((tmp_path / "stock").glob("*.safetensors"))) > 1
    assert relative(logits(dequantizing(tmp_path / "stock")), logits(model)) < 1e-6


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_transformers_runs_what_is_written(
    backend: str, dtype: str, base: str, tmp_path: Path
) -> None:
    """Without a word of dtypes; the library unpacks to bfloat16, whatever else is in the files."""
    model = qa.quantize(base, backend, dtype=dtype)
    qa.save(model, tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert relative(logits(loaded).float(), logits(model).float()) < 2e-2
    again = qa.load(tmp_path / "saved")
    assert again.dtype == getattr(torch, dtype)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("adapter", slow_but(["lora", "dora", "vera", "ia3"], "dora"))
def test_merged_it_is_what_was_tuned(backend: str, adapter: str, base: str, tmp_path: Path) -> None:
    tuned = moved(qa.attach(qa.quantize(base, backend), adapter))
    wanted = logits(tuned)
    qa.merge(tuned, tmp_path, kind="dense")
    assert relative(logits(stock(tmp_path / "merged")), wanted) < 1e-5
    dense = logits(qa.quantize(stock(tmp_path / "merged"), backend))
    given = {"kind": "requantize", "min_gain": 0, "rounding": "nearest"}
    qa.merge(tuned, tmp_path, overwrite=True, **given)
    written = dequantizing(tmp_path / "merged")
    assert relative(logits(written), dense) < 1e-5  # the merge quantizes what it merged
    assert torch.equal(logits(tuned), wanted)


def _compressed(source: str, folder: Path, scheme: str) -> Path:
    """Have compressed-tensors alone quantize a model; return its folder."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
        preset_name_to_scheme,
    )
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    model = stock(source)
    config = QuantizationConfig(
        config_groups={"group_0": preset_name_to_scheme(scheme, ["Linear"])},
        ignore=["lm_head"],
        quantization_status=QuantizationStatus.FROZEN,
    )
    apply_quantization_config(model, config)
    for layer in model.modules():
        if not hasattr(layer, "quantization_scheme"):
            continue
        args, weight = layer.quantization_scheme.weights, layer.weight.data
        blocks = weight.unflatten(-1, (-1, args.group_size))
        common = {}
        if hasattr(layer, "weight_global_scale"):
            layer.weight_global_scale.data = generate_gparam(weight.min(), weight.max())
            common = {"global_scale": layer.weight_global_scale}
        scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, **common)
        layer.weight_scale.data = scale.to(layer.weight_scale.dtype)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return folder


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_compressed_tensors_made_is_adopted(backend: str, base: str, tmp_path: Path) -> None:
    folder = _compressed(base, tmp_path / "made", SCHEMES[backend])
    model = qa.quantize(folder, backend)
    held = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    layers = dict(facades(model))
    assert len(layers) == 14
    for name, layer in layers.items():
        packed, scale = held[f"{name}.weight_packed"], held[f"{name}.weight_scale"]
        steps = scale.double() if backend == "nvfp4" else 2 ** (scale.double() - 127)
        steps = steps / held.get(f"{name}.weight_global_scale", torch.ones(1)).double()
        codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
        values = E2M1[codes.long()].double().unflatten(-1, (steps.shape[1], -1))
        exact = (values * steps[..., None]).flatten(-2)
        assert relative(layer.dequantize().double(), exact) < 1e-7
    # compressed-tensors itself dequantizes in bfloat16.
    assert relative(logits(model), logits(dequantizing(folder))) < 1e-2
    qa.save(model, tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert held.keys() == again.keys()
    for name, tensor in held.items():
        assert torch.equal(tensor.view(torch.uint8), again[name].view(torch.uint8)), name


def test_activations_that_are_quantized_are_another_format(base: str, tmp_path: Path) -> None:
    folder = _compressed(base, tmp_path / "made", "NVFP4A16")
    config = json.loads((folder / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["input_activations"] = {**group["weights"], "dynamic": "local"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanRefused, match="backend 'nvfp4' cannot read it"):
        qa.quantize(folder, "nvfp4")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, n: t.pop(f"{n}.weight_scale"), "no weight_scale"),
        (lambda t, n: t.pop(f"{n}.weight_global_scale"), "no weight_global_scale"),
        (
            lambda t, n: t.update({f"{n}.weight_scale": t[f"{n}.weight_scale"][:, :1].clone()}),
            "its",
        ),
        (lambda t, n: t.update({f"{n}.weight_packed": t[f"{n}.weight_packed"][:-1]}), "up_proj"),
        (lambda t, n: t.update({f"{n}.weight_global_scale": torch.zeros(1)}), "above 0"),
        (lambda t, n: t.update({f"{n}.weight_global_scale": torch.tensor([torch.nan])}), "no num"),
        (lambda t, n: t[f"{n}.weight_scale"].view(torch.uint8).fill_(127), "no numbers"),
        (
            lambda t, n: t.update({f"{n}.weight_packed": t[f"{n}.weight_packed"].float()}),
            "torch.uint8",
        ),
    ],
)
def test_tensors_that_are_not_whole_are_named(
    change: Any, said: str, base: str, tmp_path: Path
) -> None:
    folder = qa.save(qa.quantize(base, "nvfp4"), tmp_path / "saved")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    change(tensors, name)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(QuantadaptError, match=said) as error:
        qa.load(folder)
    assert name in str(error.value)


# Layers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [MXFP4(), NVFP4()], ids=BACKENDS)
def test_a_layer_keeps_its_scales_when_its_model_is_cast(options: Any) -> None:
    layer = layer_of(options)
    before = {name: tensor.clone() for name, tensor in layer.named_buffers()}
    wanted = layer.dequantize()
    cast = copy.deepcopy(layer).half().to(torch.bfloat16).double().float()
    for name, tensor in cast.named_buffers():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8))
    assert torch.equal(cast.dequantize(), wanted)
    assert layer.half().bias.dtype == torch.float16
    assert layer(torch.ones(2, 64, dtype=torch.float16)).dtype == torch.float16


@pytest.mark.parametrize("options", [MXFP4(), NVFP4()], ids=BACKENDS)
def test_a_live_model_is_known_by_its_layers(options: Any) -> None:
    model = nn.Sequential(layer_of(options))
    found = [b.name for b in registry().backends() if b.quantizer.from_model(model) is not None]
    assert found == [type(options).__name__.lower()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [MXFP4(), NVFP4()], ids=BACKENDS)
def test_sizes_that_blocks_do_not_divide_are_refused(options: Any, dtype: torch.dtype) -> None:
    linear = nn.Linear(options.block + 8, 4, dtype=dtype)
    assert f"do not divide {options.block + 8} inputs" in options.misfit(options.block + 8, 4)
    with pytest.raises(QuantadaptError, match="do not divide"):
        options.quantize_linear(linear)
    assert options.quantize_linear(nn.Linear(options.block, 3, dtype=dtype)).out_features == 3


def test_rows_of_other_global_scales_are_joined() -> None:
    """Experts whose weights are of very different sizes keep their own."""
    options, layers = NVFP4(), []
    for size in (1.0, 1e3, 1e-6):
        linear = nn.Linear(32, 4, bias=False)
        linear.weight.data *= size
        layers.append(options.quantize_linear(linear.requires_grad_(False)))
    scales = [float(layer.weight_global_scale) for layer in layers]
    assert len(set(scales)) == 3
    joined = options.join_rows(layers)
    wanted = torch.cat([layer.dequantize() for layer in layers])
    assert torch.equal(joined.dequantize(), wanted)
    linear = nn.Linear(32, 12, bias=False, device="meta")
    again = options.load_linear(linear, dict(joined.state_dict()))
    assert torch.equal(again.dequantize(), wanted)
    alike = options.join_rows([layers[0], copy.deepcopy(layers[0])])
    assert alike.weight_global_scale.shape == (1,)


# Plans -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "bits"), [("mxfp4", 4.25), ("nvfp4", 4.5)])
def test_a_plan_tells_how_they_compute(backend: str, bits: float, base: str) -> None:
    spec = Spec(model=base, backend={"name": backend}, data={"path": str(qa.demo.TRAIN_FILE)})
    made = plan(spec, check_output=False)
    assert any("dequantized to be multiplied" in note for note in made.notes)
    found = made.quantizer.bits_per_weight(64, 64, device="cuda", dtype="bfloat16")
    assert found == bits


# Experts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_are_written_one_by_one(backend: str, tmp_path: Path) -> None:
    """As compressed-tensors, and vLLM, have them. transformers makes dense stacks of MXFP4; of
    NVFP4 it leaves the global scale out, so that the library itself is asked."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import preset_name_to_scheme
    from transformers import Qwen3MoeConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": []}
    config = Qwen3MoeConfig(
        vocab_size=2048, num_hidden_layers=1, initializer_range=0.1, **sizes, **heads, **experts
    )
    model = qa.quantize(AutoModelForCausalLM.from_config(config, dtype=torch.float32), backend)
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    held = load_file(folder / "model.safetensors")
    assert not any("_stack" in name for name in held)
    scheme = preset_name_to_scheme(SCHEMES[backend], ["Linear"])
    compressor = BaseCompressor.get_value_from_registry(
        json.loads((folder / "config.json").read_text())["quantization_config"]["format"]
    )
    stacks = {name.rpartition(".")[2]: f.by_expert() for name, f in stack_facades(model)}
    for n in range(4):
        weights = []
        for part in ("gate_proj", "up_proj", "down_proj"):
            prefix = f"model.layers.0.mlp.experts.{n}.{part}."
            own = {k.removeprefix(prefix): t for k, t in held.items() if k.startswith(prefix)}
            weights.append(compressor.decompress(own, scheme)["weight"].float())
        assert torch.equal(torch.cat(weights[:2]), stacks["gate_up_proj"][n])
        assert torch.equal(weights[2], stacks["down_proj"][n])
    if backend == "mxfp4":
        assert relative(logits(dequantizing(folder)), logits(model)) < 1e-5
    assert torch.equal(logits(qa.quantize(folder, backend)), logits(model))
