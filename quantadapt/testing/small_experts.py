"""Mixtures of experts that the suites quantize: of one layer each, with random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from .bench import Bench

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "initializer_range": 0.1,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "moe_intermediate_size": 128, "mlp_only_layers": []},
    ),
    "gpt-oss": (
        "GptOssConfig",
        {
            "num_local_experts": 4,
            "sliding_window": 64,
            "layer_types": ["full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    ),
}
"""transformers' config class, and what it gets beside SIZES: stacks of [out, in], and of [in, out]
with biases and a gate of its own."""


def small_experts(bench: Bench, kind: str) -> nn.Module:
    """Return the dense model, the same one each time.

    Where numbers are rounded, each token goes through all experts: a router near the edge would
    send it elsewhere, and outputs could not be compared.
    """
    import torch
    import transformers

    name, more = KINDS[kind]
    coarse = bench.suite.dtype != "float32" or bench.plan.quantizer.target.quantizes_activations
    config = getattr(transformers, name)(
        **SIZES,
        **more,
        vocab_size=bench.dense.config.vocab_size,  # type: ignore[union-attr]
        num_experts_per_tok=4 if coarse else 2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = transformers.AutoModelForCausalLM.from_config(config)
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):  # zeros would hide one that is lost
            parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(key)))
    for parameter in model.parameters():  # not buffers: a loaded model has rotary ones in float32
        parameter.data = parameter.data.to(bench.torch_dtype)
    made: nn.Module = model.to(bench.suite.device).eval()
    return made


def quantized_share(model: nn.Module) -> float:
    """Return the share of the weights that are quantized, embeddings and head not counted."""
    from ..facade import facades

    found = sum(f.in_features * f.out_features for _, f in facades(model))
    tables = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    dense = {
        id(weight): weight.numel()
        for weight in model.parameters()
        if weight.ndim > 1 and not any(weight is table.weight for table in tables)
    }
    packed = {id(weight) for _, facade in facades(model) for weight in facade.parameters()}
    left = sum(count for key, count in dense.items() if key not in packed)
    return found / (found + left)
