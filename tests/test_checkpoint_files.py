"""Which files of a checkpoint count, and that each tensor in them is what it is said to be: loading
and merging onto a base go by the same ones, or refuse."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import quantadapt as qa
from quantadapt.errors import ModelError, PlanRefused
from quantadapt.inputs.weights import check_weights
from quantadapt.loading.accounting import UnusedTensorsWarning
from quantadapt.paths import INDEX
from quantadapt.testing.small_demo import small_model

LAYER = "model.layers.0.self_attn.q_proj.weight"
NAMES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_model(), tmp_path / "base"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the first layer alone, so that a base of one layer has room for it."""
    options: dict[str, Any] = {"target_modules": ["q_proj"], "layers_to_transform": [0]}
    model = qa.attach(qa.quantize(small_model(), "none", device="cpu"), "lora", r=2, **options)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return qa.save(model, tmp_path_factory.mktemp("tuned")).parent


def stored(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def write(folder: Path, tensors: Tensors, name: str = "model.safetensors") -> None:
    save_file(tensors, folder / name, metadata={"format": "pt"})


def shard(folder: Path, first: Tensors, second: Tensors, unnamed: tuple[str, ...] = ()) -> None:
    """Write two shards, and an index in which the first comes first and `unnamed` are not."""
    (folder / "model.safetensors").unlink()
    write(folder, first, NAMES[0])
    write(folder, second, NAMES[1])
    names = dict.fromkeys(second, NAMES[1]) | dict.fromkeys(first, NAMES[0])
    named = {key: name for key, name in names.items() if key not in unnamed}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": named}))


def halves(tensors: Tensors) -> tuple[Tensors, Tensors]:
    first = {key: value for key, value in tensors.items() if "layers.0" in key}
    return first, {key: value for key, value in tensors.items() if key not in first}


def change(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def quantized(folder: Path) -> Any:
    return qa.quantize(folder, "none", device="cpu")


def refused(folder: Path, adapter: Path, out: Path, said: str) -> None:
    """See that loading refuses the checkpoint, and merging onto it, checked or not."""
    with pytest.raises((ModelError, PlanRefused), match=said):
        quantized(folder)
    for check in (True, False):
        with pytest.raises((ModelError, PlanRefused), match=said):
            qa.merge_onto(adapter, str(folder), out, check=check)
    assert not (out / "merged").exists()


@pytest.mark.parametrize("where", [0, 1])
def test_a_tensor_in_two_shards_is_refused(where, base, adapter, tmp_path) -> None:
    tensors = stored(base)
    parts = halves(tensors)
    twice = next(iter(parts[1 - where]))
    parts[where][twice] = tensors[twice] * 5
    shard(base, *parts)
    refused(base, adapter, tmp_path / "out", "both hold")


def test_an_index_beside_a_whole_file_is_refused(base, adapter, tmp_path) -> None:
    tensors = stored(base)
    shard(base, *halves(tensors))
    write(base, {key: value * 2 for key, value in tensors.items()})
    refused(base, adapter, tmp_path / "out", "which is meant")


def test_an_index_of_the_whole_file_alone_is_fine(base: Path) -> None:
    names = dict.fromkeys(stored(base), "model.safetensors")
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert dict(check_weights(base)) == names


def test_what_the_index_does_not_name_is_read_as_transformers_does(base, adapter, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    shard(base, *halves(stored(base)), unnamed=(LAYER,))
    stock: Any = AutoModelForCausalLM.from_pretrained(base).get_parameter(LAYER)
    ours: Any = quantized(base).model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(torch.as_tensor(ours), stock.data)
    qa.merge_onto(adapter, str(base), tmp_path / "out", check=False)
    made: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    with safe_open(adapter / "adapter" / "adapter_model.safetensors", "pt") as file:
        a, b = (
            file.get_tensor(next(key for key in file.keys() if part in key))  # noqa: SIM118
            for part in ("lora_A", "lora_B")
        )
    config = json.loads((adapter / "adapter" / "adapter_config.json").read_text())
    meant = stock.data.double() + b.double() @ a.double() * config["lora_alpha"] / config["r"]
    torch.testing.assert_close(made.get_parameter(LAYER).data, meant.float())


@pytest.mark.parametrize("name", ["a.safetensors", "z.safetensors"])
def test_files_that_transformers_does_not_read_do_not_count(name: str, base: Path) -> None:
    write(base, {LAYER: stored(base)[LAYER] * 5}, name)
    assert check_weights(base)[LAYER] == "model.safetensors"


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.complex64])
@pytest.mark.parametrize("name", [LAYER, "model.norm.weight"])
def test_weights_that_are_no_floats_are_refused(name, dtype, base, adapter, tmp_path) -> None:
    tensors = stored(base)
    write(base, {**tensors, name: tensors[name].to(dtype)})
    refused(base, adapter, tmp_path / "out", "floating point")


def test_a_base_in_float64_is_merged_onto(base, adapter, tmp_path) -> None:
    write(base, {key: value.double() for key, value in stored(base).items()})
    assert qa.merge_onto(adapter, str(base), tmp_path / "out")["kl"] < 1e-6


@pytest.mark.parametrize("key", ["num_hidden_layers", "vocab_size", "hidden_size"])
def test_a_config_of_another_size_is_refused(key, base, adapter, tmp_path) -> None:
    if key == "hidden_size":
        change(base, head_dim=json.loads((base / "config.json").read_text())["head_dim"])
    change(base, **{key: {"num_hidden_layers": 1, "vocab_size": 100, "hidden_size": 128}[key]})
    said = "more layers" if key == "num_hidden_layers" else "its config wants"
    refused(base, adapter, tmp_path / "out", said)


def test_a_nested_config_of_fewer_layers_is_refused(tmp_path: Path) -> None:
    import transformers

    text = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=5
    )
    folder = tmp_path / "gemma"
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    for file in small_model().glob("*token*"):
        shutil.copy(file, folder)
    options: dict[str, Any] = {"target_modules": r".*language_model.*\.0\..*q_proj"}
    qa.save(qa.attach(quantized(folder), "lora", r=2, **options), tmp_path / "tuned")
    told = json.loads((folder / "config.json").read_text())["text_config"]
    change(folder, text_config={**told, "num_hidden_layers": 1, "layer_types": None})
    refused(folder, tmp_path / "tuned", tmp_path / "out", "more layers")


