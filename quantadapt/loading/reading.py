"""Read models through transformers, find their linear layers, and put others in their place.

Weights are read from safetensors only, never from pickles.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ModelError, QuantadaptError
from ..inputs.documents import reason
from ..inputs.model_config import config_problems
from ..inputs.weights import refuse_pickles
from ..model.numbers import refuse_not_numbers_in


def auto_class(config: Any) -> Any:
    """Return transformers' auto class: seq2seq for encoder-decoders, else causal LM."""
    import transformers

    if getattr(config, "is_encoder_decoder", False):
        return transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModelForCausalLM


def read_config(source: str) -> Any:
    """Return transformers' config of a checkpoint. Raises ModelError where there is none, or one
    whose sizes cannot be."""
    from transformers import AutoConfig, PretrainedConfig

    fix = "pass a folder with config.json and *.safetensors, or the id of a model on the hub"
    try:
        values, _ = PretrainedConfig.get_config_dict(source)
        if found := config_problems(values):
            raise ModelError(f"config.json: {'; '.join(found)}", fix=fix, where=source)
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except QuantadaptError:
        raise
    except Exception as error:  # what is in the file decides what transformers does
        what = f"no model can be read here: {reason(error)}"
        raise ModelError(what, fix=fix, where=source) from error


def architecture(source: str, device: str = "meta") -> nn.Module:
    """Return the model of a checkpoint without its weights, by default names and shapes only."""
    config = read_config(source)
    try:
        with torch.device(device):
            model: nn.Module = auto_class(config).from_config(config)
    except Exception as error:
        raise _load_error(source, error) from error
    return model


def from_pretrained(source: str, **kwargs: Any) -> nn.Module:
    """`AutoModel.from_pretrained`, safetensors only; what goes wrong becomes a ModelError."""
    config = kwargs.pop("config", None) or read_config(source)
    try:
        model: nn.Module = auto_class(config).from_pretrained(
            source, config=config, use_safetensors=True, **kwargs
        )
    except QuantadaptError:
        raise
    except Exception as error:  # what is in the files decides what transformers does
        raise _load_error(source, error) from error
    refuse_not_numbers_in(model, where=source)
    return model


def _load_error(source: str, error: Exception) -> ModelError:
    """Say why transformers could not make a model of a checkpoint."""
    folder = Path(source)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        fix = "use a smaller model, or a device with more memory"
        return ModelError("memory does not suffice to load it", fix=fix, where=source)
    if type(error).__name__ == "SafetensorError":
        fix = "download the checkpoint again; a file of it is damaged or cut short"
        return ModelError(f"the weights cannot be read: {error}", fix=fix, where=source)
    if folder.is_dir():
        try:
            refuse_pickles(folder, "*.safetensors")
        except ModelError as found:
            return found
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    what = f"the model cannot be loaded: {first}"
    if not isinstance(error, (OSError, ValueError, RuntimeError, ImportError)):
        what = f"transformers cannot make a model of config.json: {type(error).__name__}: {first}"
    fix = "check that config.json and the weights are whole and belong together"
    return ModelError(what, fix=fix, where=source)


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
