"""Inputs of every second layer that are made again from the layer before: the same numbers."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import quantadapt as qa
from quantadapt.memory import Setting
from quantadapt.streaming import bring_back, stream
from quantadapt.training.lent import recomputed

LENGTH = 24
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def dense(family: str = "llama", dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **options})
    return AutoModelForCausalLM.from_config(config).to(dtype).train()


def quantized(**options: Any) -> Any:
    model = qa.quantize(dense().float(), "torchao-int8", device="cpu")
    return qa.attach(model, "lora", r=4, init_lora_weights=False, **options).train()


def of_peft() -> Any:
    options: dict[str, Any] = {"lora_dropout": 0.3, "target_modules": "all-linear"}
    return get_peft_model(dense(), LoraConfig(r=4, init_lora_weights=False, **options)).train()


MODELS = {
    "llama": dense,
    "five layers": lambda: dense(num_hidden_layers=5),
    "gemma2": lambda: dense("gemma2"),
    "experts": lambda: dense("qwen3_moe", torch.float32, output_router_logits=True, **EXPERTS),
    "dropout": lambda: dense(attention_dropout=0.3),
    "peft": of_peft,
    "ours": quantized,
    "ours, dropout": lambda: quantized(lora_dropout=0.3),
    "dora": lambda: quantized(use_dora=True),
}


def passed(model: Any, rows: int = 2) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss of a pass, and all gradients."""
    torch.manual_seed(1)
    ids = torch.arange(rows * LENGTH).view(rows, LENGTH) * 5 % 63 + 1
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), found


@pytest.mark.parametrize("kind", MODELS)
def test_the_numbers_are_those_of_a_model_that_keeps_all(kind) -> None:
    model = MODELS[kind]()
    layers = model.config.num_hidden_layers
    loss, expected = passed(model)
    with recomputed(model, Setting(layers, True, 2, input_every=2)) as recomputer:
        for _ in range(2):  # the second time, buffers are used again
            again, found = passed(model)
            torch.testing.assert_close(again, loss, rtol=1e-12, atol=0)
            assert found.keys() == expected.keys()
            for name, gradient in found.items():
                torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-9)
            gc.collect()
            assert len(recomputer.inputs._free) == -(-layers // 2)


def test_each_second_layer_runs_once_more() -> None:
    model = dense(num_hidden_layers=5)
    ran = [0] * 5
    for index, layer in enumerate(model.model.layers):

        def count(*_: Any, index: int = index) -> None:
            ran[index] += 1

        layer.input_layernorm.register_forward_pre_hook(count)
    for every, expected in ((1, [2, 2, 2, 2, 2]), (2, [3, 2, 3, 2, 2])):
        ran[:] = [0] * 5
        with recomputed(model, Setting(5, True, 2, input_every=every)):
            passed(model)
        assert ran == expected


def test_nothing_stays_of_a_pass() -> None:
    """Of an odd number of layers, what the last one got beside its input did, up to the next."""
    model = dense(num_hidden_layers=5)
    seen: list[weakref.ref[torch.Tensor]] = []

    def look(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(weakref.ref(kwargs["position_embeddings"][0]))

    model.model.layers[-1].self_attn.register_forward_pre_hook(look, with_kwargs=True)
    with recomputed(model, Setting(5, True, 2, input_every=2)):
        passed(model)
        gc.collect()
        assert [found() for found in seen] == [None, None]


class Adding(nn.Module):
    """Adds to what the layer before returned, as some models do with pictures."""

    def __init__(self, layer: nn.Module, in_place: bool) -> None:
        super().__init__()
        self.layer, self.in_place = layer, in_place

    def forward(self, hidden: torch.Tensor, **options: Any) -> Any:
        return self.layer(hidden.add_(0.5) if self.in_place else hidden + 0.5, **options)


@pytest.mark.parametrize("in_place", [True, False])
def test_an_input_that_is_not_what_the_layer_before_returned_is_stored(in_place) -> None:
    model = dense()
    model.model.layers[1] = Adding(model.model.layers[1], in_place)
    loss, expected = passed(model)
    with recomputed(model, Setting(4, True, 2, input_every=2)) as recomputer:
        again, found = passed(model)
        gc.collect()
        assert len(recomputer.inputs._free) == 3  # that of the third is made from the second
    assert again == loss
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


def test_the_base_may_be_streamed() -> None:
    model = quantized()
    loss, expected = passed(model)
    stream(model)
    try:
        with recomputed(model, Setting(4, True, 2, input_every=2)):
            for _ in range(3):  # from the second on, the order of blocks is known
                again, found = passed(model)
                assert again == loss
                assert all(
                    torch.equal(found[name], gradient) for name, gradient in expected.items()
                )
    finally:
        bring_back(model)


@pytest.mark.cuda
def test_less_waits_in_page_locked_memory_on_cuda() -> None:
    model = dense(dtype=torch.bfloat16, hidden_size=512, num_attention_heads=8, head_dim=64).cuda()
    ids = torch.randint(1, 64, (2, 512), device="cuda")

    def measured(every: int) -> tuple[int, int, dict[str, torch.Tensor]]:
        with recomputed(model, Setting(4, True, 2, input_every=every)) as recomputer:
            for _ in range(2):
                model.zero_grad()
                torch.cuda.reset_peak_memory_stats()
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
            found = {n: p.grad.clone() for n, p in model.named_parameters()}
            return recomputer.inputs.nbytes, peak, found

    (every, peak, expected), (second, its_peak, found) = measured(1), measured(2)
    assert every == 4 * 2 * 512 * 512 * 2 == 2 * second
    assert its_peak <= peak + 2 * 512 * 512 * 2
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 0.02 * gradient.norm(), name
