"""A model run block by block, for quantizers that calibrate.

`walk_blocks` shows each linear layer its inputs, `each_block` hands on whole blocks. `open_experts`
makes linear layers of stacks of experts for both.
"""

from __future__ import annotations

from ..model.modules import decoder_blocks
from .blocks import Block, each_block
from .experts import Opened, close_experts, open_experts, round_experts
from .recording import Pass, first
from .walk import LayerInputs, walk_blocks

__all__ = [
    "Block",
    "LayerInputs",
    "Opened",
    "Pass",
    "close_experts",
    "decoder_blocks",
    "each_block",
    "first",
    "open_experts",
    "round_experts",
    "walk_blocks",
]
