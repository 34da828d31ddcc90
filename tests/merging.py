"""Small models, adapters of many kinds, and what stock PEFT and transformers make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn

import quantadapt as qa
from quantadapt.testing.small_demo import small_model

IDS = torch.arange(48).reshape(2, 24) + 100
HELD_OUT = Dataset.from_dict({"input_ids": IDS.tolist(), "completion_mask": [[1] * 24] * 2})

ADAPTERS: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "whole-head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "whole-embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "whole-both": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "whole-both-tied": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens", "lm_head"],
        "ensure_weight_tying": True,
    },
    "whole-linear": {"target_modules": ["q_proj"], "modules_to_save": ["down_proj"]},
    "whole-block": {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]},
    "whole-norm": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [105, 106, 1000]},
    "tokens-and-head": {
        "target_modules": ["q_proj", "lm_head"],
        "trainable_token_indices": [105, 106, 1000],
    },
    "tokens-named": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [105, 106]},
    },
    "parameters": {"target_modules": ["q_proj"], "target_parameters": ["mlp.down_proj.weight"]},
    "biases": {"target_modules": ["q_proj"], "bias": "all"},
    "biases-adapted": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "lora-bias": {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
}


def llama(folder: Path, *, tied: bool) -> str:
    """A small Llama with biases, in several files, with a tokenizer; return its folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    bias = {"attention_bias": True, "mlp_bias": True}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=2048, tie_word_embeddings=tied, **sizes, **heads, **bias)
    )
    return saved_model(model, folder)


def seq2seq(folder: Path, name: str) -> str:
    """A small T5 or BART; return its folder."""
    import transformers as t

    torch.manual_seed(0)
    ids = {"eos_token_id": 1, "pad_token_id": 2}
    if name == "t5":
        sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
        config = t.T5Config(vocab_size=2048, decoder_start_token_id=2, **sizes, **ids)
    else:
        sizes = {"encoder_layers": 2, "decoder_layers": 2, "d_model": 32}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        ffn = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
        config = t.BartConfig(
            vocab_size=2048, decoder_start_token_id=1, **sizes, **heads, **ffn, **ids
        )
    return saved_model(t.AutoModelForSeq2SeqLM.from_config(config), folder)


def gpt2(folder: Path) -> str:
    """A small GPT-2, whose linear layers are `Conv1D`, some of them square; return its folder."""
    from transformers import GPT2Config, GPT2LMHeadModel

    ids = {"bos_token_id": 1, "eos_token_id": 1}
    config = GPT2Config(vocab_size=2048, n_embd=32, n_layer=2, n_head=2, **ids)
    return saved_model(GPT2LMHeadModel(config), folder)


def neox(folder: Path) -> str:
    """A small GPT-NeoX, whose files call the head otherwise than the model; return its folder."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = GPTNeoXConfig(vocab_size=2048, num_attention_heads=2, **sizes)
    return saved_model(GPTNeoXForCausalLM(config), folder)


def classifier(folder: Path) -> str:
    """A small Qwen2 that tells three classes apart; return its folder."""
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=2048, num_labels=3, pad_token_id=0, **sizes, **heads)
    return saved_model(Qwen2ForSequenceClassification(config), folder)


def saved_model(model: nn.Module, folder: Path) -> str:
    """Save a model whose numbers are all far from zero; return its folder."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        if value.ndim > 1 or name.endswith("bias"):
            value.data = torch.randn(value.shape, generator=generator) * 0.2
    model.save_pretrained(folder, max_shard_size="150KB")
    for file in small_model().glob("*token*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    return str(folder)


def tuned(base: str, backend: str = "none", adapter: str = "lora", **options: Any) -> Any:
    """A model with an adapter whose parameters all have moved."""
    bits = {"hqq": {"bits": 8, "group_size": 32}}.get(backend, {})
    return moved(qa.attach(qa.quantize(base, backend, **bits), adapter, **options))


def moved(model: Any, by: float = 0.1) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += by * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    inputs = {"input_ids": IDS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS[:, :7]
    return model.eval()(**inputs).logits


def stock(folder: str | Path) -> nn.Module:
    """The model in a folder as anybody loads it; nothing in the files may be lost or left over."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    seq2seq = AutoConfig.from_pretrained(folder).is_encoder_decoder
    kind = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On CPUs that can, bitsandbytes evaluates in bfloat16, with scales in it, for good.
            module.support_avx512bf16_for_cpu = False
    return model


def stock_adapter(base: str, adapter: Path) -> nn.Module:
    """A saved adapter on its base, by PEFT and transformers alone."""
    from peft import PeftModel

    return PeftModel.from_pretrained(stock(base), str(adapter))


def relative(found: torch.Tensor, reference: torch.Tensor) -> float:
    return float((found - reference).norm() / reference.norm())
