"""Quantized models with random weights, made on the spot block by block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from shapes import Shape
from torch import nn
from transformers import AutoModelForCausalLM

from quantadapt.loading import BlockDone
from quantadapt.model.experts import expert_stacks, set_stack
from quantadapt.model.modules import linear_layers, set_submodule
from quantadapt.sharding import blocks


def random_llama(
    shape: Shape,
    quantize: Callable[[nn.Linear], nn.Module],
    device: str,
    dtype: torch.dtype,
    done: BlockDone | None = None,
) -> Any:
    """Make a Llama of `shape`, as `random_model`."""
    return random_model(shape.config(), quantize, device, dtype, done)


def random_model(
    config: Any,
    quantize: Callable[[nn.Linear], nn.Module],
    device: str,
    dtype: torch.dtype,
    done: BlockDone | None = None,
    stacks: bool = True,
) -> Any:
    """Make a model of `config`, quantizing each block before the next is made.

    Args:
        quantize: makes the vendor's layer of a dense one, or returns it as it is.
        done: gets each block and its quantized layers, to shard or stream them.
        stacks: whether stacks of experts are quantized, too.
    """
    generator = torch.Generator(device).manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)

    def filled(parameter: nn.Parameter) -> nn.Parameter:
        made = torch.empty(parameter.shape, dtype=dtype, device=device)
        made = made.fill_(1) if made.ndim == 1 else made.normal_(0, 0.02, generator=generator)
        return nn.Parameter(made, requires_grad=False)

    def fill(module: nn.Module) -> None:
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None and parameter.is_meta:
                    part._parameters[name] = filled(parameter)

    for block in blocks(model).values():
        vendors = []
        for name, linear in list(linear_layers(block, ())):
            fill(linear)
            vendors.append(quantize(linear))
            set_submodule(block, name, vendors[-1])
        for stack in list(expert_stacks(block, ())) if stacks else ():
            vendors.append(quantize(stack.as_linear(filled(block.get_parameter(stack.name)))))
            set_stack(block, stack, vendors[-1])
        fill(block)
        for name, buffer in list(block.named_buffers()):
            if buffer.is_meta:
                parent, _, key = name.rpartition(".")
                block.get_submodule(parent)._buffers[key] = torch.zeros_like(buffer, device=device)
        if done is not None:
            done(block, vendors)
    fill(model)
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
