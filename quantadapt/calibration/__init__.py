"""A model run block by block, for quantizers that calibrate.

`walk_blocks` shows each linear layer its inputs, `each_block` hands on whole blocks.
"""

from __future__ import annotations

from ..model.modules import decoder_blocks
from .blocks import Block, each_block
from .recording import Pass, first
from .walk import LayerInputs, walk_blocks

__all__ = ["Block", "LayerInputs", "Pass", "decoder_blocks", "each_block", "first", "walk_blocks"]
