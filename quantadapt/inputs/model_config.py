"""`config.json` of a checkpoint: are its sizes sizes, and can the files hold what it announces?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, create_model

from ..paths import INDEX
from .documents import odd_numbers, problems_in, shown

MOST_LAYERS = 10_000
_MOST = 10**9

_Size = Annotated[int, Field(gt=0, le=_MOST)]
_Layers = Annotated[int, Field(gt=0, le=MOST_LAYERS)]
_Length = Annotated[float, Field(gt=0, le=1e12, multiple_of=1, allow_inf_nan=False)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]

_SIZES = ("hidden_size", "vocab_size", "d_model", "n_embd", "n_head")
_OTHER_SIZES = ("n_inner", "d_ff", "d_kv", "ffn_dim", "num_local_experts")
_OF_LAYERS = (
    "intermediate_size",
    "moe_intermediate_size",
    "num_key_value_heads",
    "num_attention_heads",
)  # may be a list, a size for each layer
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers")
_POSITIVE = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_theta")
_SHARES = ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop")
_SWITCHES = ("tie_word_embeddings", "is_encoder_decoder", "use_cache", "mlp_bias")


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


_fields: dict[str, Any] = {
    **dict.fromkeys(_SIZES, (_Size, 1)),
    **dict.fromkeys(_OTHER_SIZES, (_Size | None, None)),
    **dict.fromkeys(_OF_LAYERS, (_Size | list[_Size] | None, None)),
    **dict.fromkeys(_LAYERS, (_Layers | None, None)),
    **dict.fromkeys(_POSITIVE, (_Positive | None, None)),
    **dict.fromkeys(_SHARES, (_Share | None, None)),
    **dict.fromkeys(_SWITCHES, (bool | None, None)),
    "num_hidden_layers": (_Layers, 1),
    "head_dim": (Annotated[int, Field(ge=0, le=_MOST)] | None, None),
    "model_type": (str | None, None),
    "max_position_embeddings": (_Length | None, None),
    "n_positions": (_Length | None, None),
    "hidden_act": (str | None, None),
    "architectures": (list[str] | None, None),
    "quantization_config": (dict[str, Any] | None, None),
    "dtype": (str | dict[str, Any] | None, None),
    "torch_dtype": (str | dict[str, Any] | None, None),
}
ModelConfig = create_model("ModelConfig", __base__=_Strict, **_fields)
"""What is checked of a config.json, under the names that the models of transformers use. All else
is left to transformers."""

DEQUANTIZED = ("mxfp4",)
"""Methods that checkpoints are stored with to be dequantized while they are read, by all backends
but those that keep them."""


def config_problems(config: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the contents of a config.json; empty if nothing is.

    The config of a text part, `text_config`, is checked as well.
    """
    found = problems_in(ModelConfig, config)
    if any(not isinstance(key, str) for key in config):
        found.append("it has keys that are no text")
    found += [f"{place} is not a number" for place in odd_numbers(config)]
    method = config.get("quantization_config")
    if isinstance(method, Mapping) and not isinstance(method.get("quant_method", ""), str):
        found.append("quant_method of quantization_config should be a text")
    if config.get("transformers_weights") not in (None, "model.safetensors", INDEX):
        given = shown(config["transformers_weights"])
        found.append(f"transformers_weights is {given}: weights are read from model.safetensors")
    heads = config.get("num_attention_heads", 1)
    if config.keys() >= {"hidden_size", "vocab_size"} and not isinstance(heads, int):
        found.append(f"num_attention_heads should be a number, not {shown(heads)}")
    if isinstance(part := config.get("text_config"), Mapping):
        found += [f"text_config: {problem}" for problem in problems_in(ModelConfig, part)]
    return list(dict.fromkeys(found))


TOWER_CONFIGS = {"vision": "vision_config", "audio": "audio_config"}
"""Towers beside the language model -> where a config.json has their sizes."""


def towers_in(config: Mapping[str, Any]) -> list[str]:
    """Return which of `TOWER_CONFIGS` a model with this config.json has beside its language model;
    none where it is none that predicts the next token."""
    if config.get("is_encoder_decoder"):
        return []
    return [name for name, key in TOWER_CONFIGS.items() if isinstance(config.get(key), Mapping)]


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config of the language model in a config.json: a part of it, or all of it."""
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def too_large(config: Mapping[str, Any], tensors: int, size: int) -> list[str]:
    """Return what a config announces that files with so many tensors and bytes cannot hold.

    A weight takes a bit at the very least, and a layer a tensor.
    """
    config = text_config(config)
    found = []
    for name in _LAYERS:
        layers = config.get(name)
        if isinstance(layers, int) and layers > tensors:
            found.append(f"{name} is {layers}, and its files hold {tensors} tensors")
    width, rows = config.get("hidden_size"), config.get("vocab_size")
    if isinstance(width, int) and isinstance(rows, int) and width * rows > 8 * size:
        what = f"vocab_size {rows} times hidden_size {width}"
        found.append(f"{what} is more than its files hold ({size} bytes)")
    return found
