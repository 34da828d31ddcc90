"""transformers' `save_pretrained`: what it writes of a quantized model says how it is quantized.
Without that, packed weights would be read as dense ones, or left out for random numbers."""

from __future__ import annotations

import inspect
from functools import wraps
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ModelError
from ..loading.writing import being_written, written_now
from ..protocols import LayerwiseQuantizer, Quantizer
from .lazy_weight import quantized_layers


def saving_as_quantized(save: Any) -> Any:
    """Return `PreTrainedModel.save_pretrained` as it is for other models; quantized ones are
    written by their backend, which calls it in turn and gets the caller's options, too."""

    @wraps(save)
    def saved(model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        writing, options = written_now()
        if writing is model:
            return save(model, save_directory, *args, **{**options, **kwargs})
        adapter_alone = getattr(model, "_hf_peft_config_loaded", False)
        if adapter_alone or (quantizer := _quantizer_of(model)) is None:
            return save(model, save_directory, *args, **kwargs)
        with being_written(model, {**dict(zip(_names(save), args, strict=False)), **kwargs}):
            quantizer.save(model, Path(save_directory))
        return None

    return saved


def _names(save: Any) -> list[str]:
    """Return the names of what follows model and folder in the call."""
    return list(inspect.signature(save).parameters)[2:]


def _quantizer_of(model: nn.Module) -> Quantizer | None:
    """Return what a model is quantized by; None where nothing is.

    Raises:
        ModelError: nobody has kept that.
    """
    layers = [layer for _, layer in quantized_layers(model)]
    if not layers:
        return None
    knowing = (getattr(model, "quantadapt", None), *(layer.target for layer in layers))
    found = [getattr(one, "quantizer", None) for one in knowing]
    known = [one for one in found if isinstance(one, Quantizer)]
    if not known:
        what = "it is quantized, and nothing says by which options"
        raise ModelError(what, fix="save it with quantadapt.save")
    return next((one for one in known if _quantizes(one)), known[0])


def _quantizes(quantizer: Quantizer) -> bool:
    """Say whether there is something to write of it: some layers may be dense behind a facade."""
    return not isinstance(quantizer, LayerwiseQuantizer) or bool(quantizer.quantization_config())
