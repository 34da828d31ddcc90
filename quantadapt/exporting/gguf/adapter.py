"""A LoRA adapter as GGUF: the factors of each layer, under llama.cpp's names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ModelError
from ...inputs.documents import read_object
from ..adapter_files import CONFIG, WEIGHTS
from .converter import CONVERT
from .families import FAMILIES, gguf_name, rotated_heads, unknown_in
from .files import GGUFFile, NumberFormat
from .model import rotated

if TYPE_CHECKING:
    from torch import Tensor

_PREFIX, _MERGE = "base_model.model.", "merge it: quantadapt export RUN gguf"


def write_adapter(
    folder: Path, config: Mapping[str, Any], path: Path, numbers: NumberFormat, name: str
) -> int:
    """Write the LoRA adapter in `folder`, of a base with this `config`, and read it again.

    Returns:
        How many layers it adapts.

    Raises:
        ModelError: it holds something that llama.cpp has no place for.
    """
    if unknown := unknown_in(config):
        raise ModelError(f"it cannot be written as GGUF: {'; '.join(unknown)}", fix=CONVERT)
    family = FAMILIES[config["model_type"]]
    options = read_object(folder / CONFIG)
    file = GGUFFile(path, family.architecture, numbers)
    file.set("general.type", "adapter")
    file.set("general.name", name)
    file.set("adapter.type", "lora")
    layers = list(_layers(folder))
    scales = {layer: _scale(layer, first.shape[0], options) for layer, first, _ in layers}
    alpha = max(scales[layer] * first.shape[0] for layer, first, _ in layers)
    file.set("adapter.lora.alpha", float(alpha))
    for layer, first, second in layers:
        key = gguf_name(family, f"{layer}.weight")
        if key is None or (layer == "lm_head" and config.get("tie_word_embeddings")):
            raise ModelError(f"llama.cpp has no place for an adapter on {layer}", fix=_MERGE)
        heads = rotated_heads(family, f"{layer}.weight", config)
        second = second if heads is None else rotated(second, heads)
        # llama.cpp multiplies by alpha / rank; what is to be another scale goes into the factor.
        second = second * (scales[layer] * first.shape[0] / alpha)
        for part, tensor in (("lora_a", first), ("lora_b", second)):
            file.add(f"{key}.{part}", tuple(tensor.shape), _giving(tensor))
    file.write()
    file.refuse_other()
    return len(layers)


def _giving(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


def _layers(folder: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield layer, A [rank, inputs] and B [outputs, rank] of a saved adapter. Raises ModelError
    where it holds anything else."""
    from safetensors.torch import load_file

    tensors = load_file(folder / WEIGHTS)
    layers = [
        key.removesuffix(".lora_A.weight") for key in tensors if key.endswith("lora_A.weight")
    ]
    known = {f"{layer}.lora_{part}.weight" for layer in layers for part in "AB"}
    if others := sorted(tensors.keys() ^ known):
        what = f"llama.cpp has no place for what the adapter holds: {', '.join(others[:3])}"
        raise ModelError(what, fix=_MERGE, where=str(folder))
    for layer in layers:
        first, second = (tensors[f"{layer}.lora_{part}.weight"].float() for part in "AB")
        yield layer.removeprefix(_PREFIX), first, second


def _scale(layer: str, rank: int, options: Mapping[str, Any]) -> float:
    """Return what PEFT multiplies B A by."""
    from peft.utils.other import get_pattern_key

    patterns = options.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(patterns, layer), options["lora_alpha"])
    return float(alpha) / (rank**0.5 if options.get("use_rslora") else rank)
