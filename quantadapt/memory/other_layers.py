"""What a config.json says of layers that are neither attention nor an MLP: their memory is
not known here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .shape import language_config

_LISTS = ("layer_types", "layers_block_type", "block_types", "_block_types")
"""What configs call the list of what layers are."""
_ATTENTION = ("attention", "chunked_attention", "full_attention", "sliding_attention")
"""What such a list calls layers that are known."""
_MAMBA = ("mamba", "hybrid", "linear_attention")
"""What such a list calls layers with Mamba blocks where the config has sizes of those."""


def other_layers(config: Mapping[str, Any]) -> str | None:
    """Return, in a sentence, how a plan counts layers that it does not know; None where it knows
    all."""
    config = language_config(config)
    kinds = {
        str(kind)
        for name in _LISTS
        if isinstance(config.get(name), list | tuple)
        for kind in config[name]
        if kind not in _ATTENTION
    }
    if any("mamba" in key for key in config):
        kinds = kinds.difference(_MAMBA) | {"Mamba"}
    if not kinds:
        return None
    named = ", ".join(sorted(kinds))
    return (
        "memory counts every layer as attention and an MLP, and some of this model's have other"
        f" blocks ({named}): a run may need more, or less, than is foreseen"
    )