def test_what_a_base_holds_beside_stays_in_it(base, adapter, tmp_path) -> None:
    write(base, {**stored(base), "visual.table": torch.ones(3)})
    with pytest.warns(UnusedTensorsWarning, match=r"visual\.table"):
        qa.merge_onto(adapter, str(base), tmp_path / "out", force_base=True)
    assert torch.equal(stored(tmp_path / "out" / "merged")["visual.table"], torch.ones(3))


@pytest.mark.parametrize("name", ["../other.safetensors", "other.safetensors", 3])
def test_a_config_that_names_other_weights_is_refused(name, base, adapter, tmp_path) -> None:
    write(base, stored(base), "other.safetensors")
    change(base, transformers_weights=name)
    refused(base, adapter, tmp_path / "out", "transformers_weights")


def test_an_adapter_beside_a_model_is_not_put_into_it(base, adapter, tmp_path) -> None:
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / "adapter" / file, base)
    refused(base, adapter, tmp_path / "out", "holds an adapter")


@pytest.mark.parametrize("backend", ["hqq", "eetq", "quanto"])
def test_a_bias_more_of_a_packed_layer_is_refused(backend: str, tmp_path: Path) -> None:
    folder = qa.save(qa.quantize(small_model(), backend, device="cpu"), tmp_path / "packed")
    with safe_open(folder / "model.safetensors", "pt") as opened:
        metadata = opened.metadata()
    bias = {LAYER.replace("weight", "bias"): torch.ones(256)}
    save_file(stored(folder) | bias, folder / "model.safetensors", metadata=metadata)
    with pytest.raises(ModelError, match=r"q_proj\.bias"):
        qa.load(folder, device="cpu")


def test_a_packed_layer_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    folder = qa.save(qa.quantize(small_model(), "hqq", device="cpu"), tmp_path / "packed")
    tensors = stored(folder)
    del tensors["model.layers.0.self_attn.q_proj.packing"]
    write(folder, tensors)
    with pytest.raises(ModelError, match="packing"):
        qa.load(folder, device="cpu")


def test_no_warning_for_a_whole_checkpoint(base, adapter, tmp_path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnusedTensorsWarning)
        qa.merge_onto(adapter, str(base), tmp_path / "out", check=False)
