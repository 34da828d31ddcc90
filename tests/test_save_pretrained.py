"""transformers' own `save_pretrained` on quantized models: what it writes can be loaded again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import quantadapt as qa
from quantadapt.errors import ModelError
from quantadapt.facade import facades

IDS = torch.arange(1, 25).view(4, 6)
METHODS = {"none": None, "hqq": "hqq", "bnb-nf4": "bitsandbytes", "torchao-int8": "torchao",
           "bnb-int8": "bitsandbytes", "quanto": "quanto", "eetq": "eetq"}  # fmt: skip
OF_TRANSFORMERS = {"none": 0.0, "bnb-nf4": 1e-6, "torchao-int8": 1e-6}  # as these are on a CPU
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 128}


def quantized(backend: str, tied: bool = True) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied
    )
    return qa.quantize(LlamaForCausalLM(config), backend, device="cpu", dtype="float32").eval()


def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.detach()


def off(folder: Path, expected: torch.Tensor) -> float:
    return float((logits(AutoModelForCausalLM.from_pretrained(folder)) - expected).abs().max())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("backend", METHODS)
def test_a_base_is_saved_as_what_it_is(backend, tied, tmp_path: Path) -> None:
    model = quantized(backend, tied)
    expected = logits(model)
    model.save_pretrained(str(tmp_path), max_shard_size="50KB")
    assert (tmp_path / "model.safetensors.index.json").exists()  # options arrive
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.get("quantization_config", {}).get("quant_method") == METHODS[backend]
    assert not hasattr(model.config, "quantization_config")  # and the model is as it was
    assert torch.equal(logits(model), expected)
    again = qa.quantize(str(tmp_path), backend, device="cpu", dtype="float32")
    assert torch.equal(logits(again), expected)
    if backend in OF_TRANSFORMERS:
        assert off(tmp_path, expected) <= OF_TRANSFORMERS[backend]


@pytest.mark.parametrize("whole", [[], ["down_proj"]])
@pytest.mark.parametrize("backend", OF_TRANSFORMERS)
def test_so_is_one_that_an_adapter_was_merged_into(backend, whole, tmp_path: Path) -> None:
    """Also where a layer is dense afterwards, which was trained whole."""
    model = quantized(backend)
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, modules_to_save=whole)
    merged = get_peft_model(model, config).merge_and_unload()
    expected = logits(merged)
    merged.save_pretrained(tmp_path)
    assert off(tmp_path, expected) < 1e-6


def test_some_layers_may_be_dense_behind_their_facade(tmp_path: Path) -> None:
    model, dense = quantized("hqq"), quantized("none")
    del model.quantadapt
    model.model.layers[0].self_attn = dense.model.layers[0].self_attn
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = qa.quantize(str(tmp_path), "hqq", device="cpu", dtype="float32")
    assert torch.equal(logits(again), expected)


def test_one_of_unknown_options_is_refused(tmp_path: Path) -> None:
    model = quantized("hqq")
    target = type("Target", (), {name: getattr(type(facade.target), name) for _, facade in
                  facades(model) for name in ("dequantize", "shape", "forward")})()  # fmt: skip
    del model.quantadapt
    for _, facade in facades(model):
        facade.target = target
    with pytest.raises(ModelError, match=r"by which options"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
