"""Reading checkpoints through transformers: safetensors only, nothing random, nothing silent."""

from __future__ import annotations

from .reading import (
    BlockDone,
    Blocks,
    architecture,
    from_pretrained,
    linear_layers,
    load_native,
    local_folder,
    read_config,
    set_submodule,
    skipped_modules,
    watching_blocks,
)

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
