"""Reading checkpoints through transformers: safetensors only, nothing random, nothing silent."""

from __future__ import annotations

from ..model.modules import linear_layers, set_submodule, skipped_modules
from .blocks import BlockDone, Blocks, watching_blocks
from .reading import architecture, from_pretrained, load_native, local_folder, read_config

__all__ = [
    "BlockDone",
    "Blocks",
    "architecture",
    "from_pretrained",
    "linear_layers",
    "load_native",
    "local_folder",
    "read_config",
    "set_submodule",
    "skipped_modules",
    "watching_blocks",
]
