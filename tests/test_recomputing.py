"""Checkpointing some of the layers, with inputs in CPU memory: the same numbers, less kept."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_layers import GradientCheckpointingLayer

import quantadapt as qa
from quantadapt.errors import ModelError
from quantadapt.memory import Setting
from quantadapt.model import page_locked as page_locked_file
from quantadapt.training.cpu_inputs import CpuInputs
from quantadapt.training.lent import recomputed
from quantadapt.training.recomputing import Recomputer, decoder_layers

LAYERS = 4


def llama(dtype: torch.dtype = torch.float64, **options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=64, **{**sizes, **heads, **options})
    return LlamaForCausalLM(config).to(dtype).train()


def quantized() -> torch.nn.Module:
    """A facade over each linear layer, plain LoRA in front (fused), no dropout."""
    model = qa.quantize(llama(torch.float32), "torchao-int8", device="cpu")
    return qa.attach(model, "lora", r=4, init_lora_weights=False).train()


def adapted() -> torch.nn.Module:
    config = LoraConfig(r=4, lora_dropout=0.2, init_lora_weights=False, task_type="CAUSAL_LM",
                        target_modules=["q_proj", "down_proj"])  # fmt: skip
    return get_peft_model(llama(), config).double().train()


def invoked() -> torch.nn.Module:
    """aLoRA, which is on from a token on that half of the rows of `gradients` have."""
    config = LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM",
                        alora_invocation_tokens=[15, 16], target_modules="all-linear")  # fmt: skip
    return get_peft_model(llama(), config).double().train()


def gradients(model: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss and all gradients of one pass, with the same dropout each time."""
    ids = torch.arange(40).view(4, 10) % 64
    torch.manual_seed(1)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), found


def assert_same(model: torch.nn.Module, setting: Setting, reentrant: bool = False) -> None:
    loss, expected = gradients(model)
    with recomputed(model, setting, reentrant):
        for _ in range(2):  # the second time, buffers are used again
            again, found = gradients(model)
            assert again == loss
            assert found.keys() == expected.keys()
            for name, gradient in found.items():
                assert torch.allclose(gradient, expected[name], rtol=1e-6, atol=1e-9), name


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("count", [0, 1, 3, LAYERS])
@pytest.mark.parametrize("make", [adapted, quantized, invoked])
def test_loss_and_gradients_stay_the_same(make, count, offload) -> None:
    assert_same(make(), Setting(count, offload, 4))


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("make", [adapted, invoked])
def test_the_reentrant_kind(make, offload) -> None:
    model = make()
    assert_same(model, Setting(LAYERS, offload, 4), reentrant=True)
    assert not model.get_input_embeddings()._forward_hooks


def test_what_was_switched_on_before_is_so_afterwards() -> None:
    model = adapted()
    model.get_base_model().gradient_checkpointing_enable()
    layers = decoder_layers(model)
    before = [layer._gradient_checkpointing_func for layer in layers]
    with recomputed(model, Setting(0, True, 4)):
        assert not any(layer.gradient_checkpointing for layer in layers)
    assert all(layer.gradient_checkpointing for layer in layers)
    assert [layer._gradient_checkpointing_func for layer in layers] == before


def test_a_layer_inside_a_layer_is_recomputed_with_it() -> None:
    outer = GradientCheckpointingLayer()
    outer.inner = GradientCheckpointingLayer()
    assert decoder_layers(torch.nn.Sequential(outer)) == [outer]


def test_layers_are_told_apart_by_whole_names() -> None:
    assert len(decoder_layers(llama(num_hidden_layers=11))) == 11  # the last is "layers.10"


@pytest.mark.parametrize("count", [0, 1, 3, LAYERS])
def test_so_many_layers_are_computed_twice(count) -> None:
    model = adapted()
    calls: Counter[int] = Counter()
    for index, layer in enumerate(decoder_layers(model)):
        norm = layer.post_attention_layernorm
        norm.register_forward_hook(lambda *_, i=index: calls.update([i]))
    with recomputed(model, Setting(count, False, 4)):
        gradients(model)
    assert [calls[i] for i in range(LAYERS)] == [2] * count + [1] * (LAYERS - count)


def test_a_setting_can_be_changed_and_everything_is_given_back() -> None:
    model = adapted()
    before = [set(module.__dict__) for module in model.modules()]
    with recomputed(model) as recomputer:
        assert recomputer.count == LAYERS
        for count in (4, 0, 2):
            recomputer.apply(Setting(count, False, 4))
            on = [layer.gradient_checkpointing for layer in recomputer.layers]
            assert on == [True] * count + [False] * (LAYERS - count)
    assert before == [set(module.__dict__) for module in model.modules()]
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def test_only_the_inputs_of_layers_go_to_cpu_memory(monkeypatch) -> None:
    stored: list[tuple[int, ...]] = []
    store = CpuInputs._store

    def remember(self, tensor):
        stored.append(tuple(tensor.shape))
        return store(self, tensor)

    monkeypatch.setattr(CpuInputs, "_store", remember)
    model = adapted()
    with recomputed(model, Setting(3, True, 4)) as recomputer:
        gradients(model)
        assert stored == [(4, 10, 32)] * 3
        assert len(recomputer.inputs._free) == 3
        gradients(model)
        assert len(recomputer.inputs._free) == 3


