"""Read models through transformers, find their linear layers, and put others in their place.

Weights are read from safetensors only, never from pickles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from ..facade import is_skipped

BlockDone = Callable[[nn.Module, list[nn.Module]], None]
_block_done: BlockDone | None = None


@contextmanager
def watching_blocks(done: BlockDone) -> Iterator[None]:
    """Inside, `done` gets each decoder block and its quantized layers as soon as all of them are
    made, while the model is still being loaded or quantized."""
    global _block_done
    before, _block_done = _block_done, done
    try:
        yield
    finally:
        _block_done = before


class Blocks:
    """Collects the quantized layers of each decoder block, for `watching_blocks`."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        from ..calibration.walk import decoder_blocks

        blocks = (decoder_blocks(model) or {}) if _block_done else {}
        self.waiting = {
            block: {name for name in names if name.startswith(f"{block}.")} for block in blocks
        }
        self.made: dict[str, list[nn.Module]] = {block: [] for block in blocks}

    def add(self, model: nn.Module, name: str, vendor: nn.Module) -> None:
        """Note that the layer `name` has become `vendor`."""
        block = next((block for block, names in self.waiting.items() if name in names), None)
        if block is None or _block_done is None:
            return
        self.waiting[block].discard(name)
        self.made[block].append(vendor)
        if not self.waiting[block]:
            _block_done(model.get_submodule(block), self.made.pop(block))


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


def skipped_modules(model: nn.Module, skip: tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the names that stay dense: `skip`, or the output head and what is tied to it."""
    if skip is not None:
        return skip
    if not hasattr(model, "get_output_embeddings"):
        return ()  # no transformers model
    from transformers.quantizers.base import get_keys_to_not_convert

    return tuple(get_keys_to_not_convert(model))


def linear_layers(model: nn.Module, skip: tuple[str, ...]) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the plain linear layers that are to be quantized."""
    for name, module in model.named_modules():
        if type(module) is nn.Linear and not is_skipped(name, skip):
            yield name, module


def set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at `name` and tell transformers that it needs no initialization."""
    for part in module.modules():
        part._is_hf_initialized = True  # type: ignore[assignment]
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    setattr(parent, child, module)
    # Some (T5) initialize the weights of their children, others (GPT-J) buffers that no file holds.
    if not parent._parameters and not parent._buffers:
        parent._is_hf_initialized = True  # type: ignore[assignment]


def load_native(path: str, *, device: str, dtype: torch.dtype) -> nn.Module:
    """Load a quantized checkpoint whose format transformers knows. See `Quantizer.load`."""
    return plain(from_pretrained(path, dtype=dtype, device_map={"": device}))


def plain(model: nn.Module) -> nn.Module:
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
