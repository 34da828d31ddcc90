"""Every tensor of a checkpoint and of an adapter is accounted for: nothing starts at random."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import quantadapt as qa
from quantadapt.errors import ModelError, PlanRefused
from quantadapt.loading import UnusedTensorsWarning, WrongTensors, from_pretrained
from quantadapt.planning.share import BEGINNING

SIZES = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 90, "num_hidden_layers": 2}
TINY = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=4)
IDS = torch.arange(20)[None] + 5
Tensors = dict[str, torch.Tensor]

SCALES = {
    "hqq": "zero",
    "bnb-nf4": "weight.nested_absmax",
    "bnb-int8": "SCB",
    "torchao-int8": "_weight_scale",
    "quanto": "weight._scale",
    "eetq": "weight_scales",
    "gptq": "scales",
    "awq": "scales",
    "inc": "dequant_weights.scale",
}
"""Backend -> a tensor without which no layer of it can be read."""


def saved(folder: Path, config: Any = TINY, model: Any = LlamaForCausalLM) -> Path:
    torch.manual_seed(0)
    model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("source"))


@pytest.fixture
def variant(source, tmp_path) -> Callable[..., str]:
    """Make a copy of a checkpoint with other tensors, or another config."""

    def make(tensors: Any = None, origin: Path = source, **config: Any) -> str:
        folder = tmp_path / f"variant-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(origin, folder)
        change(folder / "model.safetensors", tensors)
        edit(folder / "config.json", config)
        return str(folder)

    return make


def change(file: Path, tensors: Any) -> None:
    if tensors is not None:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        save_file(tensors(load_file(file)), file, metadata)


def edit(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def without(*parts: str) -> Callable[[Tensors], Tensors]:
    return lambda held: {k: v for k, v in held.items() if not any(part in k for part in parts)}


def with_more(**more: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda held: held | {name.replace("__", "."): value for name, value in more.items()}


def quantize(folder: str, backend: str, **more: Any) -> Any:
    options: dict[str, Any] = {"group_size": 32} if backend == "hqq" else {}
    return qa.quantize(folder, backend, device="cpu", dtype="float32", **options, **more)


LOST = {
    "model.layers.1.self_attn.q_proj.weight": ("layers.1.self_attn.q_proj",),
    "model.layers.1.input_layernorm.weight": ("layers.1.input_layernorm",),
    "model.embed_tokens.weight": ("embed_tokens",),
    "lm_head.weight": ("lm_head",),
}


@pytest.mark.parametrize("backend", ["none", "hqq", "bnb-nf4"])
@pytest.mark.parametrize("name", LOST)
def test_a_lost_tensor_is_refused_by_name(variant, backend, name) -> None:
    with pytest.raises(WrongTensors, match=f"it has no {name}, which would start at random"):
        quantize(variant(without(*LOST[name])), backend)


@pytest.mark.parametrize("backend", ["none", "hqq", "bnb-nf4"])
def test_a_lost_bias_is_refused_by_name(tmp_path, variant, backend) -> None:
    config = LlamaConfig(**SIZES, num_attention_heads=4, attention_bias=True)
    biased = saved(tmp_path / "biased", config)
    quantize(str(biased), backend)
    with pytest.raises(WrongTensors, match=r"no model.layers.0.self_attn.q_proj.bias, which"):
        quantize(variant(without("layers.0.self_attn.q_proj.bias"), biased), backend)


@pytest.mark.parametrize("backend", ["none", "hqq"])
def test_files_and_config_of_two_models_are_refused(variant, backend) -> None:
    held = load_file(Path(variant()) / "model.safetensors")
    cases = {
        r"begin with 'base_model.model.'": variant(
            lambda _: {f"base_model.model.{k}": v for k, v in held.items()}
        ),
        r"more layers than its config has: model.layers.1.": variant(num_hidden_layers=1),
        r"no model.layers.2.input_layernorm.weight": variant(num_hidden_layers=3),
        r"down_proj.weight has the shape \[64, 128\], its config wants \[64, 96\]": variant(
            intermediate_size=96
        ),
        r"embed_tokens.weight has the shape \[90, 64\], its config wants": variant(vocab_size=99),
        r"layers without what it holds for them: model.layers.0.self_attn.q_proj.bias": variant(
            with_more(model__layers__0__self_attn__q_proj__bias=torch.ones(64))
        ),
    }
    for message, folder in cases.items():
        with pytest.raises(WrongTensors, match=message):
            quantize(folder, backend)


@pytest.mark.parametrize("backend", ["none", "hqq"])
def test_tensors_without_a_place_are_told_once(variant, backend) -> None:
    with pytest.warns(UnusedTensorsWarning, match="does not use: foo.bar$") as told:
        model = quantize(variant(with_more(foo__bar=torch.ones(2))), backend)
    assert len(told) == 1
    notes = [note for note in model.quantadapt.notes if not note.startswith(BEGINNING)]
    assert notes == [str(told[0].message)]  # for the report


@pytest.mark.parametrize("backend", ["none", "hqq", "bnb-nf4"])
def test_layers_beyond_those_of_the_config_can_be_left_out(variant, backend) -> None:
    folder = variant(num_hidden_layers=1)
    model = quantize(folder, backend, unused_modules=["model.layers.1"])
    dense = LlamaForCausalLM.from_pretrained(folder).eval()
    if backend == "none":
        with torch.no_grad():
            assert torch.equal(model.eval()(IDS).logits, dense(IDS).logits)


def test_what_is_whole_loads_without_a_word(variant, tmp_path) -> None:
    tied = saved(
        tmp_path / "tied", LlamaConfig(**SIZES, num_attention_heads=4, tie_word_embeddings=True)
    )
    t5 = T5Config(vocab_size=90, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4)
    shared = saved(tmp_path / "t5", t5, T5ForConditionalGeneration)
    old = variant(with_more(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8)))
    bare = variant(lambda held: {k.removeprefix("model."): v for k, v in held.items()})
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    for folder in (str(tied), str(shared), old, bare):
        for backend in ("none", "hqq"):
            with warnings.catch_warnings():
                warnings.simplefilter("error", UnusedTensorsWarning)
                quantize(folder, backend)


def test_transformers_own_table_is_not_printed_beside(variant, caplog) -> None:
    with pytest.raises(WrongTensors):
        from_pretrained(variant(without("lm_head")))
    assert "LOAD REPORT" not in caplog.text


CLASSIFIER = {"architectures": ["LlamaForSequenceClassification"]}


@pytest.mark.parametrize("backend", ["none", "hqq"])
def test_a_new_head_has_to_be_asked_for(variant, backend, tmp_path) -> None:
    folder = variant(without("lm_head"), **CLASSIFIER)
    with pytest.raises(WrongTensors, match=r"no score.weight.*\n.*new_modules: \[score\]"):
        quantize(folder, backend)
    model = quantize(folder, backend, new_modules=["score"])
    torch.rand(3)
    again = quantize(folder, backend, new_modules=["score"])
    assert torch.equal(model.score.weight, again.score.weight)
    assert float(model.score.weight.std()) > 0
    with torch.no_grad():
        expected = again.eval()(IDS).logits
    qa.save(qa.attach(model, "lora", target_modules=["q_proj"]), tmp_path / "tuned")
    with torch.no_grad():
        assert torch.equal(qa.load(tmp_path / "tuned", device="cpu").eval()(IDS).logits, expected)


@pytest.mark.parametrize("backend", SCALES)
def test_a_quantized_checkpoint_without_a_tensor_is_refused(source, variant, backend, tmp_path):
    more: dict[str, Any] = {"group_size": 32} if backend in ("gptq", "awq") else {}
    if backend in ("gptq", "awq", "inc"):
        torch.manual_seed(0)
        more["calibration"] = [{"input_ids": torch.randint(0, 90, (1, 40))} for _ in range(2)]
    packed = qa.save(quantize(str(source), backend, **more), tmp_path / "packed")
    layer, square = "model.layers.1.mlp.up_proj", "model.layers.1.self_attn.q_proj"
    scales = SCALES[backend]
    for lost in (
        *(layer, f"{layer}.{scales}", f"{square}.{scales}"),
        *("layers.1.input_layernorm", "lm_head"),
    ):
        name = lost.removesuffix(f".{scales}")
        # What is left of a layer without its scales may be no weight at all: the plan sees that.
        with pytest.raises((ModelError, PlanRefused), match=name):
            qa.load(variant(without(lost), packed), device="cpu")
    with pytest.raises(ModelError, match="config"):
        qa.load(variant(None, packed, intermediate_size=192), device="cpu")
    with pytest.raises(WrongTensors, match="more layers than its config"):
        qa.load(variant(None, packed, num_hidden_layers=1), device="cpu")
    with pytest.raises(WrongTensors, match=r"self_attn\..*bias"):
        qa.load(variant(None, packed, attention_bias=True), device="cpu")


# Adapters -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["lora", "vera", "ia3", "adalora", "oft"])
def tuned(request, source, tmp_path_factory) -> Path:
    options = {"oft_block_size": 16} if request.param == "oft" else {}
    model = qa.attach(quantize(str(source), "hqq"), request.param, **options)
    return qa.save(model, tmp_path_factory.mktemp("tuned")).parent


def copied(tuned: Path, to: Path) -> Path:
    shutil.copytree(tuned, to)
    return to


def test_each_tensor_of_an_adapter_is_wanted_and_used(tuned, tmp_path) -> None:
    qa.load(copied(tuned, tmp_path / "whole"), device="cpu")
    held = load_file(tuned / "adapter" / "adapter_model.safetensors")
    lost = next(key for key in held if "layers.1.mlp.up_proj" in key)
    for number, (tensors, message) in enumerate(
        [
            (without(lost), "the adapter lacks what its config says is there: .*up_proj"),
            (with_more(base_model__model__foo=torch.ones(2)), "no place for: base_model.model.foo"),
        ]
    ):
        folder = copied(tuned, tmp_path / str(number))
        change(folder / "adapter" / "adapter_model.safetensors", tensors)
        with pytest.raises(ModelError, match=message):
            qa.load(folder, device="cpu")


def test_an_adapter_of_another_type_is_not_loaded_as_untuned(tuned, tmp_path) -> None:
    folder = copied(tuned, tmp_path / "other")
    was = json.loads((folder / "adapter" / "adapter_config.json").read_text())["peft_type"]
    edit(folder / "adapter" / "adapter_config.json", {"peft_type": "HIRA"})
    with pytest.raises(ModelError, match=f'peft_type is "HIRA", and .* which is {was}'):
        qa.load(folder, device="cpu")


@pytest.mark.filterwarnings("ignore:the adapter was trained on another base")
def test_an_adapter_of_a_deeper_base_is_refused_and_taken_off(tuned, tmp_path, variant) -> None:
    shallow = quantize(variant(num_hidden_layers=1), "hqq", unused_modules=["model.layers.1"])
    with torch.no_grad():
        expected = shallow.eval()(IDS).logits
    with pytest.raises(ModelError, match="no place for"):
        qa.load(tuned, base=shallow, force_base=True)
    with torch.no_grad():
        assert torch.equal(shallow(IDS).logits, expected)
