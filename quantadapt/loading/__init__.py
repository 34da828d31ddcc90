"""Reading checkpoints through transformers: safetensors only, nothing random, nothing silent."""

from __future__ import annotations

from ..model.dense import skipped_modules
from ..model.linears import as_conv1d, is_conv1d, is_linear, linear_of
from ..model.modules import cast_parameters, linear_layers, not_converted, set_submodule
from .accounting import UnusedTensorsWarning, WrongTensors, expecting
from .blocks import BlockDone, Blocks, watching_blocks
from .reading import architecture, from_pretrained, load_native, read_config
from .tensors import Checkpoint, local_folder

__all__ = [
    "BlockDone",
    "Blocks",
    "Checkpoint",
    "UnusedTensorsWarning",
    "WrongTensors",
    "architecture",
    "as_conv1d",
    "cast_parameters",
    "expecting",
    "from_pretrained",
    "is_conv1d",
    "is_linear",
    "linear_layers",
    "linear_of",
    "load_native",
    "local_folder",
    "not_converted",
    "read_config",
    "set_submodule",
    "skipped_modules",
    "watching_blocks",
]
