"""Linear layers that are no `nn.Linear`: GPT-2's `Conv1D`, transposed, and Falcon's subclass."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from merging import moved
from parameters import slow_but
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
)
from transformers.pytorch_utils import Conv1D

import quantadapt as qa
from quantadapt.exporting.merging import merged_model
from quantadapt.facade import facades
from quantadapt.loading import WrongTensors, from_pretrained, linear_layers
from quantadapt.model.linears import as_conv1d, as_linear, is_linear

torch.set_num_threads(1)
IDS = torch.arange(40).reshape(2, 20)
SIZES = {"vocab_size": 128, "bos_token_id": 0, "eos_token_id": 0}
NO_DROPOUT = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
CONFIGS = {
    "gpt2": GPT2Config(**SIZES, n_embd=64, n_layer=1, n_head=2, n_positions=64, **NO_DROPOUT),
    "falcon": FalconConfig(
        **SIZES, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, bias=True
    ),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "hqq": {"group_size": 32},
    "bnb-nf4": {},
    "bnb-int8": {},
    "torchao-int8": {},
    "quanto": {},
    "gptq": {"group_size": 32},
    "awq": {"group_size": 32},
    "inc": {"method": "gptq", "bits": 8},
}
CALIBRATED = ("gptq", "awq", "inc")
BOTH = pytest.mark.parametrize("kind", CONFIGS)


def stock(kind: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    return model


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    found = {}
    for kind in CONFIGS:
        found[kind] = tmp_path_factory.mktemp(kind)
        stock(kind).save_pretrained(found[kind])
    return found


def quantize(source: Any, backend: str, **more: Any) -> Any:
    if backend in CALIBRATED:
        torch.manual_seed(0)
        more["calibration"] = [{"input_ids": torch.randint(0, 128, (1, 40))} for _ in range(2)]
    if isinstance(source, Path):
        source = str(source)
    more = {"skip_misfits": True, **OPTIONS[backend], **more}
    return qa.quantize(source, backend, device="cpu", dtype="float32", **more).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found - expected).norm() / expected.norm()).detach())


def dequantized(model: Any, kind: str) -> Any:
    """Return the stock model with the weights that the facades of `model` hold."""
    dense = stock(kind)
    with torch.no_grad():
        for name, facade in facades(model):
            own = dense.get_submodule(name)
            weight = facade.dequantize()
            own.weight.copy_(weight.t() if isinstance(own, Conv1D) else weight)
        own_names = {name for name, _ in facades(model)}
        for name, parameter in model.named_parameters():  # AWQ moves scales into norms
            if name.rpartition(".")[0] not in own_names or name.endswith(".bias"):
                dense.get_parameter(name).copy_(parameter)
    return dense


@BOTH
@pytest.mark.parametrize("backend", slow_but(OPTIONS, "hqq", "bnb-nf4", "torchao-int8", "gptq"))
def test_they_are_quantized_saved_and_loaded(sources, kind, backend, tmp_path) -> None:
    model = quantize(sources[kind], backend)
    names = [name for name, _ in facades(model)]
    assert len(names) == 4
    if backend != "bnb-int8":  # whose forward rounds its inputs
        assert error(logits(model), logits(dequantized(model, kind))) < 1e-5
    assert error(logits(model), logits(stock(kind))) < 0.3
    loaded = qa.load(qa.save(model, tmp_path / "saved"), device="cpu")
    assert [name for name, _ in facades(loaded)] == names
    assert torch.equal(logits(loaded), logits(model))


@BOTH
@pytest.mark.parametrize("backend", ["none", "hqq", "gptq"])
def test_a_live_model_becomes_what_its_checkpoint_does(sources, kind, backend) -> None:
    live = quantize(stock(kind), backend)
    assert torch.equal(logits(live), logits(quantize(sources[kind], backend)))


@BOTH
@pytest.mark.parametrize("backend", ["none", "hqq", "bnb-nf4", "gptq"])
def test_a_dense_merge_has_the_layout_of_its_class(sources, kind, backend, tmp_path) -> None:
    """Square layers, too, which would fit either way round."""
    tuned = moved(qa.attach(quantize(sources[kind], backend), "lora", r=4))
    merged = merged_model(tuned, "dense")
    merged.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert [type(m) for m in loaded.modules()] == [type(m) for m in stock(kind).modules()]
    for found in (merged, loaded):
        assert error(logits(found), logits(tuned)) < 1e-5


@BOTH
@pytest.mark.parametrize("backend", ["none", "hqq", "gptq"])
def test_a_merge_can_be_quantized_again(sources, kind, backend) -> None:
    model = quantize(sources[kind], backend, **({"bits": 8} if backend != "none" else {}))
    tuned = moved(qa.attach(model, "lora", r=4))
    merged = merged_model(tuned, "requantize")
    assert len(list(facades(merged))) == 4
    assert error(logits(merged), logits(tuned)) < 0.03


@BOTH
@pytest.mark.parametrize("backend", slow_but(["hqq", "bnb-nf4"], "hqq"))
@pytest.mark.parametrize("adapter", ["lora", "dora", "ia3"])
def test_an_adapter_is_that_of_peft_on_the_dense_model(sources, kind, backend, adapter, tmp_path):
    """Same outputs, gradients and file, and the file fits either model."""
    model = quantize(sources[kind], backend)
    dense = dequantized(model, kind)
    tuned = moved(qa.attach(model, adapter))
    qa.save(tuned, tmp_path)
    from peft import PeftModel

    expected = PeftModel.from_pretrained(dense, str(tmp_path / "adapter"), is_trainable=True)
    assert error(logits(tuned), logits(expected)) < 1e-5
    for one in (tuned, expected):
        one.train()(input_ids=IDS, labels=IDS).loss.backward()
    gradients = {n: p.grad for n, p in expected.named_parameters() if p.grad is not None}
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            assert error(parameter.grad, gradients[name]) < 1e-4, name
    assert error(logits(qa.load(tmp_path, device="cpu")), logits(expected)) < 1e-5


def test_an_adapter_of_stock_peft_for_conv1d_is_loaded(sources, tmp_path) -> None:
    from peft import PeftModel

    model = quantize(sources["gpt2"], "hqq")
    lora = LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    expected = moved(get_peft_model(dequantized(model, "gpt2"), lora))
    expected.save_pretrained(tmp_path)
    found = PeftModel.from_pretrained(model, str(tmp_path))
    assert error(logits(found), logits(expected)) < 1e-5


@pytest.mark.parametrize(
    "backend", slow_but(["none", "hqq", "bnb-nf4", "torchao-int8", "gptq"], "hqq", "bnb-nf4")
)
def test_those_that_stay_dense_stay_what_they_are(sources, backend, tmp_path) -> None:
    """`c_proj` of attention is square: written the other way round, nobody would notice."""
    skip = ["lm_head", "attn.c_proj", "mlp.c_fc"]
    model = quantize(sources["gpt2"], backend, skip_modules=skip)
    assert len(list(facades(model))) == 2
    assert isinstance(model.transformer.h[0].attn.c_proj, Conv1D)
    loaded = qa.load(qa.save(model, tmp_path / "saved"), device="cpu")
    assert [n for n, _ in facades(loaded)] == [n for n, _ in facades(model)]
    assert torch.equal(logits(loaded), logits(model))


def test_merging_onto_the_dense_base(sources, tmp_path) -> None:
    tuned = moved(qa.attach(quantize(sources["gpt2"], "hqq"), "lora", r=4))
    qa.save(tuned, tmp_path / "tuned")
    qa.merge_onto(tmp_path / "tuned", str(sources["gpt2"]), tmp_path / "out", check=False)
    from peft import PeftModel

    expected = PeftModel.from_pretrained(stock("gpt2"), str(tmp_path / "tuned" / "adapter"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    assert error(logits(merged), logits(expected)) < 1e-5


def test_loftq_starts_from_the_transposed_weight(sources) -> None:
    model = quantize(sources["gpt2"], "hqq", bits=2)
    before = error(logits(model), logits(stock("gpt2")))
    tuned = qa.attach(model, "lora", r=32, init_lora_weights="loftq")
    assert error(logits(tuned), logits(stock("gpt2"))) < before / 2


def test_one_lost_tensor_of_them_is_refused(sources, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    quantize(sources["gpt2"], "hqq").config.save_pretrained(tmp_path)
    held = load_file(sources["gpt2"] / "model.safetensors")
    lost = next(name for name in held if name.endswith("c_fc.weight"))
    del held[lost]
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(WrongTensors, match=lost.replace(".", r"\.")):
        quantize(tmp_path, "hqq")


# What is linear ----------------------------------------------------------------------------------


class Same(nn.Linear):
    """As nn.Linear."""


class Written(nn.Linear):
    def forward(self, input):
        return input @ self.weight.T + (0 if self.bias is None else self.bias)


class Scaled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Router(nn.Linear):
    def forward(self, input):
        return super().forward(input).topk(2)


class WithScale(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.scale = nn.Parameter(torch.ones(1))


class Needing(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.factor = 3

    def forward(self, input):
        return super().forward(input) * self.factor


def test_what_is_linear() -> None:
    for kind in (nn.Linear, Same, Written):
        assert is_linear(kind(4, 3)), kind
        assert is_linear(kind(4, 3, bias=False)), kind
        assert is_linear(kind(4, 3, device="meta"))
    assert is_linear(Conv1D(3, 4))
    for other in (Scaled, Router, WithScale, Needing, nn.Embedding):
        assert not is_linear(other(4, 3)), other
    attention = nn.MultiheadAttention(8, 2)
    assert not is_linear(attention.out_proj)
    patched = Same(4, 3)
    patched.forward = lambda x: x
    assert not is_linear(patched)
    assert not is_linear(nn.utils.parametrizations.weight_norm(Same(4, 3)))


def test_layers_that_only_look_linear_stay_and_compute_as_before() -> None:
    model = nn.Sequential(Same(8, 8), Scaled(8, 8), Conv1D(8, 8), nn.MultiheadAttention(8, 2))
    expected = copy.deepcopy(model)
    found = qa.quantize(model, "none", device="cpu")
    assert [name for name, _ in facades(found)] == ["0", "2"]
    x = torch.randn(2, 8)
    assert error(found[:3](x), expected[:3](x)) < 1e-6
    attended = expected[3](x, x, x)[0]
    assert torch.equal(found[3](x, x, x)[0], attended)


def test_there_and_back() -> None:
    conv, x = Conv1D(6, 4), torch.randn(3, 4)
    nn.init.normal_(conv.bias)
    linear = as_linear(conv)
    assert (linear.in_features, linear.out_features) == (4, 6)
    assert error(linear(x), conv(x)) < 1e-6
    assert torch.equal(as_conv1d(linear).weight, conv.weight)
    assert not as_conv1d(nn.Linear(4, 6, bias=False)).bias.any()


def test_a_loaded_model_is_of_its_own_class(sources) -> None:
    for kind, folder in sources.items():
        model = from_pretrained(str(folder))
        assert type(model) is type(stock(kind))
        assert len(list(linear_layers(model, ("lm_head",)))) == 4


def test_gpt2_with_a_head_for_classes(tmp_path) -> None:
    config = copy.deepcopy(CONFIGS["gpt2"])
    config.pad_token_id, config.num_labels = 2, 3
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "source")
    model = quantize(tmp_path / "source", "hqq")
    tuned = moved(qa.attach(model, "lora", r=4))
    merged_model(tuned, "dense").save_pretrained(tmp_path / "merged")
    plain = GPT2ForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert error(logits(plain), logits(tuned)) < 1e-5
