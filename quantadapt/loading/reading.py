"""Read models through transformers, find their linear layers, and put others in their place.

Weights are read from safetensors only, never from pickles.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ModelError


def auto_class(config: Any) -> Any:
    """Return transformers' auto class: seq2seq for encoder-decoders, else causal LM."""
    import transformers

    if getattr(config, "is_encoder_decoder", False):
        return transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModelForCausalLM


def read_config(source: str) -> Any:
    """Return transformers' config of a checkpoint. Raises ModelError where there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        fix = "pass a folder with config.json and *.safetensors, or the id of a model on the hub"
        reason = str(error).splitlines()[0]
        raise ModelError(f"no model can be read here: {reason}", fix=fix, where=source) from None


def architecture(source: str, device: str = "meta") -> nn.Module:
    """Return the model of a checkpoint without its weights, by default names and shapes only."""
    config = read_config(source)
    with torch.device(device):
        model: nn.Module = auto_class(config).from_config(config)
    return model


def from_pretrained(source: str, **kwargs: Any) -> nn.Module:
    """`AutoModel.from_pretrained`, safetensors only; what goes wrong becomes a ModelError."""
    config = kwargs.pop("config", None) or read_config(source)
    try:
        model: nn.Module = auto_class(config).from_pretrained(
            source, config=config, use_safetensors=True, **kwargs
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise _load_error(source, error) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        fix = "download the checkpoint again; a file of it is damaged or cut short"
        raise ModelError(f"the weights cannot be read: {error}", fix=fix, where=source) from error
    return model


def _load_error(source: str, error: Exception) -> ModelError:
    first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    folder = Path(source)
    pickles = sorted(p.name for p in folder.glob("*.bin")) if folder.is_dir() else []
    if pickles and not list(folder.glob("*.safetensors")):
        what = f"its weights are pickles ({', '.join(pickles)}), which can run code when read"
        fix = "load it with transformers where you trust it, and save_pretrained it again"
        return ModelError(what, fix=fix, where=source)
    return ModelError(f"the model cannot be loaded: {first}", fix="check the files", where=source)


def load_native(path: str, *, device: str, dtype: torch.dtype) -> nn.Module:
    """Load a quantized checkpoint whose format transformers knows. See `Quantizer.load`."""
    return unmarked(from_pretrained(path, dtype=dtype, device_map={"": device}))


def unmarked(model: nn.Module) -> nn.Module:
    """Take transformers' marks of a quantized model off again: the facades make it an ordinary one,
    and its Trainer refuses marked models that it has no entry for."""
    for name in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if name in vars(model):
            delattr(model, name)
    model.is_quantized = False  # type: ignore[assignment]
    config: Any = model.config
    for name in ("quantization_config", "_is_quantized"):
        if name in vars(config):
            delattr(config, name)
    if conversions := vars(model).get("_weight_conversions"):
        # Saving runs them backwards, which those that unpacked a quantized checkpoint cannot.
        kept = [conversion for conversion in conversions if _is_reversible(conversion)]
        model._weight_conversions = kept  # type: ignore[assignment]
    return model


def _is_reversible(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


def local_folder(path: str) -> Path:
    """Return the folder of a checkpoint; that of a hub id is downloaded if it has to be."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.json"]))
