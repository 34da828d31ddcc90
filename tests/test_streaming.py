"""A base that is streamed from CPU memory computes what it did before, whatever its backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from test_experts import BASE, KINDS, with_lora
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import quantadapt as qa
from quantadapt.dependencies import missing_requirements
from quantadapt.facade import facades, stack_facades
from quantadapt.model.held import held_tensors
from quantadapt.registry import registry
from quantadapt.streaming import Streamer, bring_back, stream, streamer_of

LAYERS = 4
FEW = ("bnb-nf4", "hqq", "none", "torchao-int8")
"""Each keeps its tensors in another way."""
OTHERS = sorted(
    record.name
    for record in registry().backends()
    if "cpu" in record.devices and record.name not in FEW and not missing_requirements(record)
)


def llama(layers: int = LAYERS, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        **more,
    )
    return LlamaForCausalLM(config).eval()


def base(backend: str = "hqq", model: nn.Module | None = None) -> nn.Module:
    data = [{"input_ids": torch.arange(64).reshape(1, 64) + i} for i in range(4)]
    calibrates = registry().backend(backend).calibration
    return qa.quantize(
        llama() if model is None else model,
        backend,
        device="cpu",
        dtype="float32",
        calibration=data if calibrates else None,
    )


def streamed(model: nn.Module) -> Streamer:
    found = streamer_of(model)
    assert found is not None
    return found


def passes(model: Any) -> list[Tensor]:
    """Logits, and the gradient at the first block's input, which goes through every weight."""
    x = torch.linspace(-1, 1, 2 * 12 * 128).reshape(2, 12, 128).sin().requires_grad_()
    logits = model(inputs_embeds=x, use_cache=False).logits
    logits.square().mean().backward()
    return [logits.detach(), x.grad]


def held(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every tensor that a vendor's layer holds."""
    found = held_tensors([facade.own_vendor for _, facade in facades(model)])
    return {name: tensor.detach().clone() for name, tensor in found}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def computes_the_same(backend: str) -> None:
    model = base(backend)
    whole, before, weights = passes(model), held(model), [f.dequantize() for _, f in facades(model)]
    stream(model)
    streamer = streamed(model)
    assert len(streamer.blocks) == LAYERS
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(whole, passes(model), strict=True))
    read = [facade.dequantize() for _, facade in facades(model)]  # kept, while others come
    assert all(torch.equal(a, b) for a, b in zip(weights, read, strict=True))
    assert same(held(model), before)
    bring_back(model)
    assert streamer_of(model) is None
    assert same(held(model), before)
    assert all(torch.equal(a, b) for a, b in zip(whole, passes(model), strict=True))


@pytest.mark.parametrize("backend", FEW)
def test_a_streamed_base_computes_the_same(backend: str) -> None:
    computes_the_same(backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", OTHERS)
def test_with_other_backends_it_computes_the_same(backend: str) -> None:
    computes_the_same(backend)


def gradients(model: Any) -> dict[str, Tensor]:
    ids = torch.randint(0, 128, (2, 11), generator=torch.Generator().manual_seed(1))
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"loss": loss.detach(), **found}


def experts(kind: str) -> nn.Module:
    name, more = KINDS[kind]
    sizes = {**BASE, **more, "hidden_size": 64, "head_dim": 16}
    torch.manual_seed(0)
    config = getattr(transformers, name)(**sizes, initializer_range=0.1)
    return AutoModelForCausalLM.from_config(config).float().eval()


@pytest.mark.parametrize("kind", ["qwen3-moe", "gpt-oss"])
@pytest.mark.parametrize("backend", ["hqq", "bnb-nf4", "torchao-int8"])
def test_experts_compute_the_same(kind: str, backend: str) -> None:
    model = with_lora(qa.quantize(experts(kind), backend, device="cpu", dtype="float32"))
    expected = gradients(model)
    stream(model, "experts")
    vendors = list(streamed(model).vendors())
    assert [type(f).__name__ for _, f in facades(model) if f.own_vendor in vendors] == (
        ["QuantStack"] * len(dict(stack_facades(model)))
    )
    assert same(gradients(model), expected)
    stream(model, "all")  # what is left
    assert len(list(streamed(model).vendors())) > len(vendors)
    assert same(gradients(model), expected)
    assert same(gradients(bring_back(model)), expected)


def lora(model: nn.Module, **options: Any) -> Any:
    return qa.attach(model, "lora", r=4, **options)


OPTIONS: dict[str, dict[str, Any]] = {
    "kept": {"gradient_checkpointing": False},
    "recomputed": {"gradient_checkpointing": True},
    "reentrant": {"gradient_checkpointing": True, "use_reentrant": True},
    "little memory": {"memory": "min"},
    "accumulated": {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    "validated": {"eval_steps": 1, "save_steps": 1},
}


def trained(model: Any, data: Any, tokenizer: Any, **options: Any) -> Any:
    if "eval_steps" in options:
        options["eval_data"] = data.select(range(4))
    return qa.train(
        model,
        data,
        tokenizer=tokenizer,
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        **options,
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_training_gives_the_same_losses(options: Any, tokenizer: Any, random_data: Any) -> None:
    found, adapters = [], []
    for streams in (False, True):
        model = lora(base("bnb-nf4"))
        if streams:
            stream(model)
        result = trained(model, random_data, tokenizer, **options)
        found.append((result.losses, result.validation))
        adapters.append({n: p.detach() for n, p in model.named_parameters() if "lora_" in n})
    assert found[0] == found[1]
    assert same(*adapters)
    assert result.streamed.gib > 0
    streamer = streamed(model)
    assert not streamer._slots  # the device is left
    assert all(
        t.untyped_storage().data_ptr() == block.row.untyped_storage().data_ptr()
        for block in streamer.blocks
        for t in (leaf.tensor for leaf in block.leaves)
    )
