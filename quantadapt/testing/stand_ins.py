"""Stand-ins for the small models of the hub that PEFT's tests load: the same classes with random
weights, in a folder laid out as the hub's cache. So these tests need no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

MODELS = {
    "BartForConditionalGeneration": (
        "peft-internal-testing/tiny-random-BartForConditionalGeneration",
    ),
    "BertForSequenceClassification": (
        "peft-internal-testing/tiny-random-BertForSequenceClassification",
    ),
    "BertModel": ("peft-internal-testing/tiny-random-BertModel",),
    "BloomForCausalLM": ("peft-internal-testing/tiny-random-BloomForCausalLM",),
    "DebertaModel": ("peft-internal-testing/tiny-random-DebertaModel",),
    "DebertaV2Model": ("peft-internal-testing/tiny-random-DebertaV2Model",),
    "GPT2LMHeadModel": (
        "hf-internal-testing/tiny-random-gpt2",
        "peft-internal-testing/tiny-random-GPT2LMHeadModel",
        "peft-internal-testing/tiny-random-gpt2",
    ),
    "GPTJForCausalLM": ("peft-internal-testing/tiny-random-GPTJForCausalLM",),
    "GPTNeoXForCausalLM": ("peft-internal-testing/tiny-random-GPTNeoXForCausalLM",),
    "Gemma3ForCausalLM": ("hf-internal-testing/tiny-random-Gemma3ForCausalLM",),
    "LlamaForCausalLM": (
        "peft-internal-testing/tiny-random-LlamaForCausalLM",
        "trl-internal-testing/tiny-random-LlamaForCausalLM",
    ),
    "LlamaForSequenceClassification": (
        "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2",
    ),
    "MistralForCausalLM": ("hf-internal-testing/tiny-random-MistralForCausalLM",),
    "OPTForCausalLM": (
        "peft-internal-testing/opt-125m",
        "peft-internal-testing/tiny-random-OPTForCausalLM",
    ),
    "Qwen2ForCausalLM": ("peft-internal-testing/tiny-dummy-qwen2",),
    "RobertaForSequenceClassification": (
        "peft-internal-testing/tiny-random-RobertaForSequenceClassification",
    ),
    "RobertaModel": ("peft-internal-testing/tiny-random-RobertaModel",),
    "T5ForConditionalGeneration": (
        "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated",
    ),
}
"""The class, and the names on the hub that stand for a model of it."""

_TOKENS = ("<pad>", "<s>", "</s>")
_SIZES = {
    **dict.fromkeys(("hidden_size", "word_embed_proj_dim", "d_model"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "rotary_dim"), 8),
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
_MORE = {"OPTForCausalLM": {"num_hidden_layers": 5}}
"""Sizes that tests count on."""
_REVISION = "0" * 40


def write_stand_ins(cache: Path, texts: list[str]) -> None:
    """Write into `cache`, as huggingface_hub caches models, those that `texts` name."""
    for kind, name in ((kind, name) for kind, names in MODELS.items() for name in names):
        if any(f'"{name}"' in text for text in texts):
            folder = cache / f"models--{name.replace('/', '--')}"
            (folder / "refs").mkdir(parents=True)
            (folder / "refs" / "main").write_text(_REVISION)
            _write(kind, folder / "snapshots" / _REVISION)


def _write(kind: str, folder: Path) -> None:
    import torch
    import transformers

    cls = getattr(transformers, kind)
    known = cls.config_class()
    sizes = _SIZES | _MORE.get(kind, {})
    config = cls.config_class(**{key: n for key, n in sizes.items() if hasattr(known, key)})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls(config)
    if config.is_encoder_decoder:
        model.generation_config.decoder_start_token_id = _SIZES["decoder_start_token_id"]
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


def _tokenizer() -> Any:
    """Return a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((*_TOKENS, *letters))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, bos, eos = _TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos
    )
