"""Quantized Llamas with random weights, made on the spot block by block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from shapes import Shape
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from quantadapt.loading import linear_layers, set_submodule
from quantadapt.sharding import blocks, shard_block


def random_llama(
    shape: Shape,
    quantize: Callable[[nn.Linear], nn.Module],
    device: str,
    dtype: torch.dtype,
    sharded: bool = False,
) -> Any:
    """Make a Llama of `shape`, quantizing (and sharding) each block before the next is made."""
    config = shape.config()
    generator = torch.Generator(device).manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.device(device):
        model.model.rotary_emb = LlamaRotaryEmbedding(config)

    def filled(module: nn.Module) -> Any:
        module.to_empty(device=device)
        for parameter in module.parameters():
            if parameter.ndim == 1:
                nn.init.ones_(parameter)
            else:
                parameter.data.normal_(0, 0.02, generator=generator)
        return module.requires_grad_(False)

    for block in blocks(model).values():
        vendors = []
        for name, linear in list(linear_layers(block, ())):
            vendors.append(quantize(filled(linear)))
            set_submodule(block, name, vendors[-1])
        filled(block.input_layernorm)
        filled(block.post_attention_layernorm)
        if sharded:
            shard_block(block, vendors)
    for module in (model.model.embed_tokens, model.model.norm, model.lm_head):
        filled(module)
    return model


def random_aqlm(quantizer: Any, linear: nn.Linear) -> nn.Module:
    """Return a layer of random codes and codebooks: fitting real ones takes minutes."""
    from aqlm.utils import get_int_dtype

    like: dict[str, Any] = {"device": linear.weight.device}
    group = quantizer.out_group_size, quantizer.in_group_size
    rows, columns = linear.out_features // group[0], linear.in_features // group[1]
    bits, books = quantizer.nbits_per_codebook, quantizer.num_codebooks
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns, books), **like)
    state = {
        "codes": codes.to(get_int_dtype(bits)),
        "codebooks": torch.randn(books, 2**bits, *group, **like),
        "scales": torch.full((rows, 1, 1, 1), linear.in_features**-0.5, **like),
    }
    if linear.bias is not None:
        state["bias"] = linear.bias
    return quantizer.load_linear(linear, state)  # type: ignore[no-any-return]