@pytest.mark.parametrize("make", [adapted, quantized])
def test_inputs_in_cpu_memory_are_freed_where_they_came_from(make) -> None:
    def alive(offload: bool) -> list[bool]:
        model, seen = make(), []
        hooks = [
            layer.register_forward_pre_hook(
                lambda _, args: seen.append(StorageWeakRef(args[0].untyped_storage()))
            )
            for layer in decoder_layers(model)
        ]
        ids = torch.arange(40).view(4, 10) % 64
        with recomputed(model, Setting(LAYERS, offload, 4)):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            found = [not storage.expired() for storage in seen]
            loss.backward()
        for hook in hooks:
            hook.remove()
        return found

    assert alive(offload=False) == [True] * LAYERS
    assert alive(offload=True) == [False] * (LAYERS - 1) + [True]  # the last is on its way


def test_buffers_grow_with_longer_batches() -> None:
    inputs = CpuInputs()
    short, long = torch.ones(2, 4, requires_grad=True), torch.full((3, 8), 2.0, requires_grad=True)
    for tensor in (short, long, short):
        with inputs.saving(tensor):
            sine = tensor.sin()
        sine.sum().backward()
        assert torch.equal(tensor.grad, tensor.detach().cos())
        tensor.grad = None
        del sine
    assert [buffer.numel() for buffer in inputs._free] == [long.nbytes]


def resident() -> int:
    """Bytes of CPU memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.cuda
def test_page_locked_buffers_are_as_large_as_what_they_hold() -> None:
    """PyTorch's allocator takes the next power of two: almost twice as much CPU memory."""
    inputs, nbytes = CpuInputs(), 2**30 + 2**20
    held = [torch.ones(nbytes // 2, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    inputs._store(held[0][:1])  # what CUDA takes for itself
    before = resident()
    stored = [inputs._store(tensor) for tensor in held]
    assert 0.9 * 2 * nbytes < resident() - before < 1.1 * 2 * nbytes
    assert all(one.buffer.is_pinned() for one in stored)
    del held
    assert all(int(one.fetched().float().sum()) == nbytes // 2 for one in reversed(stored))
    inputs.close()
    assert not any(one.buffer.is_pinned() for one in stored)


def test_what_cpu_memory_cannot_hold_is_said_before_the_system_ends_the_process(
    monkeypatch,
) -> None:
    monkeypatch.setattr(page_locked_file, "host_memory", lambda: 2**30 + 2**20)
    with pytest.raises(ModelError) as caught:
        page_locked_file.page_locked(2**21, "the inputs of layers", "lower it", "train.memory")
    assert str(caught.value).startswith(
        "train.memory: no 2.00 MiB of CPU memory can be locked for the inputs of layers:"
        " 1.00 GiB are free, and 1.00 GiB stays so"
    )


def test_a_graph_that_is_dropped_gives_its_buffers_back() -> None:
    inputs = CpuInputs()
    tensor = torch.ones(4, requires_grad=True)
    with inputs.saving(tensor):
        product = tensor * 3 * tensor
    assert inputs._free == []
    del product
    assert len(inputs._free) > 0


def test_an_encoder_and_a_decoder() -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
                      dropout_rate=0.0, decoder_start_token_id=0)  # fmt: skip
    model = T5ForConditionalGeneration(config).double().train()
    assert len(decoder_layers(model)) == 4
    assert_same(model, Setting(3, True, 4))


def test_a_model_with_learned_positions() -> None:
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 64, "n_positions": 16}
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    assert_same(GPT2LMHeadModel(GPT2Config(**sizes, **off)).double().train(), Setting(2, True, 4))


def test_a_model_that_knows_all_layers_or_none() -> None:
    """Such a model loops over its layers itself and asks its own flag."""

    model = adapted()
    with recomputed(model) as recomputer:
        recomputer.layers = []
        assert recomputer.count == 1
        recomputer.base.supports_gradient_checkpointing = False
        recomputer.apply(Setting(0, False, 4))  # nothing is asked of it
        del recomputer.base.supports_gradient_checkpointing
        assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        recomputer.apply(Setting(1, False, 4))
        assert all(layer.gradient_checkpointing for layer in decoder_layers(model))
        recomputer.base.supports_gradient_checkpointing = False
        with pytest.raises(ValueError, match="LlamaForCausalLM cannot recompute its layers"):
            Recomputer.apply(recomputer, Setting(1, False, 4))
        del recomputer.base.supports_gradient_checkpointing
